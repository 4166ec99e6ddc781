"""Noise-level grids and stochastic windows; plain NumPy, computed before anything is traced."""

import numpy as np


def linear_sigmas(num_steps: int) -> np.ndarray:
  """1, 1 - 1/T, ..., 0.

  Args:
    num_steps: T.

  Returns:
    [T + 1] float64, decreasing.
  """
  return np.linspace(1.0, 0.0, num_steps + 1)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
  """shift sigma / (1 + (shift - 1) sigma), the resolution shift of SD3 (arXiv 2403.03206, Eq. 23)."""
  return shift * sigmas / (1 + (shift - 1) * sigmas)


def sd3_sigmas(num_steps: int, *, shift: float = 3.0, train_steps: int = 1000) -> np.ndarray:
  """The grid of diffusers' FlowMatchEulerDiscreteScheduler, which shifts twice.

  Its constructor shifts the training grid 1 ... 1/train_steps; set_timesteps spaces T values evenly
  between the ends of THAT and shifts them again. SD3 was released, and is sampled, with this.

  Args:
    num_steps: T.
    shift: the scheduler's own.
    train_steps: its num_train_timesteps.

  Returns:
    [T + 1] float64, from 1 to 0.
  """
  last = shift_sigmas(np.array([1.0 / train_steps]), shift)[0]
  return np.append(shift_sigmas(np.linspace(1.0, last, num_steps), shift), 0.0)


SCHEDULES = {
  "linear": lambda num_steps, shift: linear_sigmas(num_steps),
  "sd3": lambda num_steps, shift: sd3_sigmas(num_steps, shift=shift),
}


def draw_window(
  rng: np.random.Generator, window: tuple[int, int], window_range: tuple[int, ...]
) -> tuple[int, int]:
  """The window of one epoch: fixed, or shifted to a start drawn evenly from the range.

  Args:
    rng: of this epoch.
    window: (start, end), half open.
    window_range: () for a fixed window, or (lo, hi) that the drawn one must lie in.
  """
  if not window_range:
    return window
  length = window[1] - window[0]
  low, high = window_range
  start = int(rng.integers(low, high - length + 1))
  return start, start + length
