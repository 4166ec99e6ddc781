"""The weights of a run's best evaluation, below `best/<epoch>/` of its folder.

Those that were chosen by another rule, or belong to an earlier run in the folder, are kept beside it, as
`best_before_1/` and so on. Renamed to `best/`, they are what `--weights best` opens.
"""

from collections.abc import Mapping
import itertools
import json
import os
from typing import Any
import warnings

from etils import epath

from tpgrpo_jax.runs import checkpoint, processes, run_folder

FOLDER = "best"


class BestWeights:
  """Keeps the best weights that were offered: opened once, closed at the end.

  Every process must make the same calls in the same order.

  Attributes:
    epoch: of the best evaluation so far, or None.
    score: of it, or None.
  """

  def __init__(
    self,
    run_dir: os.PathLike | str,
    metric: str,
    *,
    start: bool,
    kind: Mapping[str, Any] | None = None,
  ):
    """Opens the folder.

    Args:
      run_dir: the run's folder, local or gs://.
      metric: of the evaluations; the larger the better. "" keeps nothing.
      start: the run begins, so that what is there belongs to another one, and is put aside.
      kind: what evaluations must share so that their scores can be compared; as JSON has it.
    """
    self._metric, self._kept = metric, None
    self._kind = json.loads(json.dumps(kind or {}))
    self.epoch: int | None = None
    self.score: float | None = None
    if not metric:
      return
    found = _extra(run_dir)
    same = found.get("metric") == metric and found.get("kind", self._kind) == self._kind
    if same and not start:
      self.epoch, self.score = found["step"], found["score"]
    else:  # scores of another metric or kind cannot be compared
      aside = _put_aside(run_dir, found)
      if found and not start:
        warnings.warn(
          f"{os.fspath(run_dir)}: its best weights (after epoch {found['step']}) were chosen by another "
          "checkpoint.best or eval; they are chosen anew."
          f"{f' The old ones are kept: {aside}.' * bool(aside)}",
          stacklevel=2,
        )
    self._kept = checkpoint.RunCheckpoints(run_dir, keep=1, folder=FOLDER)

  def offer(self, epoch: int, weights: Any, row: Mapping[str, float]) -> bool:
    """Keeps the weights if they are better than all before; they are on disk when it returns.

    Args:
      epoch: finished ones.
      weights: pytree of jax arrays.
      row: metric name -> number, the same on every process.

    Returns:
      Whether they are.

    Raises:
      RuntimeError: they cannot be written.
    """
    if not self._kept:
      return False
    score = row[self._metric]
    # Of a run that was cut, later ones than this may be there; they come again.
    if self.epoch is not None and self.score is not None:
      if score <= self.score or epoch <= self.epoch:
        return False
    extra = {"metric": self._metric, "score": score, "kind": self._kind}
    self._kept.save(epoch, {"weights": weights}, extra, force=True)
    self._kept.wait()
    self.epoch, self.score = epoch, score
    return True

  def has_stalled(self, epoch: int, *, every: int, patience: int) -> bool:
    """Whether `patience` evaluations, one every `every` epochs, have passed since the best one."""
    return bool(patience) and self.epoch is not None and epoch - self.epoch >= patience * every

  def close(self) -> None:
    """Ends the background threads."""
    if self._kept:
      self._kept.close()


def load(run_dir: os.PathLike | str, abstract: Any) -> tuple[Any, dict[str, Any]]:
  """(weights, {"step": epoch, "metric", "score"}); writes nothing.

  Args:
    run_dir: the run's folder.
    abstract: as of `RunCheckpoints.restore`, of the weights.

  Raises:
    ValueError: there are none, or none that can be read.
  """
  with checkpoint.RunCheckpoints(run_dir, folder=FOLDER, read_only=True) as kept:
    if kept.latest() is None:
      raise ValueError(f"{os.fspath(run_dir)}: has no best weights yet.")
    state, extra = kept.restore({"weights": abstract})
  return state["weights"], extra


def _put_aside(run_dir, extra):
  """Renames the folder of best weights and returns its new name; "" where nothing is lost without it."""

  def rename():
    folder = epath.Path(run_dir) / FOLDER
    if extra.get("step") == 0 or not (folder.exists() and any(folder.iterdir())):
      run_folder.remove(run_dir, FOLDER)  # nothing, or the weights that a run begins with
      return ""
    names = (f"{FOLDER}_before_{number}" for number in itertools.count(1))
    name = next(name for name in names if not (folder.parent / name).exists())
    folder.rename(folder.parent / name)
    return name

  return processes.from_first(rename() if processes.is_first() else "")


def _extra(run_dir):
  """What is known of the stored weights; {} where there are none that can be read."""
  try:
    with checkpoint.RunCheckpoints(run_dir, folder=FOLDER, read_only=True) as kept:
      return {} if kept.latest() is None else kept.extra()
  except ValueError:  # there is no such folder
    return {}
  except checkpoint.UnreadableError as error:
    warnings.warn(f"{os.fspath(run_dir)}: its best weights cannot be read: {error}", stacklevel=3)
    return {}
