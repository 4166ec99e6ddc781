"""Credit on shared-state branches: each member left the anchor's trajectory at one step.

There R[0] is the reward of the anchor's own image, repeated for its members, and R[k+1] that of the
member that left at step k and was completed from there. No other step differs, so it is step k's alone.
"""

import jax


def member(completion_reward: jax.Array) -> jax.Array:
  """R[k+1], the member's own reward (TempFlow-GRPO, arXiv 2508.04324; G2RPO, arXiv 2510.01982).

  Args:
    completion_reward: [W+1, B]; R[0] is not read.

  Returns:
    [W, B].
  """
  return completion_reward[1:]


def gain(completion_reward: jax.Array) -> jax.Array:
  """R[k+1] - R[0], what the member's step changed; the anchor's image is the baseline (ours).

  Normalised within the members of one anchor this equals `member`, for the baseline is theirs
  in common; it differs where a group holds several anchors.

  Args:
    completion_reward: [W+1, B].

  Returns:
    [W, B].
  """
  return completion_reward[1:] - completion_reward[:1]
