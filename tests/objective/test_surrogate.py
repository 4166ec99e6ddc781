"""The clipped surrogate's slopes, and the KL of two Gaussians."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.types import Gaussian

CLIP = 0.2
number = st.floats(-2, 2, width=32)
properties = settings(max_examples=25, deadline=None)


@jax.jit
def value_and_slope(log_ratio, advantage, clip_range=CLIP):
  """Loss of one sample and its derivative in log_prob."""

  def of(log_prob):
    old = jnp.zeros_like(log_prob)
    return surrogate.clipped_surrogate(log_prob, old, advantage, clip_range=clip_range)[0]

  value, slope = jax.value_and_grad(of)(log_ratio)
  return value, slope[0]


def clipped(ratio, advantage):
  # The import hook checks clip_range to be a float, which a traced one is not.
  log_ratio = jnp.log(jnp.array([ratio], jnp.float32))
  value, slope = value_and_slope(log_ratio, jnp.array([advantage], jnp.float32))
  return float(value), float(slope)


@properties
@given(number)
def test_on_policy_slope_is_minus_the_advantage(advantage):
  # XLA flushes subnormal numbers to 0, which is what atol allows for.
  np.testing.assert_allclose(
    clipped(1.0, advantage), (-advantage, -advantage), rtol=1e-6, atol=1e-37
  )


@pytest.mark.parametrize("clip_range", [1e-4, 1e-5])
def test_on_policy_slope_survives_the_papers_clip_ranges(clip_range):
  advantage, log_prob = jnp.array([1.5, -0.5]), jnp.array([-0.3, -2.0])
  total = lambda new: surrogate.clipped_surrogate(new, log_prob, advantage, clip_range=clip_range).sum()
  np.testing.assert_allclose(jax.grad(total)(log_prob), -advantage, rtol=1e-6)


@pytest.mark.parametrize("ratio, advantage", [(1.3, 1.0), (2.0, 0.5), (0.7, -1.0), (0.1, -2.0)])
def test_a_step_past_the_clip_range_has_no_slope(ratio, advantage):
  value, slope = clipped(ratio, advantage)
  assert slope == 0
  edge = 1 + CLIP if advantage > 0 else 1 - CLIP
  np.testing.assert_allclose(value, -advantage * edge, rtol=1e-6)


@pytest.mark.parametrize("ratio, advantage", [(0.5, 1.0), (1.1, 1.0), (1.5, -1.0), (0.9, -2.0)])
def test_a_step_the_wrong_way_or_within_the_range_keeps_its_slope(ratio, advantage):
  np.testing.assert_allclose(
    clipped(ratio, advantage), (-advantage * ratio, -advantage * ratio), rtol=1e-6
  )


@properties
@given(st.floats(0.25, 4, width=32), number)
def test_clipping_never_makes_the_loss_smaller(ratio, advantage):
  assert clipped(ratio, advantage)[0] >= -advantage * ratio - 1e-5


@properties
@given(st.floats(0.25, 4, width=32))
def test_a_sample_without_advantage_has_neither_loss_nor_slope(ratio):
  assert clipped(ratio, 0.0) == (0, 0)


def test_loss_is_one_number_a_sample():
  log_prob, old, advantage = jax.random.normal(jax.random.key(0), (3, 5))
  together = surrogate.clipped_surrogate(log_prob, old, advantage, clip_range=CLIP)
  alone = [
    surrogate.clipped_surrogate(
      log_prob[i : i + 1], old[i : i + 1], advantage[i : i + 1], clip_range=CLIP
    )[0]
    for i in range(5)
  ]
  np.testing.assert_allclose(together, alone, rtol=1e-6)


def gaussians(seed=0):
  mean, reference = jax.random.normal(jax.random.key(seed), (2, 3, 2, 2, 1))
  std = jnp.array([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
  return Gaussian(mean, std), Gaussian(reference, std)


def test_kl_has_its_worked_value():
  # 1 and 0 standard deviations apart in two dims: (1/2 + 0) / 2.
  mean = jnp.array([[[[0.5], [0.0]]]])
  kl = surrogate.gaussian_kl(Gaussian(mean, jnp.float32(0.5)), Gaussian(0 * mean, jnp.float32(0.5)))
  np.testing.assert_allclose(kl, [0.25], rtol=1e-6)


def test_kl_is_the_mean_log_ratio_of_draws():
  one, other = gaussians()
  noise = jax.random.normal(jax.random.key(1), (20000, *one.mean.shape))
  x = one.mean + one.std * noise
  square = lambda g: jnp.square((x - g.mean) / g.std).mean((2, 3, 4))
  ratio = 0.5 * (square(other) - square(one))
  error = 5 * ratio.std(0) / 20000**0.5
  assert np.all(np.abs(ratio.mean(0) - surrogate.gaussian_kl(one, other)) < error)


def test_kl_to_itself_is_zero_and_flat():
  one, _ = gaussians()
  total = lambda mean: surrogate.gaussian_kl(Gaussian(mean, one.std), one).sum()
  value, slope = jax.value_and_grad(total)(one.mean)
  assert value == 0 and not np.any(slope)


def test_kl_is_symmetric_and_positive():
  one, other = gaussians()
  kl = surrogate.gaussian_kl(one, other)
  np.testing.assert_array_equal(kl, surrogate.gaussian_kl(other, one))
  assert kl.shape == (3,) and np.all(kl > 0)


def test_kl_ignores_a_common_scale():
  one, other = gaussians()
  double = lambda g: jax.tree.map(lambda a: 2 * a, g)
  np.testing.assert_array_equal(
    surrogate.gaussian_kl(double(one), double(other)), surrogate.gaussian_kl(one, other)
  )
