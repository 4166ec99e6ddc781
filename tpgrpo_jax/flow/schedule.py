"""Noise-level grids and stochastic windows; plain NumPy, computed before anything is traced."""

from typing import Any

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


def flux_sigmas(
  num_steps: int,
  image_tokens: int,
  *,
  base_shift: float = 0.5,
  max_shift: float = 1.15,
  base_tokens: int = 256,
  max_tokens: int = 4096,
) -> np.ndarray:
  """The grid of FLUX.1-dev: more of the steps at high noise, the larger the image.

  exp(mu) / (exp(mu) + 1 / sigma - 1) of the even grid 1, 1 - 1/T, ..., 1/T, with mu on the line through
  (base_tokens, base_shift) and (max_tokens, max_shift); as diffusers' FluxPipeline gives it to
  FlowMatchEulerDiscreteScheduler with its exponential time shift. That is `shift_sigmas` by exp(mu).
  FLUX.1-schnell has no dynamic shift, and a shift of 1: its grid is `linear_sigmas`.

  Args:
    num_steps: T.
    image_tokens: of one image: latent height x width / 4.
    base_shift: mu at base_tokens.
    max_shift: mu at max_tokens.
    base_tokens: those of 256 x 256 pixels.
    max_tokens: those of 1024 x 1024 pixels.

  Returns:
    [T + 1] float64, from 1 to 0.
  """
  mu = dynamic_mu(
    image_tokens,
    base_shift=base_shift,
    max_shift=max_shift,
    base_tokens=base_tokens,
    max_tokens=max_tokens,
  )
  return shift_sigmas(linear_sigmas(num_steps), np.exp(mu))


def dynamic_mu(
  image_tokens: int,
  *,
  base_shift: float = 0.5,
  max_shift: float = 1.15,
  base_tokens: int = 256,
  max_tokens: int = 4096,
) -> float:
  """log of a shift that grows with the image: on the line through two points, as `flux_sigmas` has them."""
  slope = (max_shift - base_shift) / (max_tokens - base_tokens)
  return base_shift + slope * (image_tokens - base_tokens)


def sd3_dynamic_sigmas(
  num_steps: int, image_tokens: int, *, train_steps: int = 1000, **line: Any
) -> np.ndarray:
  """The grid of diffusers' SD3 pipeline with use_dynamic_shifting: 1 ... 1/train_steps, shifted once.

  By exp(`dynamic_mu`); FLUX.1's pipeline begins with another even grid, which ends at 1/T.

  Args:
    num_steps: T.
    image_tokens: of one image.
    train_steps: the scheduler's num_train_timesteps.
    line: as of `dynamic_mu`.

  Returns:
    [T + 1] float64, from 1 to 0.
  """
  even = np.linspace(1.0, 1.0 / train_steps, num_steps)
  return np.append(shift_sigmas(even, np.exp(dynamic_mu(image_tokens, **line))), 0.0)


def stretch_to_terminal(sigmas: np.ndarray, terminal: float) -> np.ndarray:
  """The grid whose last level above 0 is `terminal`: 1 - sigma is stretched (diffusers' shift_terminal)."""
  noise = 1.0 - sigmas[:-1]
  return np.append(1.0 - noise * (1.0 - terminal) / noise[-1], 0.0)


def flux2_mu(num_steps: int, image_tokens: int) -> float:
  """log of FLUX.2's shift, fitted by its authors to steps and image size, as diffusers' compute_empirical_mu.

  Two lines in the tokens, of 10 and of 200 steps, and in between the line through both; above 4300 tokens
  the line of 200 steps whatever the steps.

  Args:
    num_steps: T.
    image_tokens: of one image; a token is 16 x 16 pixels.
  """
  at_200 = 0.00016927 * image_tokens + 0.45666666
  if image_tokens > 4300:
    return at_200
  at_10 = 8.73809524e-05 * image_tokens + 1.89833333
  return at_200 + (at_200 - at_10) / 190 * (num_steps - 200)


def flux2_sigmas(num_steps: int, image_tokens: int) -> np.ndarray:
  """The grid of FLUX.2: the even one shifted by exp(`flux2_mu`), as `flux_sigmas` is by its own.

  Args:
    num_steps: T.
    image_tokens: of one image.

  Returns:
    [T + 1] float64, from 1 to 0.
  """
  return shift_sigmas(linear_sigmas(num_steps), np.exp(flux2_mu(num_steps, image_tokens)))


# name -> function of (num_steps, shift, image_tokens, **line), the last as of `dynamic_mu`
SCHEDULES = {
  "linear": lambda num_steps, shift, tokens, **line: linear_sigmas(num_steps),
  "sd3": lambda num_steps, shift, tokens, **line: sd3_sigmas(num_steps, shift=shift),
  "sd3_dynamic": lambda num_steps, shift, tokens, **line: sd3_dynamic_sigmas(
    num_steps, tokens, **line
  ),
  "shifted": lambda num_steps, shift, tokens, **line: shift_sigmas(linear_sigmas(num_steps), shift),
  "flux": lambda num_steps, shift, tokens, **line: flux_sigmas(num_steps, tokens, **line),
  "flux2": lambda num_steps, shift, tokens, **line: flux2_sigmas(num_steps, tokens),
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


def progressive_window(
  epoch: int, *, window: tuple[int, int], num_steps: int, every: int
) -> tuple[int, int]:
  """The window of one epoch where it moves: its start grows by 1 every `every` epochs, then begins again.

  MixGRPO (arXiv 2507.21802). Its code cuts the last windows short until nothing is left of them; here the
  last one is the last that is whole.

  Args:
    epoch: from 0.
    window: (start, end) of the first epoch, half open.
    num_steps: T, or T - 1 where the last step has no noise: no window goes further.
    every: epochs that a window stays.
  """
  places = num_steps - window[1] + 1
  shift = epoch // every % places
  return window[0] + shift, window[1] + shift


def draw_steps(rng: np.random.Generator, window: tuple[int, int], count: int) -> np.ndarray:
  """`count` of the window's steps, ascending; all of them where count is 0.

  Args:
    rng: of this epoch.
    window: (start, end), half open.
    count: how many.
  """
  steps = np.arange(*window)
  return np.sort(rng.choice(steps, count, replace=False)) if count else steps


def permuted_levels(
  rng: np.random.Generator, sigmas: np.ndarray, window: tuple[int, int], count: int, batch: int
) -> np.ndarray:
  """For each sample, `count` of the window's levels in random order (DiffusionNFT, arXiv 2509.16117).

  Args:
    rng: of this batch.
    sigmas: [T + 1].
    window: (start, end), half open.
    count: how many.
    batch: B.

  Returns:
    [count, B] float32.
  """
  levels = np.asarray(sigmas, np.float32)[slice(*window)]
  return rng.permuted(np.tile(levels, (batch, 1)), axis=1)[:, :count].T


def stratified_levels(
  rng: np.random.Generator, sigmas: np.ndarray, window: tuple[int, int], count: int, batch: int
) -> np.ndarray:
  """One level of each of `count` even parts of the window, for all samples (AWM, arXiv 2509.25050).

  Args:
    rng: of this batch.
    sigmas: [T + 1].
    window: (start, end), half open.
    count: how many; at most the window's length.
    batch: B.

  Returns:
    [count, B] float32.
  """
  bounds = np.floor(np.linspace(*window, count + 1)).astype(int)
  levels = np.asarray(sigmas, np.float32)[rng.integers(bounds[:-1], bounds[1:])]
  return np.repeat(levels[:, None], batch, axis=1)


LEVEL_DRAWS = {"permuted": permuted_levels, "stratified": stratified_levels}
