"""Losses of the forward process: finished samples, noised afresh, and no log-prob of a step.

The sampler may be any ODE solver. Velocities are noise - data; `sigma` is a scalar or [B]. What an
old or reference model gives takes no gradient. Every loss is one number a (sample, level).
"""

import jax
from jax import lax
import jax.numpy as jnp

_NFT_FLOOR = 1e-5  # of the weights of `nft`
_AWM_EPS, _AWM_POWER = 1e-10, 0.25  # of AWM's generalised Huber loss


def noised(data: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """x = (1 - sigma) data + sigma noise.

  Args:
    data: [B, ...].
    noise: [B, ...].
    sigma: scalar or [B].
  """
  sigma = _level(data, sigma)
  return (1 - sigma) * data + sigma * noise


def nft(
  velocity: jax.Array,
  old_velocity: jax.Array,
  x: jax.Array,
  data: jax.Array,
  sigma: jax.Array,
  advantage: jax.Array,
  *,
  beta: float,
  advantage_limit: float = 5.0,
) -> jax.Array:
  """DiffusionNFT (arXiv 2509.16117): good samples pull v, bad ones pull its mirror image in v_old.

  r = clip(A / (2 A_max) + 1/2, 0, 1);  v+ = b v + (1 - b) v_old;  v- = (1 + b) v_old - b v;
  x0+- = x - sigma v+-;  L+- = mean_dims (x0+- - data)^2 / w+-,  w+- = max(mean_dims |x0+- - data|,
  1e-5) without gradient;  loss = A_max (r L+ + (1 - r) L-) / b.
  At v = v_old its gradient is A grad mean_dims (x0 - data)^2 / w for |A| <= A_max, whatever b is.

  Args:
    velocity: [B, ...] at x, of the current weights.
    old_velocity: [B, ...] at x, of the weights that sampled.
    x: [B, ...], data noised to sigma.
    data: [B, ...], the finished samples.
    sigma: scalar or [B].
    advantage: [B].
    beta: b > 0.
    advantage_limit: A_max.

  Returns:
    [B], to be minimised.
  """
  old, level = lax.stop_gradient(old_velocity), _level(x, sigma)
  good = jnp.clip(advantage / (2 * advantage_limit) + 0.5, 0.0, 1.0)

  def error(v):
    off = x - level * v - data
    weight = jnp.maximum(_mean_dims(jnp.abs(off)), _NFT_FLOOR)
    return _mean_dims(jnp.square(off)) / lax.stop_gradient(weight)

  positive = error(beta * velocity + (1 - beta) * old)
  negative = error((1 + beta) * old - beta * velocity)
  return (good * positive + (1 - good) * negative) * (advantage_limit / beta)


def matching_log_prob(
  velocity: jax.Array, data: jax.Array, noise: jax.Array, sigma: jax.Array
) -> jax.Array:
  """log p = -4 sigma ((m + 1e-10)^(1/4) - 1e-10^(1/4)), m = MEAN over dims of (v - (noise - data))^2.

  AWM's stand-in for the log-density of data (arXiv 2509.25050), its "ghuber" form. It is 0 and flat
  at m = 0.

  Args:
    velocity: [B, ...] at `noised(data, noise, sigma)`.
    data: [B, ...].
    noise: [B, ...].
    sigma: scalar or [B].

  Returns:
    [B].
  """
  mismatch = _mean_dims(jnp.square(velocity - (noise - data)))
  huber = (mismatch + _AWM_EPS) ** _AWM_POWER - _AWM_EPS**_AWM_POWER
  return -sigma / _AWM_POWER * huber


def awm(
  velocity: jax.Array,
  data: jax.Array,
  noise: jax.Array,
  sigma: jax.Array,
  advantage: jax.Array,
  *,
  advantage_limit: float = 5.0,
) -> jax.Array:
  """-A' exp(l - stop_gradient(l)) of AWM (arXiv 2509.25050), l = `matching_log_prob`.

  A' = clip(A, -A_max, A_max) / A_max. The ratio is 1 in value: an epoch has one update, on-policy,
  as released (whose clip range of 1 never acts). The gradient is -A' grad l.

  Args:
    velocity: [B, ...] at `noised(data, noise, sigma)`.
    data: [B, ...], the finished samples.
    noise: [B, ...], drawn afresh.
    sigma: scalar or [B].
    advantage: [B].
    advantage_limit: A_max.

  Returns:
    [B], to be minimised.
  """
  log_prob = matching_log_prob(velocity, data, noise, sigma)
  scaled = jnp.clip(advantage, -advantage_limit, advantage_limit) / advantage_limit
  return -scaled * jnp.exp(log_prob - lax.stop_gradient(log_prob))


def velocity_penalty(velocity: jax.Array, other: jax.Array) -> jax.Array:
  """MEAN over dims of (v - v_other)^2, v_other without gradient: both methods' KL; [B, ...] -> [B]."""
  return _mean_dims(jnp.square(velocity - lax.stop_gradient(other)))


def _level(x, sigma):
  """Float32 levels that broadcast against x."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return sigma.reshape((-1,) + (1,) * (x.ndim - 1)) if sigma.ndim else sigma


def _mean_dims(values):
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))
