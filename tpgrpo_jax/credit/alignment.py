"""The terminal reward, shared out by how far each step brought the latent towards the finished one.

After CoCA (arXiv 2505.19196) and OTCA (arXiv 2604.19234), which need no completions. This form is
ours: CoCA's public code (Lil-Shake/CoCA @ 6c9f585) compares the one-step predictions, averages them
over windows of 5 steps or so, leaves the gains their sign, and pays a step the sum of the shares from
it on.
"""

import jax
import jax.numpy as jnp

from tpgrpo_jax.credit import outcome, stepwise
from tpgrpo_jax.types import StepCredit

EPS = 1e-3  # ours: a hundredth of the mean gain of ten steps from cosine 0 to 1


def shares(alignment: jax.Array, *, eps: float) -> jax.Array:
  """w[k] ~ max(c[k+1] - c[k], 0) + eps, scaled to mean 1 over k; 1 throughout where all are 0.

  Args:
    alignment: [W+1, B] cosine c[k] of the latent after k steps and the finished one.
    eps: what a step without gain is given; 0 gives it nothing.

  Returns:
    [W, B].
  """
  gain = jnp.maximum(stepwise.increments(alignment), 0.0) + eps
  mean = jnp.mean(gain, axis=0)
  return jnp.where(mean > 0, gain / jnp.where(mean > 0, mean, 1.0), 1.0)


def coca(completion_reward: jax.Array, *, alignment: jax.Array, eps: float = EPS) -> StepCredit:
  """R[W] at every step, its advantage times w[k] (after CoCA and OTCA).

  Args:
    completion_reward: [W+1, B]; only R[W] is read.
    alignment: [W+1, B] cosine of the latent after k steps and the finished one.
    eps: what a step without gain is given; the default is ours.

  Returns:
    Reward and share [W, B], no turning points.
  """
  reward = outcome.terminal(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool), shares(alignment, eps=eps))
