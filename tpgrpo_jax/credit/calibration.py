"""How much noise each step bears: levels set once, before training, from increments (NumPy alone)."""

import numpy as np

TOLERANCE = 0.1  # ours
STEP = 0.01


def adjust(
  levels: np.ndarray, increments: np.ndarray, *, step: float = STEP, tolerance: float = TOLERANCE
) -> np.ndarray:
  """One round of DenseGRPO's noise levels (arXiv 2601.20218): psi[k] +- step.

  A step whose increments are as often positive as negative, |#(d > 0) - #(d < 0)| <= tolerance N,
  bears more noise and rises by `step`; any other falls by it, never below `step`. An increment of 0
  counts as neither. The paper asks for a difference below 2, which for an even N is exact balance;
  the relative tolerance is ours.

  Args:
    levels: [W] noise level of each step.
    increments: [W, N] of N trajectories sampled with these levels.
    step: what a level changes by.
    tolerance: difference of the counts that still is balance, as a share of N.

  Returns:
    [W] new levels.
  """
  surplus = np.sign(increments).sum(axis=1)
  balanced = np.abs(surplus) <= tolerance * increments.shape[1]
  return np.where(balanced, levels + step, np.maximum(levels - step, step))
