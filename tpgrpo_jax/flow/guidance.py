"""Guidance as function -> function."""

import jax
import jax.numpy as jnp

from tpgrpo_jax import types


def classifier_free(velocity_fn: types.VelocityFn, guidance_scale: float) -> types.VelocityFn:
  """v = v_negative + guidance_scale (v_positive - v_negative) (arXiv 2207.12598).

  Both are evaluated as one batch of 2 B. The neighbours that share a row of the condition come twice, side by
  side, so that the batch axis keeps its layout on a mesh.

  Args:
    velocity_fn: takes a Condition.
    guidance_scale: 1 gives v_positive (at twice the price of velocity_fn itself).

  Returns:
    A VelocityFn that takes a GuidedCondition.
  """

  def guided(params, x, sigma, condition: types.GuidedCondition):
    rows = len(jax.tree.leaves(condition.positive)[0])
    twice = lambda a: _pairs(by_row := a.reshape(rows, -1, *a.shape[1:]), by_row)
    both = jax.tree.map(_pairs, condition.positive, condition.negative)
    merge = lambda a: a.reshape(-1, *a.shape[2:])
    velocity = velocity_fn(params, merge(twice(x)), merge(twice(sigma)), both)
    velocity = velocity.reshape(rows, 2, -1, *x.shape[1:])
    positive, negative = merge(velocity[:, 0]), merge(velocity[:, 1])
    return negative + guidance_scale * (positive - negative)

  return guided


def _pairs(a, b):
  """[2 N, ...] of each row of a and of b, which may have one for all."""
  return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(-1, *a.shape[1:])
