"""Credit by the value of a state: rewards of one-step images summed over the steps to come.

VGPO (arXiv 2512.12387) in our reading: its literal formula, gamma and alpha's factor could not be
checked. The advantage that goes with it is advantages.normalize_value.
"""

import jax
import jax.numpy as jnp

from tpgrpo_jax.types import StepCredit

GAMMA = 0.9  # ours: a horizon of 1 / (1 - gamma) = 10 steps, about a window
_ROUNDING = 1e-6  # a mean this small beside its terms is what float32 leaves of 0


def values(reward: jax.Array, *, gamma: float) -> jax.Array:
  """Q[k] = sum_{j >= k} gamma^(j - k) R[j], that is Q[k] = R[k] + gamma Q[k+1].

  Args:
    reward: [W, B] rewards of the one-step images after each step.
    gamma: discount of a step; 0 leaves R, 1 sums all that is to come.

  Returns:
    [W, B].
  """

  def earlier(later, now):
    value = now + gamma * later
    return value, value

  return jax.lax.scan(earlier, jnp.zeros_like(reward[0]), reward, reverse=True)[1]


def shares(value: jax.Array) -> jax.Array:
  """omega[k] = Q[k] / mean_k Q, per sample; mean 1 over k, and 1 throughout where mean_k Q is 0.

  Meant for rewards of one sign. With both, a mean near 0 makes large shares of either sign; a mean
  that is 0 up to float32's rounding counts as 0.

  Args:
    value: [W, B].

  Returns:
    [W, B].
  """
  mean = jnp.mean(value, axis=0)
  zero = jnp.abs(mean) <= _ROUNDING * jnp.mean(jnp.abs(value), axis=0)
  return jnp.where(zero, 1.0, value / jnp.where(zero, 1.0, mean))


def vgpo(completion_reward: jax.Array, *, gamma: float = GAMMA) -> StepCredit:
  """Q of the one-step images, and omega as the steps' share (VGPO, arXiv 2512.12387, our reading).

  R[j] of `values` is the reward of the image after step j, completion_reward[j+1].

  Args:
    completion_reward: [W+1, B] of one-step completions; that of the first state is not read.
    gamma: discount of a step; the default is ours.

  Returns:
    Reward and share [W, B], no turning points.
  """
  value = values(completion_reward[1:], gamma=gamma)
  return StepCredit(value, jnp.zeros(value.shape, bool), shares(value))
