"""Which prompts an epoch draws, and which of them a process handles: pure index arithmetic.

The prompts come from an endless stream, one seeded permutation of the dataset after the other;
epoch e is the e-th run of `prompts_per_epoch` entries. Nothing needs to be stored to resume.
"""

from jaxtyping import Int64
import numpy as np


def epoch_indices(
  epoch: int,
  *,
  seed: int,
  dataset_size: int,
  prompts_per_epoch: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Int64[np.ndarray, "prompts"]:
  """The indices of the prompts that one process draws in an epoch.

  A pass visits every prompt once. Where an epoch spans the end of a pass, a prompt of both passes
  comes up twice and makes two groups. The share of process i is the i-th contiguous run.

  Args:
    epoch: counted from 0.
    seed: of the permutations; every process must pass the same.
    dataset_size: how many prompts there are.
    prompts_per_epoch: P, of all processes together.
    process_index: this process.
    process_count: how many processes there are.

  Returns:
    [P / process_count].

  Raises:
    ValueError: a size below 1, a negative epoch or seed, P that the processes cannot share
      equally, or a process_index outside 0 ... process_count - 1.
  """
  _check_positive(dataset_size=dataset_size, prompts_per_epoch=prompts_per_epoch)
  _check_positive(process_count=process_count)
  for field, value in (("epoch", epoch), ("seed", seed)):
    if value < 0:
      raise ValueError(f"{field}={value}: must be >= 0. Count from 0.")
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index}: must be in 0 ... {process_count - 1} for "
      f"process_count={process_count}. Pass jax.process_index()."
    )
  if prompts_per_epoch % process_count:
    raise ValueError(
      f"train.prompts_per_epoch={prompts_per_epoch}: must be a multiple of the number of "
      f"processes, {process_count}. "
      f"Set it to {-(-prompts_per_epoch // process_count) * process_count}."
    )
  share = prompts_per_epoch // process_count
  start = epoch * prompts_per_epoch + process_index * share
  return _stream(start, start + share, seed=seed, dataset_size=dataset_size)


def repeat_groups(
  indices: Int64[np.ndarray, "prompts"], group_size: int
) -> Int64[np.ndarray, "samples"]:
  """Repeats every index K times, prompt-major: [p0] * K, [p1] * K, ...

  Args:
    indices: [P].
    group_size: K.

  Returns:
    [P K]; reshaped to [P, K], a row is a group.

  Raises:
    ValueError: group_size below 1.
  """
  _check_positive(group_size=group_size)
  return np.repeat(indices, group_size)


def _stream(start, stop, *, seed, dataset_size):
  """Entries start ... stop - 1 of the concatenated permutations."""
  first, last = start // dataset_size, (stop - 1) // dataset_size
  passes = [
    np.random.default_rng((seed, number)).permutation(dataset_size)
    for number in range(first, last + 1)
  ]
  offset = first * dataset_size
  return np.concatenate(passes)[start - offset : stop - offset]


def _check_positive(**sizes):
  for field, value in sizes.items():
    if value < 1:
      raise ValueError(f"{field}={value}: must be >= 1. Set it to 1 or more.")
