"""Credit by the outcome alone: every step is given the reward of the finished image."""

import jax
import jax.numpy as jnp


def terminal(completion_reward: jax.Array) -> jax.Array:
  """R[W] at every step (Flow-GRPO, arXiv 2505.05470).

  Args:
    completion_reward: [W+1, B] rewards R[k] of the completion of the state after k steps; only
      R[W], the trajectory's own image, is read.

  Returns:
    [W, B].
  """
  return jnp.broadcast_to(
    completion_reward[-1], (len(completion_reward) - 1, *completion_reward.shape[1:])
  )
