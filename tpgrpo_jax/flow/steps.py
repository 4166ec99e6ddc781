"""One denoising step as a Gaussian N(mean, std^2 I); drawing from it and scoring under it.

sigma is the noise level of x (1 = noise), sigma_next < sigma that of x_next, dt = sigma_next - sigma.
Levels are scalars, or [B] against x [B, ...]. With noise_level 0 every step is the Euler step.
"""

from collections.abc import Callable
import math

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.types import Gaussian


def ode_step(
  x: jax.Array, velocity: jax.Array, sigma: jax.Array, sigma_next: jax.Array
) -> Gaussian:
  """The Euler step of the probability-flow ODE: mean = x + v dt, std = 0.

  Args:
    x: [B, ...].
    velocity: [B, ...], the model's output at x (noise - data).
    sigma: scalar or [B].
    sigma_next: scalar or [B].
  """
  sigma, sigma_next = _levels(x, sigma, sigma_next)
  return Gaussian(x + velocity * (sigma_next - sigma), jnp.zeros_like(sigma))


def sde_step(
  x: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
  *,
  noise_level: float | jax.Array,
  sigma_max: float,
) -> Gaussian:
  """The SDE step of Flow-GRPO (arXiv 2505.05470, Eq. 9).

  g = noise_level sqrt(sigma / (1 - sigma)), std = g sqrt(-dt),
  mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt.

  Args:
    x: [B, ...].
    velocity: [B, ...].
    sigma: scalar or [B].
    sigma_next: scalar or [B].
    noise_level: a.
    sigma_max: stands in for sigma = 1 in g's denominator; the grid's second value.
  """
  sigma, sigma_next = _levels(x, sigma, sigma_next)
  dt = sigma_next - sigma
  g2 = noise_level**2 * sigma / (1 - jnp.where(sigma == 1, sigma_max, sigma))
  # Grouped as Euler + correction, so that g = 0 gives the Euler step to the last bit.
  mean = x + velocity * dt + (x + (1 - sigma) * velocity) * (g2 * dt / (2 * sigma))
  return Gaussian(mean, jnp.sqrt(-g2 * dt))


def cps_step(
  x: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
  *,
  noise_level: float | jax.Array,
) -> Gaussian:
  """The coefficients-preserving step of Flow-CPS (arXiv 2509.05952).

  std = sigma_next sin(noise_level pi / 2), x0 = x - sigma v, x1 = x + (1 - sigma) v,
  mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1.

  Args:
    x: [B, ...].
    velocity: [B, ...].
    sigma: scalar or [B].
    sigma_next: scalar or [B]; at 0 the step is deterministic.
    noise_level: a in [0, 1].
  """
  sigma, sigma_next = _levels(x, sigma, sigma_next)
  angle = 0.5 * jnp.pi * noise_level
  std = sigma_next * jnp.sin(angle)
  # sqrt(sigma_next^2 - std^2) = sigma_next cos(angle), and the whole as Euler + what the noise
  # takes from x1, so that angle = 0 gives the Euler step to the last bit.
  x1 = x + (1 - sigma) * velocity
  mean = x + velocity * (sigma_next - sigma) - (sigma_next * (1 - jnp.cos(angle))) * x1
  return Gaussian(mean, std)


def dance_step(
  x: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
  *,
  noise_level: float | jax.Array,
) -> Gaussian:
  """The SDE step of DanceGRPO (arXiv 2505.07818).

  std = noise_level sqrt(-dt), score = -(x - (1 - sigma) x0) / sigma^2 with x0 = x - sigma v,
  mean = x + v dt - noise_level^2 score dt / 2.

  Args:
    x: [B, ...].
    velocity: [B, ...].
    sigma: scalar or [B].
    sigma_next: scalar or [B].
    noise_level: eta.
  """
  sigma, sigma_next = _levels(x, sigma, sigma_next)
  dt = sigma_next - sigma
  score = -(x - (1 - sigma) * (x - sigma * velocity)) / sigma**2
  mean = x + velocity * dt - 0.5 * noise_level**2 * dt * score
  return Gaussian(mean, noise_level * jnp.sqrt(-dt))


def with_levels(step_fn: Callable[..., Gaussian], sigmas: np.ndarray, noise_levels: jax.Array):
  """`step_fn` with a noise level for each step, found by the step's sigma.

  Args:
    step_fn: with the keyword noise_level.
    sigmas: [W] float32 noise levels of the states, as they are stored; all different.
    noise_levels: [W].

  Returns:
    A StepFn; NaN at a sigma that is none of these.
  """

  def step(x, velocity, sigma, sigma_next):
    found = jnp.asarray(sigma)[..., None] == sigmas
    level = jnp.where(found.any(-1), jnp.sum(jnp.where(found, noise_levels, 0.0), -1), jnp.nan)
    level, _ = _levels(x, level, sigma)
    return step_fn(x, velocity, sigma, sigma_next, noise_level=level)

  return step


def sensitivity(
  step_fn: Callable[..., Gaussian], sigma: jax.Array, sigma_next: jax.Array
) -> jax.Array:
  """|d mean / d v| of a step: its mean is linear in the velocity.

  Args:
    step_fn: the stochastic step.
    sigma: scalar.
    sigma_next: scalar.
  """
  one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
  at = lambda velocity: step_fn(zero, velocity, sigma, sigma_next).mean[0, 0]
  return jnp.abs(at(one) - at(zero))


def draw(key: jax.Array, gaussian: Gaussian) -> jax.Array:
  """x_next = mean + std noise.

  Args:
    key: used once.
    gaussian: mean [B, ...].
  """
  noise = jax.random.normal(key, gaussian.mean.shape, gaussian.mean.dtype)
  return gaussian.mean + gaussian.std * noise


def gaussian_log_prob(x_next: jax.Array, gaussian: Gaussian) -> jax.Array:
  """MEAN over the latent dims of the log-density of N(mean, std^2 I), constants kept.

  Used with sde_step and dance_step, as in Flow-GRPO and DanceGRPO.

  Args:
    x_next: [B, ...].
    gaussian: of the step that x_next was drawn from.

  Returns:
    [B]; NaN where std is 0 and traced values cannot be checked.

  Raises:
    ValueError: std is 0, where a density does not exist.
  """
  _require_noise(gaussian)
  z = (x_next - gaussian.mean) / gaussian.std
  log_std = jnp.log(gaussian.std).reshape(-1)  # [1] or [B]: std has no latent dims
  return -_mean_square(z * 0.5**0.5) - log_std - 0.5 * math.log(2 * math.pi)


def cps_log_prob(x_next: jax.Array, gaussian: Gaussian) -> jax.Array:
  """MEAN over the latent dims of -(x_next - mean)^2: Flow-CPS drops all constants, 1 / std^2 too.

  Its log-ratios are 2 std^2 times those of `gaussian_log_prob`.

  Args:
    x_next: [B, ...].
    gaussian: of the step that x_next was drawn from.

  Returns:
    [B]; NaN where std is 0 and traced values cannot be checked.

  Raises:
    ValueError: std is 0, where a density does not exist.
  """
  _require_noise(gaussian)
  return -_mean_square(jnp.where(gaussian.std > 0, x_next - gaussian.mean, jnp.nan))


def _levels(x, sigma, sigma_next):
  """Float32 levels that broadcast against x."""
  shape = (-1,) + (1,) * (x.ndim - 1)
  levels = (jnp.asarray(s, jnp.float32) for s in (sigma, sigma_next))
  return tuple(s.reshape(shape) if s.ndim else s for s in levels)


def _require_noise(gaussian):
  if not isinstance(gaussian.std, core.Tracer) and not (jnp.asarray(gaussian.std) > 0).all():
    raise ValueError(
      "log_prob at std=0: a deterministic step has no density. Score only steps of the stochastic "
      "window, with noise_level > 0 (and, for cps, sigma_next > 0)."
    )


def _mean_square(z):
  """Mean over the latent dims of z^2, as a sum of scaled squares.

  The sum comes last: a final multiplication by 1 / D would be contracted into an FMA with whatever
  is subtracted from the log-prob, and an on-policy log-ratio would be a rounding error and not 0.
  """
  dims = math.prod(z.shape[1:])
  return jnp.sum(jnp.square(z * dims**-0.5), axis=tuple(range(1, z.ndim)))
