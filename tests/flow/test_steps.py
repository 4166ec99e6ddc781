"""Single steps: worked numbers, the Euler limit, and marginals that are known exactly.

The marginals are not sampled. For data ~ N(m, s^2) the velocity is affine in x, so is the mean of
every step, and mean and variance of x propagate exactly: one call at x = 0 and x = 1 gives a step's
intercept and slope.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import steps
from tpgrpo_jax.types import Gaussian

NOISY = {
  "sde": functools.partial(steps.sde_step, sigma_max=0.9),
  "cps": steps.cps_step,
  "dance": steps.dance_step,
}
LOG_PROBS = {
  "sde": steps.gaussian_log_prob,
  "cps": steps.cps_log_prob,
  "dance": steps.gaussian_log_prob,
}


def one_step(step, x, velocity, sigma, sigma_next, **options):
  """(mean, std) of a step at a single number."""
  column = lambda a: jnp.full((1, 1), a, jnp.float32)
  gaussian = step(
    column(x), column(velocity), jnp.float32(sigma), jnp.float32(sigma_next), **options
  )
  return float(gaussian.mean.squeeze()), float(jnp.squeeze(gaussian.std))


def random_inputs(seed=0):
  x, velocity = jax.random.normal(jax.random.key(seed), (2, 3, 4, 5, 2))
  return x, velocity, jnp.array([1.0, 0.6, 0.3]), jnp.array([0.8, 0.4, 0.0])


# Worked by hand from the papers' formulas.
@pytest.mark.parametrize(
  "step, inputs, options, mean, std",
  [
    # g = .8, dt = -.25: 1 (1 - .16) + 2 (1 + .32) (-.25) = .18;  std = .8 sqrt(.25)
    (steps.sde_step, (1, 2, 0.5, 0.25), {"noise_level": 0.8, "sigma_max": 0.9}, 0.18, 0.4),
    # sigma = 1, stand-in .5: g^2 = .25 / .5; 1 (1 - .125) + 2 (1 + 0) (-.5); std = sqrt(.5 .5)
    (steps.sde_step, (1, 2, 1.0, 0.5), {"noise_level": 0.5, "sigma_max": 0.5}, -0.125, 0.5),
    # std = .25 sin(30 degrees); x0 = 0, x1 = 2: .75 * 0 + sqrt(.0625 - .015625) * 2
    (steps.cps_step, (1, 2, 0.5, 0.25), {"noise_level": 1 / 3}, 0.4330127, 0.125),
    # a = 1: all of x1 is replaced; x0 = -1: .75 * -1
    (steps.cps_step, (1, 4, 0.5, 0.25), {"noise_level": 1.0}, -0.75, 0.25),
    # x0 = 0, score = -1 / .25; 1 - .5 + .5 * .09 * 4 * (-.25); std = .3 * .5
    (steps.dance_step, (1, 2, 0.5, 0.25), {"noise_level": 0.3}, 0.455, 0.15),
    (steps.ode_step, (1, 2, 0.5, 0.25), {}, 0.5, 0.0),
  ],
)
def test_steps_have_their_worked_values(step, inputs, options, mean, std):
  # A few float32 roundings of numbers near 1.
  np.testing.assert_allclose(one_step(step, *inputs, **options), (mean, std), atol=5e-7)


@pytest.mark.parametrize("name", NOISY)
def test_zero_noise_step_is_the_ode_step(name):
  inputs = random_inputs()
  gaussian, euler = NOISY[name](*inputs, noise_level=0.0), steps.ode_step(*inputs)
  np.testing.assert_array_equal(gaussian.mean, euler.mean)
  np.testing.assert_array_equal(gaussian.std, euler.std)


@pytest.mark.parametrize("name", NOISY)
def test_noise_pulls_the_mean_away_from_the_ode_step(name):
  inputs = random_inputs()
  noisy, euler = NOISY[name](*inputs, noise_level=0.7), steps.ode_step(*inputs)
  changed = np.abs(noisy.mean - euler.mean).reshape(3, -1).max(1)
  # Only the last step of cps, to sigma = 0, is the Euler step whatever the noise.
  assert (changed > 1e-3).tolist() == [True, True, name != "cps"]


@pytest.mark.parametrize("name", NOISY)
def test_levels_per_sample_equal_one_level_at_a_time(name):
  x, velocity, sigma, sigma_next = random_inputs()
  together = NOISY[name](x, velocity, sigma, sigma_next, noise_level=0.7)
  for b in range(3):
    alone = NOISY[name](x[b : b + 1], velocity[b : b + 1], sigma[b], sigma_next[b], noise_level=0.7)
    np.testing.assert_array_equal(together.mean[b], alone.mean[0])
    np.testing.assert_array_equal(jnp.ravel(together.std)[b], alone.std)


GRID, OWN = np.float32([0.8, 0.6, 0.3]), jnp.asarray([0.9, 0.5, 0.2])


@pytest.mark.parametrize("name", NOISY)
def test_step_with_its_own_level_is_the_step_with_that_scalar_level(name):
  x, velocity, _, _ = random_inputs()
  step = steps.with_levels(NOISY[name], GRID, OWN)
  for sigma, level in zip(GRID, OWN):
    found = step(x, velocity, jnp.float32(sigma), jnp.float32(sigma - 0.1))
    wanted = NOISY[name](
      x, velocity, jnp.float32(sigma), jnp.float32(sigma - 0.1), noise_level=level
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", NOISY)
def test_samples_at_several_steps_take_the_level_of_their_own(name):
  x, velocity, _, _ = random_inputs()
  order = np.array([2, 0, 1])
  sigma = jnp.asarray(GRID[order])
  together = steps.with_levels(NOISY[name], GRID, OWN)(x, velocity, sigma, sigma - 0.1)
  for b, k in enumerate(order):
    alone = NOISY[name](
        x[b : b + 1], velocity[b : b + 1], sigma[b], sigma[b] - 0.1, noise_level=OWN[k]
    )  # fmt: skip
    np.testing.assert_array_equal(together.mean[b], alone.mean[0])
    np.testing.assert_array_equal(jnp.ravel(together.std)[b], jnp.squeeze(alone.std))


@pytest.mark.parametrize("name", NOISY)
def test_step_has_no_level_off_its_steps(name):
  x, velocity, _, _ = random_inputs()
  step = steps.with_levels(NOISY[name], GRID, OWN)
  off = step(x, velocity, jnp.array([0.8, 0.7, 0.3]), jnp.array([0.5, 0.5, 0.2]))
  lost = [np.isnan(off.mean).all((1, 2, 3)), np.isnan(jnp.ravel(off.std))]
  assert [each.tolist() for each in lost] == [[False, True, False]] * 2
  assert np.isnan(off.mean).any((1, 2, 3)).tolist() == [False, True, False]


def test_sensitivity_of_the_ode_step_is_the_size_of_dt():
  found = steps.sensitivity(steps.ode_step, jnp.float32(0.6), jnp.float32(0.35))
  np.testing.assert_allclose(found, 0.25, rtol=1e-6)


# The coefficient of v in each mean, as its paper writes it.
SENSITIVITIES = {
  "sde": lambda s, n, a: (s - n) * (1 + a**2 * s / (1 - s) * (1 - s) / (2 * s)),
  "cps": lambda s, n, a: (1 - n) * s - (n**2 - (n * np.sin(a * np.pi / 2)) ** 2) ** 0.5 * (1 - s),
  "dance": lambda s, n, a: (s - n) * (1 + a**2 * (1 - s) / (2 * s)),
}


@pytest.mark.parametrize("sigma, sigma_next", [(0.8, 0.6), (0.5, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize("name", NOISY)
def test_sensitivity_is_the_coefficient_of_the_velocity(name, sigma, sigma_next):
  step = functools.partial(NOISY[name], noise_level=0.7)
  found = steps.sensitivity(step, jnp.float32(sigma), jnp.float32(sigma_next))
  np.testing.assert_allclose(found, abs(SENSITIVITIES[name](sigma, sigma_next, 0.7)), rtol=2e-6)


@pytest.mark.parametrize("name", NOISY)
def test_std_is_the_spread_of_the_draws(name):
  x, velocity = jnp.ones((1, 200, 200, 1)), jnp.zeros((1, 200, 200, 1))
  gaussian = NOISY[name](x, velocity, jnp.float32(0.6), jnp.float32(0.4), noise_level=0.7)
  drawn = steps.draw(jax.random.key(0), gaussian)
  # 40,000 draws: a standard deviation is known to 1 / sqrt(80,000) = .35 %; 5 of those.
  np.testing.assert_allclose(np.std(drawn - gaussian.mean), jnp.squeeze(gaussian.std), rtol=0.018)


def test_draw_without_noise_is_the_mean():
  gaussian = steps.ode_step(*random_inputs())
  np.testing.assert_array_equal(steps.draw(jax.random.key(0), gaussian), gaussian.mean)


def test_gaussian_log_prob_has_its_worked_value():
  # One standard deviation off in 1 of 2 dims, std = 2: -(1/4) - log 2 - log(2 pi) / 2.
  x_next = jnp.array([[[[3.0], [1.0]]]])
  log_prob = steps.gaussian_log_prob(x_next, Gaussian(jnp.ones_like(x_next), jnp.float32(2.0)))
  np.testing.assert_allclose(log_prob, [-0.25 - 0.6931472 - 0.9189385], rtol=1e-6)


def test_gaussian_log_prob_integrates_to_one():
  x_next = jnp.linspace(-6, 6, 2001)[:, None]
  gaussian = Gaussian(jnp.full_like(x_next, 0.3), jnp.float32(0.7))
  mass = np.exp(steps.gaussian_log_prob(x_next, gaussian)).sum() * 12 / 2000
  np.testing.assert_allclose(mass, 1.0, rtol=1e-5)


def test_cps_log_prob_has_its_worked_value():
  x_next = jnp.array([[[[3.0], [1.0]]]])
  log_prob = steps.cps_log_prob(x_next, Gaussian(jnp.ones_like(x_next), jnp.float32(0.1)))
  np.testing.assert_allclose(log_prob, [-2.0], rtol=1e-6)


def test_cps_log_ratio_is_two_variances_times_the_gaussian_one():
  x_next, mean, other = jax.random.normal(jax.random.key(1), (3, 4, 2, 2, 3))
  std = jnp.array([0.1, 0.3, 0.5, 0.9]).reshape(4, 1, 1, 1)

  def log_ratio(log_prob):
    return log_prob(x_next, Gaussian(mean, std)) - log_prob(x_next, Gaussian(other, std))

  expected = 2 * jnp.ravel(std) ** 2 * log_ratio(steps.gaussian_log_prob)
  np.testing.assert_allclose(log_ratio(steps.cps_log_prob), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_prob_does_not_depend_on_the_number_of_dims(name):
  x_next, mean = jax.random.normal(jax.random.key(2), (2, 3, 2, 2, 1))
  gaussian = Gaussian(mean, jnp.float32(0.5))
  wide = Gaussian(jnp.tile(mean, (1, 1, 1, 5)), gaussian.std)
  np.testing.assert_allclose(
    LOG_PROBS[name](jnp.tile(x_next, (1, 1, 1, 5)), wide),
    LOG_PROBS[name](x_next, gaussian),
    rtol=1e-5,
  )


@pytest.mark.parametrize("std", [0.0, [0.5, 0.0]])
@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_prob_without_noise_is_refused(name, std):
  x = jnp.zeros((2, 1, 1, 1))
  std = jnp.asarray(std)
  gaussian = Gaussian(x, std.reshape(-1, 1, 1, 1) if std.ndim else std)
  with pytest.raises(ValueError, match="std=0.*noise_level > 0"):
    LOG_PROBS[name](x, gaussian)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("name", LOG_PROBS)
def test_traced_log_prob_without_noise_is_nan(name, offset):
  x = jnp.zeros((2, 1, 1, 1))
  score = jax.jit(lambda std: LOG_PROBS[name](x + offset, Gaussian(x, std)))
  assert np.isnan(score(jnp.float32(0.0))).all()


# The exact flow of data ~ N(M, S^2): x at level sigma is N((1 - sigma) M, variance(sigma)).
M, S = 0.5, 0.6


def variance(sigma):
  return ((1 - sigma) * S) ** 2 + sigma**2


def velocity(x, sigma):
  """E[noise - data | x], by Gaussian conditioning."""
  return -M + (sigma - (1 - sigma) * S**2) / variance(sigma) * (x - (1 - sigma) * M)


@functools.partial(jax.jit, static_argnums=(0, 1))
def affine_steps(step, options, sigmas, sigmas_next):
  """Intercept, slope and std of every step of a grid."""
  x = jnp.array([[0.0], [1.0]])

  def one(sigma, sigma_next):
    gaussian = step(x, velocity(x, sigma), sigma, sigma_next, **dict(options))
    return gaussian.mean[0, 0], gaussian.mean[1, 0] - gaussian.mean[0, 0], jnp.squeeze(gaussian.std)

  return jax.vmap(one)(sigmas, sigmas_next)


def final_moments(step, num_steps, *, top=1.0, skip=0, **options):
  """Exact mean and variance at sigma = 0, from the exact marginal at the grid's `skip`-th level.

  `top`, the first level, is 1 or, to stay clear of the SDE's singularity, below it.
  """
  sigmas = np.linspace(top, 0.0, num_steps + 1)[skip:]
  levels = jnp.asarray(sigmas, jnp.float32)
  coefficients = affine_steps(step, tuple(options.items()), levels[:-1], levels[1:])
  mean, var = (1 - sigmas[0]) * M, variance(sigmas[0])
  for intercept, slope, std in np.stack(coefficients, axis=1).astype(np.float64):
    mean, var = slope * mean + intercept, slope**2 * var + std**2
  return mean, var


def orders(errors):
  """Exponents p of error ~ T^-p between grids that are twice as fine."""
  errors = np.abs(errors)
  return np.log2(errors[:-1] / errors[1:])


# cps adds noise of size sigma_next sin(a pi / 2) in EVERY step, so the SDE that its steps approach
# has a level that falls as 1 / sqrt(T).
@pytest.mark.parametrize(
  "step, options",
  [
    (steps.ode_step, lambda num_steps: {}),
    (steps.sde_step, lambda num_steps: {"noise_level": 0.7, "sigma_max": 0.99}),
    (steps.dance_step, lambda num_steps: {"noise_level": 0.3}),
    (steps.cps_step, lambda num_steps: {"noise_level": 0.7 * (10 / num_steps) ** 0.5}),
  ],
  ids=["ode", "sde", "dance", "cps"],
)
def test_marginal_variance_is_kept_to_first_order(step, options):
  errors = [final_moments(step, n, top=0.9, **options(n))[1] - S**2 for n in (80, 160, 320, 640)]
  # The next term of the expansion, O(1 / T), still shows at T = 80.
  np.testing.assert_allclose(orders(errors), 1.0, atol=0.07)


@pytest.mark.parametrize("num_steps", [5, 80])
@pytest.mark.parametrize("name", NOISY)
def test_marginal_mean_is_kept_at_any_grid(name, num_steps):
  mean, _ = final_moments(NOISY[name], num_steps, noise_level=0.7)
  np.testing.assert_allclose(mean, M, atol=2e-6)  # float32 roundings of 80 steps


@pytest.mark.parametrize("noise_level", [0.5, 0.7])
def test_sde_forgets_its_first_step_at_order_noise_level_squared(noise_level):
  # g is infinite at sigma = 1. With sigma[1] as the stand-in the first step has a noise of O(1)
  # whatever the grid; its excess variance decays as T^(-a^2), which is slower than 1 / T for a < 1.
  def excess(num_steps):
    options = {"noise_level": noise_level, "sigma_max": 1 - 1 / num_steps}
    whole = final_moments(steps.sde_step, num_steps, **options)[1]
    return whole - final_moments(steps.sde_step, num_steps, skip=1, **options)[1]

  errors = [excess(n) for n in (640, 1280)]
  np.testing.assert_allclose(orders(errors), noise_level**2, atol=0.03)


@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_cps_at_a_fixed_level_tends_to_a_narrower_marginal(noise_level):
  # Fine grids add the same noise more and more often: x1 is then the posterior mean, not a sample,
  # and the variance falls to s^2 cos^2(a pi / 4). That is a property of the method.
  _, var = final_moments(steps.cps_step, 1280, noise_level=noise_level)
  np.testing.assert_allclose(var / S**2, np.cos(noise_level * np.pi / 4) ** 2, atol=0.01)
