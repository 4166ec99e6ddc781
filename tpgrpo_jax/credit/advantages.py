"""From step rewards to advantages: centred and scaled within the group of one prompt.

B = P K, prompt-major: the K samples of a prompt are neighbours. Rewards are those of all processes.
All of them divide by max(std, floor) + eps. A floor keeps a step with next to no noise, whose rewards
differ by next to nothing, from being lifted to unit variance; 0 is the papers' (none).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

EPS = 1e-4  # Flow-GRPO's; added to the standard deviation
BONUS = 0.1  # ours


def normalize_group(
  reward: jax.Array, group_size: int, *, eps: float = EPS, floor: float = 0.0
) -> jax.Array:
  """A = (r - mean_K r) / (std_K r + eps), per step and prompt, population std (Flow-GRPO, TP-GRPO).

  A group without spread gives 0.

  Args:
    reward: [..., B].
    group_size: K.
    eps: added to the std.
    floor: the least std that is divided by.

  Returns:
    [..., B].

  Raises:
    ValueError: group_size is below 2 or does not divide B.
  """
  grouped = _grouped(reward, group_size)
  return (_centre(grouped, -1) / _divisor(grouped, -1, eps, floor)).reshape(reward.shape)


def normalize_group_joint(
  reward: jax.Array, group_size: int, *, eps: float = EPS, floor: float = 0.0
) -> jax.Array:
  """A = (r - mean) / (std + eps) with both over a prompt's K x W step rewards together.

  As Stepwise-Flow-GRPO normalises increments (arXiv 2603.28718).

  Args:
    reward: [W, B].
    group_size: K.
    eps: added to the std.
    floor: the least std that is divided by.

  Returns:
    [W, B].
  """
  grouped = _grouped(reward, group_size)
  return (_centre(grouped, (0, 2)) / _divisor(grouped, (0, 2), eps, floor)).reshape(reward.shape)


def normalize_global_std(
  reward: jax.Array, group_size: int, *, eps: float = EPS, floor: float = 0.0
) -> jax.Array:
  """A = (r - mean_K r) / (std r + eps), the std per step over all samples of the epoch.

  Args:
    reward: [..., B].
    group_size: K.
    eps: added to the std.
    floor: the least std that is divided by.

  Returns:
    [..., B].
  """
  grouped = _grouped(reward, group_size)
  return (_centre(grouped, -1) / _divisor(grouped, (-2, -1), eps, floor)).reshape(reward.shape)


def normalize_value(
  reward: jax.Array,
  group_size: int,
  *,
  eps: float = EPS,
  floor: float = 0.0,
  bonus: float = BONUS,
) -> jax.Array:
  """A = ((1 + alpha) Q - mean_K Q) / (std_K Q + eps), alpha = bonus std_K Q, per step and prompt.

  VGPO (arXiv 2512.12387) in our reading: its literal formula and the factor of alpha could not be
  checked. Where the std outweighs eps and floor, alpha adds bonus Q to what `normalize_group` gives: a
  value's own size counts, so these advantages neither sum to 0 nor ignore a shift. A group without
  spread gives 0.

  Args:
    reward: [..., B] values Q.
    group_size: K.
    eps: added to the std.
    floor: the least std that is divided by; alpha's own has none.
    bonus: alpha's factor; 0 is `normalize_group`. The default is ours.

  Returns:
    [..., B].
  """
  grouped = _grouped(reward, group_size)
  centred = _centre(grouped, -1)
  alpha = bonus * jnp.std(centred, axis=-1, keepdims=True)  # of exact zeros where all are equal
  advantage = (centred + alpha * grouped) / _divisor(grouped, -1, eps, floor)
  return advantage.reshape(reward.shape)


ADVANTAGES = {
  "group": normalize_group,
  "group_joint": normalize_group_joint,
  "global_std": normalize_global_std,
  "value": normalize_value,
}


def combine_streams(advantages: jax.Array, weights: Sequence[float] | jax.Array) -> jax.Array:
  """A = sum_n weight[n] A[n]: each stream is normalised on its own before they are added.

  A stream is a reward (MixGRPO, arXiv 2507.21802; GDPO, arXiv 2601.05242, which then normalises the
  sum over the batch: left out here) or a stride of the completions' grid (G2RPO, arXiv 2510.01982, all
  weights 1). So no stream's spread drowns another's.

  Args:
    advantages: [N, ..., B].
    weights: [N].

  Returns:
    [..., B].
  """
  # Not a matrix product, whose default precision accelerators lower.
  weighted = [weight * advantage for weight, advantage in zip(weights, advantages, strict=True)]
  return jnp.sum(jnp.stack(weighted), axis=0)


def zero_spread(reward: jax.Array, group_size: int) -> jax.Array:
  """Which groups all have one reward; [..., B] -> [..., P] bool. They teach nothing."""
  grouped = _grouped(reward, group_size)
  return jnp.all(grouped == grouped[..., :1], axis=-1)


def _divisor(grouped, axes, eps, floor):
  return jnp.maximum(jnp.std(grouped, axis=axes, keepdims=True), floor) + eps


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
