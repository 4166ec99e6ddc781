"""Guidance as function -> function."""

import jax
import jax.numpy as jnp

from tpgrpo_jax import types


def classifier_free(velocity_fn: types.VelocityFn, guidance_scale: float) -> types.VelocityFn:
  """v = v_negative + guidance_scale (v_positive - v_negative) (arXiv 2207.12598).

  Both are evaluated as one batch of 2 B, pairs side by side, so that the batch axis keeps its
  layout on a mesh.

  Args:
    velocity_fn: takes a Condition.
    guidance_scale: 1 gives v_positive (at twice the price of velocity_fn itself).

  Returns:
    A VelocityFn that takes a GuidedCondition.
  """

  def guided(params, x, sigma, condition: types.GuidedCondition):
    twice = lambda a: jnp.repeat(a, 2, axis=0)
    pairs = jax.tree.map(_interleave, condition.positive, condition.negative)
    velocity = velocity_fn(params, twice(x), twice(sigma), pairs)
    positive, negative = velocity[0::2], velocity[1::2]
    return negative + guidance_scale * (positive - negative)

  return guided


def _interleave(a, b):
  return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(-1, *a.shape[1:])
