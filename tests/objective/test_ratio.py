"""Log-ratios of steps: RatioNorm against Gaussian densities in float64, on and off policy."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tpgrpo_jax.flow import steps
from tpgrpo_jax.objective import ratio
from tpgrpo_jax.types import Gaussian

SHAPE = (3, 4, 5, 2)
DIMS = 40
STEPS = {
  "sde": functools.partial(steps.sde_step, noise_level=0.7, sigma_max=0.9),
  "cps": functools.partial(steps.cps_step, noise_level=0.7),
  "dance": functools.partial(steps.dance_step, noise_level=0.3),
}
every_dynamics = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def two_policies(step, *, moved=0.1, seed=0):
  """x_next drawn from the old step, the new step, and the old one; three levels."""
  x, velocity, direction = jax.random.normal(jax.random.key(seed), (3, *SHAPE))
  sigma, sigma_next = jnp.array([1.0, 0.6, 0.3]), jnp.array([0.8, 0.4, 0.1])
  old = step(x, velocity, sigma, sigma_next)
  new = step(x, velocity + moved * direction, sigma, sigma_next)
  return steps.draw(jax.random.key(seed + 1), old), new, old


def double(gaussian):
  mean = np.asarray(gaussian.mean, np.float64)
  return mean, np.broadcast_to(np.asarray(gaussian.std, np.float64), mean.shape)


def mean_dims(values):
  return values.reshape(len(values), -1).mean(1)


@every_dynamics
def test_normalized_is_std_times_the_gaussian_log_ratio_without_its_quadratic_part(step):
  x_next, new, old = two_policies(step)
  (mean, std), (mean_old, _) = double(new), double(old)
  density = lambda mean: stats.norm.logpdf(np.asarray(x_next, np.float64), mean, std)
  log_ratio = mean_dims(density(mean) - density(mean_old))
  quadratic = mean_dims((mean - mean_old) ** 2 / (2 * std**2))
  expected = mean_dims(std) * (log_ratio + quadratic)
  # Float32 roundings of 40 terms of about .1 x .1.
  np.testing.assert_allclose(ratio.normalized(x_next, new, old), expected, rtol=1e-4, atol=1e-7)


@every_dynamics
def test_normalized_is_exactly_zero_on_policy(step):
  x, velocity = jax.random.normal(jax.random.key(0), (2, *SHAPE))
  sigma, sigma_next = jnp.array([1.0, 0.6, 0.3]), jnp.array([0.8, 0.4, 0.1])
  x_next = steps.draw(jax.random.key(1), step(x, velocity, sigma, sigma_next))

  @jax.jit
  def of(new_velocity, old_velocity):
    new, old = (step(x, v, sigma, sigma_next) for v in (new_velocity, old_velocity))
    return ratio.normalized(x_next, new, old)

  np.testing.assert_array_equal(of(velocity, velocity), np.zeros(3))


@pytest.mark.parametrize("std", [0.01, 0.3, 2.0])
def test_on_policy_gradient_of_normalized_is_the_noise_over_dims_whatever_the_std(std):
  mean, noise = jax.random.normal(jax.random.key(0), (2, *SHAPE))
  old = Gaussian(mean, jnp.float32(std))
  x_next = mean + std * noise
  slope = jax.grad(lambda mean: ratio.normalized(x_next, Gaussian(mean, old.std), old).sum())(mean)
  # x_next - mean recovers the noise to an ulp of x_next, 2e-7, over the std.
  np.testing.assert_allclose(slope * DIMS, noise, rtol=1e-5, atol=5e-7 / std)


@every_dynamics
def test_normalized_scales_with_the_move(step):
  # Linear in mean - mean_old: a tenth of the move is a tenth of the log-ratio. Not so log-probs.
  far, near = (ratio.normalized(*two_policies(step, moved=m)) for m in (1.0, 0.1))
  np.testing.assert_allclose(near, 0.1 * far, rtol=1e-4, atol=1e-6)


def test_normalized_has_mean_zero_over_draws():
  _, new, old = two_policies(STEPS["sde"])
  noise = jax.random.normal(jax.random.key(3), (5000, *SHAPE))
  draws = jax.vmap(lambda z: ratio.normalized(old.mean + old.std * z, new, old))(noise)
  assert np.all(np.abs(draws.mean(0)) < 5 * draws.std(0) / 5000**0.5)


def test_normalized_is_one_number_a_sample():
  x_next, new, old = two_policies(STEPS["cps"])
  together = ratio.normalized(x_next, new, old)
  at = lambda g, b: Gaussian(g.mean[b : b + 1], g.std[b : b + 1])
  alone = [ratio.normalized(x_next[b : b + 1], at(new, b), at(old, b))[0] for b in range(3)]
  np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_normalized_of_a_deterministic_step_is_nan():
  mean = jnp.ones((2, 3, 3, 1))
  still = Gaussian(mean, jnp.zeros(()))
  assert np.isnan(ratio.normalized(mean, still, still)).all()


@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_log_prob_ratio_is_the_difference(new, old):
  column = lambda a: jnp.array([a], jnp.float32)
  expected = np.float32(new) - np.float32(old)
  # XLA flushes subnormal numbers to 0.
  np.testing.assert_allclose(ratio.log_prob(column(new), column(old)), [expected], atol=1e-37)


def test_the_table_names_both_ratios():
  assert ratio.RATIOS == {"log_prob": ratio.log_prob, "normalized": ratio.normalized}
