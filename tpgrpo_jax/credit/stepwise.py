"""Credit by what a step changed: the increments of the completion reward."""

import jax


def increments(completion_reward: jax.Array) -> jax.Array:
  """d[k] = R[k+1] - R[k] (TP-GRPO, arXiv 2602.06422, Eq. 7; DenseGRPO, arXiv 2601.20218).

  Args:
    completion_reward: [W+1, B], or [W+1] of one trajectory.

  Returns:
    [W, B] or [W]; sums over the steps to R[W] - R[0].
  """
  return completion_reward[1:] - completion_reward[:-1]
