"""What is measured in an epoch, and where the rows go."""

from collections.abc import Iterable, Mapping, Sequence
import gzip
import json
import math
import os
from typing import Any
import warnings
import zlib

from etils import epath
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit as credit_lib
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.runs import boards, processes, run_folder


def epoch_metrics(rollout, credit, advantage, group_size: int) -> dict[str, float]:
  """Rewards, credit and images of one epoch, as numbers by name.

  Args:
    rollout: training.rollout.Rollout.
    credit: StepCredit of NumPy arrays.
    advantage: [W, B].
    group_size: samples that are compared: K, or the members of a state.
  """
  along = rollout.completion_reward[0]  # with strides: of the first
  final = along[rollout.compared]
  row = {"reward/mean": final.mean(), "reward/std": final.std()}
  for label, reward in rollout.rewards.items():
    own = reward[0, rollout.compared]
    row |= {f"reward/{label}/mean": own.mean(), f"reward/{label}/std": own.std()}
  row["group/reward_std"] = final.reshape(-1, group_size).std(axis=1).mean()
  row["group/zero_spread"] = np.mean(advantages.zero_spread(jnp.asarray(final), group_size))
  row["advantage/std"] = advantage.std()
  for k, share in enumerate(np.asarray(credit.is_turning_point).mean(axis=1)):
    row[f"turning_point/{k}"] = share
  row["turning_point/mean"] = np.asarray(credit.is_turning_point).mean()
  for k, value in enumerate(along.mean(axis=1)):
    row[f"completion_reward/{k}"] = value
  for k, value in enumerate(rollout.gains.mean(axis=1)):
    row[f"increment/{k}"] = value
  if len(rollout.statistics):
    row |= image_statistics(rollout.statistics)
  # Without completions or states R[0] ... R[W-1] do not exist: no row rather than NaN.
  return {name: float(value) for name, value in row.items() if np.isfinite(value)}


def found_turning_points(method: str, completion_reward: np.ndarray) -> dict[str, float]:
  """turning_point_found/k: share of samples with a turning point at step k, before any balancing.

  Args:
    method: credit.method; {} for one that looks for no turning points.
    completion_reward: [W+1, B].
  """
  found = credit_lib.find_turning_points(method, jnp.asarray(completion_reward))
  if found is None:
    return {}
  return {
    f"turning_point_found/{k}": float(share)
    for k, share in enumerate(np.asarray(found).mean(axis=1))
  }


def variance_shares(
  rewards: dict[str, np.ndarray], weights: dict[str, float], group_size: int, *, per_reward: bool
) -> dict[str, float]:
  """reward/<label>/share: each reward's own part of the advantage's variance within groups; they sum to 1.

  cov(w c, total) / var(total), with c the reward less its group's mean (divided by its group's spread where
  each is normalised for itself) and total the sum of all w c. One that goes against the others has a negative
  share. {} for a single reward, or where nothing varies.

  Args:
    rewards: label -> [B] scores of the finished images, the members of a group side by side.
    weights: label -> weight.
    group_size: samples that are compared.
    per_reward: as config.Advantage.per_reward.
  """
  parts = {}
  for label, values in rewards.items():
    groups = np.asarray(values, np.float64).reshape(-1, group_size)
    groups = groups - groups.mean(axis=1, keepdims=True)
    if per_reward:
      spread = groups.std(axis=1, keepdims=True)
      groups = np.divide(groups, spread, out=np.zeros_like(groups), where=spread > 0)
    parts[label] = weights[label] * groups
  total = sum(parts.values())
  variance = np.mean(np.square(total))
  if len(parts) < 2 or not variance:
    return {}
  return {
    f"reward/{label}/share": float(np.mean(part * total) / variance)
    for label, part in parts.items()
  }


IMAGE_STATISTICS = ("image/mean", "image/contrast", "image/edge_density")


def statistics_of_each(images: np.ndarray) -> np.ndarray:
  """Mean, contrast (std over pixels) and edge density of images uint8 [N, H, W, 3]; float32 [N, 3].

  In 0 ... 1. Edge density is the share of pixels whose brightness differs by over 0.1 from a right or
  lower neighbour's.
  """
  gray = images.astype(np.float32).mean(axis=-1) / 255.0
  right = np.abs(np.diff(gray, axis=2))[:, :-1]
  down = np.abs(np.diff(gray, axis=1))[:, :, :-1]
  edges = (np.maximum(right, down) > 0.1).mean(axis=(1, 2))
  columns = (gray.mean(axis=(1, 2)), gray.std(axis=(1, 2)), edges)
  return np.stack(columns, axis=1).astype(np.float32)


def image_statistics(each: np.ndarray) -> dict[str, float]:
  """The means over images of `statistics_of_each`, by name.

  They do not depend on the reward: when they drift while the reward rises, look at the images.
  """
  return dict(zip(IMAGE_STATISTICS, map(float, each.mean(axis=0))))


class MetricsLog:
  """Rows of metrics.jsonl in the run folder, copied to TensorBoard and Weights & Biases on request.

  Of several processes the first one writes; in the others nothing happens.
  """

  def __init__(
    self, run_dir: str | os.PathLike[str], log: config_lib.Log, config: Any, *, next_epoch: int = 0
  ):
    """Opens the boards.

    Args:
      run_dir: the run's folder.
      log: which boards.
      config: of the run, as a dict; for boards that show it.
      next_epoch: the first one whose rows are still to come.

    Raises:
      ValueError: a board that is not installed, or that refuses.
    """
    self._path, self._boards = None, []
    if not processes.is_first():
      return
    self._path = epath.Path(run_dir) / "metrics.jsonl"
    if log.wandb:
      self._boards.append(boards.WandB(run_dir, log, config, next_epoch))
    if log.tensorboard:
      self._boards.append(boards.TensorBoard(run_dir, next_epoch))

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
    self.close(failed=kind is not None)

  def write(self, row: dict[str, Any]) -> None:
    """Appends one row {"epoch", "kind", name: number}."""
    if not self._path:
      return
    rounded = {k: v if isinstance(v, (int, str)) else _number(v) for k, v in row.items()}
    run_folder.append(self._path, f"{json.dumps(rounded)}\n".encode())
    is_number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)
    numbers = {f"{row['kind']}/{k}": v for k, v in rounded.items() if k != "epoch" and is_number(v)}
    for board in self._boards:
      board.write(numbers, row["epoch"])

  def pictures(
    self, name: str, sheet: np.ndarray, images: np.ndarray, captions: Sequence[str], epoch: int
  ) -> None:
    """Shows pictures where they can be shown.

    Args:
      name: of them all.
      sheet: uint8 [H', W', 3] with all of them.
      images: uint8 [N, H, W, 3].
      captions: N lines.
      epoch: finished ones.
    """
    for board in self._boards:
      board.pictures(name, sheet, images, captions, epoch)

  def close(self, *, failed: bool = False) -> None:
    """Flushes and closes all boards."""
    for board in self._boards:
      board.close(failed)


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl, or of a metrics.jsonl.gz.

  A half-written last line is left out without a word; other lines that are no rows with a warning.
  """
  content = epath.Path(path).read_bytes()
  if os.fspath(path).endswith(".gz"):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{os.fspath(path)}: is damaged ({error}). Copy it anew.") from error
  rows, damaged = [], []
  lines = [line for line in content.split(b"\n") if line.strip()]
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError:  # half a character too
      row = None
    if isinstance(row, dict) and isinstance(row.get("epoch", 0), int):
      rows.append(row)
    elif number < len(lines):
      damaged.append(number)
  if damaged:
    warnings.warn(
      f"{os.fspath(path)}: rows {damaged} cannot be read; they are left out.", stacklevel=2
    )
  return rows


def rows_of(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The rows of a run folder, packed (`pack`) or not; [] where there are none yet."""
  for name in ("metrics.jsonl", "metrics.jsonl.gz"):
    path = epath.Path(run_dir) / name
    if path.is_file():
      return read_rows(path)
  return []


def comparable(rows: Iterable[dict[str, Any]], to: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Those evaluations whose scores can be compared with another's: of as many prompts, steps and rewards.

  `eval` may change when a run goes on. Rows of older versions do not say how many prompts and steps they had;
  they are taken to have had as many.

  Args:
    rows: of evaluations.
    to: the other evaluation.
  """
  rewards_of = lambda row: {k for k in row if k.startswith("reward/") and k.endswith("/mean")}

  def fits(row):
    same = all(row.get(k, to.get(k)) == to.get(k, row.get(k)) for k in ("prompts", "num_steps"))
    return same and rewards_of(row) == rewards_of(to)

  return [row for row in rows if fits(row)]


def pack(run_dir: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
  """Keeps what a report needs of a run, in a few kilobytes: its config and its compressed metrics.

  The same run gives the same bytes, wherever it lies, packed or not: of run.dir the name alone is kept.
  """
  run_dir, output = epath.Path(run_dir), epath.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  config = json.loads((run_dir / "config.json").read_text())
  config["run"]["dir"] = run_dir.name
  (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  rows, packed = run_dir / "metrics.jsonl", run_dir / "metrics.jsonl.gz"
  content = gzip.compress(rows.read_bytes(), mtime=0) if rows.is_file() else packed.read_bytes()
  (output / "metrics.jsonl.gz").write_bytes(content)


def _number(value):
  value = float(value)
  return value if math.isfinite(value) else str(value)
