"""Turning points of a trajectory (TP-GRPO, arXiv 2602.06422), and the credit that they are given.

R[k] is the reward of the ODE completion of the state after k stochastic steps, d[k] = R[k+1] - R[k]
and s[k] = sign d[k] sign(R[W] - R[0]) the trend of step k relative to the whole trajectory. Each
rule is written for one trajectory and vmapped over the group axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tpgrpo_jax.credit import stepwise


def turning_points(completion_reward: jax.Array) -> jax.Array:
  """Steps where the trend turns from against the outcome to with it (Def. 4.1; Sec. 5.3 for k = 0).

  k >= 1: s[k-1] < 0 and s[k] > 0.  k = 0: s[0] > 0.  A zero sign is neither.

  Args:
    completion_reward: [W+1, B].

  Returns:
    [W, B] bool.
  """
  return _over_group(_turning_points, completion_reward)


def consistent_turning_points(completion_reward: jax.Array) -> jax.Array:
  """Turning points whose step points the way that the rest of the trajectory goes (Def. 5.1).

  As `turning_points`, and d[k] (R[W] - R[k+1]) > 0.  k = 0: d[0] (R[W] - R[1]) > 0 alone.

  Args:
    completion_reward: [W+1, B].

  Returns:
    [W, B] bool.
  """
  return _over_group(_consistent_turning_points, completion_reward)


def aggregated(completion_reward: jax.Array) -> jax.Array:
  """agg[k] = R[W] - R[k], all that a step and its successors change (Eq. 8); [W+1, B] -> [W, B]."""
  return completion_reward[-1] - completion_reward[:-1]


def balance(is_turning_point: jax.Array, value: jax.Array, key: jax.Array) -> jax.Array:
  """Keeps equally many positive and negative replacements (App. D).

  Over the whole batch, the majority sign loses its smallest magnitudes. Of equal magnitudes chance
  decides (ours): with coarse rewards nearly all are equal, and any fixed order would favour a step.
  With one sign only, nothing is dropped; a value of exactly 0 counts as neither sign and stays.

  Args:
    is_turning_point: [W, B] bool.
    value: [W, B], the aggregated rewards.
    key: PRNG key, the same on all processes.

  Returns:
    [W, B] bool, a subset of is_turning_point.
  """
  marked, flat = is_turning_point.ravel(), value.ravel()
  positive, negative = marked & (flat > 0), marked & (flat < 0)
  counts = jnp.sum(positive), jnp.sum(negative)
  kept = jnp.where(jnp.minimum(*counts) > 0, jnp.minimum(*counts), jnp.maximum(*counts))
  lot = jax.random.permutation(key, len(flat))
  dropped = (positive & (_rank(positive, flat, lot) >= kept)) | (
    negative & (_rank(negative, flat, lot) >= kept)
  )
  return (marked & ~dropped).reshape(value.shape)


def step_reward(completion_reward: jax.Array, is_turning_point: jax.Array) -> jax.Array:
  """agg[k] at turning points, d[k] elsewhere; an agg of exactly 0 leaves d[k].

  Args:
    completion_reward: [W+1, B].
    is_turning_point: [W, B] bool.

  Returns:
    [W, B].
  """
  agg = aggregated(completion_reward)
  replaced = is_turning_point & (agg != 0)
  return jnp.where(replaced, agg, stepwise.increments(completion_reward))


def aggregated_or_terminal(completion_reward: jax.Array, is_turning_point: jax.Array) -> jax.Array:
  """agg[k] at turning points, R[W] elsewhere: the aggregation without the increments.

  Args:
    completion_reward: [W+1, B].
    is_turning_point: [W, B] bool.

  Returns:
    [W, B].
  """
  return jnp.where(is_turning_point, aggregated(completion_reward), completion_reward[-1])


def _over_group(rule: Callable, completion_reward):
  return jax.vmap(rule, in_axes=1, out_axes=1)(completion_reward)


def _trend(reward):
  return jnp.sign(stepwise.increments(reward)) * jnp.sign(reward[-1] - reward[0])


def _turning_points(reward):
  """One trajectory, [W+1] -> [W]."""
  trend = _trend(reward)
  turns = (trend[:-1] < 0) & (trend[1:] > 0)
  return jnp.concatenate([trend[:1] > 0, turns])


def _consistent_turning_points(reward):
  """One trajectory, [W+1] -> [W]."""
  agrees = stepwise.increments(reward) * (reward[-1] - reward[1:]) > 0
  turns = _turning_points(reward) & agrees
  return turns.at[0].set(agrees[0])


def _rank(mask, value, lot):
  """Place of each masked element by falling magnitude; equal ones by their lot."""
  order = jnp.lexsort((lot, jnp.where(mask, -jnp.abs(value), jnp.inf)))
  return jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))
