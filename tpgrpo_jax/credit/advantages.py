"""From step rewards to advantages: centred and scaled within the group of one prompt.

B = P K, prompt-major: the K samples of a prompt are neighbours. Rewards are those of all processes.
"""

import jax
import jax.numpy as jnp

EPS = 1e-4  # Flow-GRPO's; added to the standard deviation


def normalize_group(reward: jax.Array, group_size: int, *, eps: float = EPS) -> jax.Array:
  """A = (r - mean_K r) / (std_K r + eps), per step and prompt, population std (Flow-GRPO, TP-GRPO).

  A group without spread gives 0.

  Args:
    reward: [..., B].
    group_size: K.
    eps: added to the std.

  Returns:
    [..., B].

  Raises:
    ValueError: group_size is below 2 or does not divide B.
  """
  return _normalize(reward, group_size, lambda r: jnp.std(r, axis=-1, keepdims=True), eps)


def normalize_group_joint(reward: jax.Array, group_size: int, *, eps: float = EPS) -> jax.Array:
  """A = (r - mean) / (std + eps) with both over a prompt's K x W step rewards together.

  As Stepwise-Flow-GRPO normalises increments (arXiv 2603.28718).

  Args:
    reward: [W, B].
    group_size: K.
    eps: added to the std.

  Returns:
    [W, B].
  """
  grouped = _grouped(reward, group_size)
  axes = (0, 2)
  spread = jnp.std(grouped, axis=axes, keepdims=True)
  return (_centre(grouped, axes) / (spread + eps)).reshape(reward.shape)


def normalize_global_std(reward: jax.Array, group_size: int, *, eps: float = EPS) -> jax.Array:
  """A = (r - mean_K r) / (std r + eps), the std per step over all samples of the epoch.

  Args:
    reward: [..., B].
    group_size: K.
    eps: added to the std.

  Returns:
    [..., B].
  """
  return _normalize(reward, group_size, lambda r: jnp.std(r, axis=(-2, -1), keepdims=True), eps)


ADVANTAGES = {
  "group": normalize_group,
  "group_joint": normalize_group_joint,
  "global_std": normalize_global_std,
}


def zero_spread(reward: jax.Array, group_size: int) -> jax.Array:
  """Which groups all have one reward; [..., B] -> [..., P] bool. They teach nothing."""
  grouped = _grouped(reward, group_size)
  return jnp.all(grouped == grouped[..., :1], axis=-1)


def _normalize(reward, group_size, spread, eps):
  grouped = _grouped(reward, group_size)
  return (_centre(grouped, -1) / (spread(grouped) + eps)).reshape(reward.shape)


def _centre(grouped, axes):
  """Deviations from the mean over `axes`; exactly 0 where all are equal.

  Rounding leaves the mean of equal rewards an ulp off, and a tiny std would blow that up.
  """
  over = lambda f: f(grouped, axis=axes, keepdims=True)
  centred = grouped - over(jnp.mean)
  return jnp.where(over(jnp.min) == over(jnp.max), 0.0, centred)


def _grouped(reward, group_size):
  if group_size < 2:
    raise ValueError(
      f"group_size={group_size}: must be at least 2, an advantage compares samples of one prompt."
    )
  if reward.shape[-1] % group_size:
    raise ValueError(
      f"group_size={group_size}: must divide the {reward.shape[-1]} samples of the batch."
    )
  return reward.reshape(*reward.shape[:-1], -1, group_size)
