"""Where the old log-probs of an update come from: the rollout, or the update's own program.

Rollout and update evaluate the same function, but XLA compiles it in two programs, and may round it
differently in the two. A log-ratio of rounding errors that is not far below loss.clip_range makes
clipping act on noise. So each epoch's first update, whose weights are still the rollout's, is measured:
its log-ratio must be 0. Where it is above LIMIT x loss.clip_range nothing of it is kept, and from there
on old log-probs come from the update's own program, where they are equal by construction.
"""

import json
import os
from typing import Any

from etils import epath
import numpy as np
import tqdm

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import processes, run_folder
from tpgrpo_jax.training import losses

FILE = "old_log_prob.json"
LIMIT = 0.1  # of loss.clip_range


class OldScores:
  """The choice of loss.old_log_prob; with "auto" it changes at most once in a run.

  Attributes:
    config: of the run.
    since: the first epoch, from 0, whose old log-probs are the update's own; None for none so far.
    measured: the log-ratio that has changed the choice, or None.
  """

  def __init__(self, config: config_lib.Config):
    self.config = config
    has_ratio = losses.OBJECTIVES[config.loss.objective].has_ratio
    self._asked = config.loss.old_log_prob if has_ratio else "rollout"
    self.since = 0 if self._asked == "update" else None
    self.measured: float | None = None

  def are_own(self, epoch: int) -> bool:
    """Whether the update's own program gives the old log-probs of an epoch."""
    return self.since is not None and epoch >= self.since

  @property
  def limit(self) -> np.float32 | None:
    """Above which the log-ratio of an epoch's first update changes the choice; None where nothing can."""
    limit = np.float32(LIMIT * self.config.loss.clip_range)
    return limit if self._asked == "auto" else None

  def change(self, epoch: int, log_ratio: float) -> None:
    """From this epoch on they are the update's own; says so."""
    self.since, self.measured = epoch, log_ratio
    if processes.is_first():
      tqdm.tqdm.write(
        f"{self.config.run.dir}: epoch {epoch + 1}: rollout and update differ by {log_ratio:.2g} in the "
        f"log-ratio, and loss.clip_range is {self.config.loss.clip_range:.2g}. From here on old log-probs "
        "come from the update's own program, at a forward pass for each update after an epoch's first "
        "(loss.old_log_prob='auto')."
      )

  def load(self, run_dir: os.PathLike | str) -> None:
    """Takes up the choice of a run folder, where it holds one of this config."""
    self.__init__(self.config)
    path = epath.Path(run_dir) / FILE
    is_there = processes.is_first() and self._asked == "auto" and path.exists()
    stored: dict[str, Any] = processes.from_first(json.loads(path.read_text()) if is_there else {})
    # Before the first checkpoint a folder binds nobody, and another config may have left its choice there.
    if stored.get("config") == run_folder.fingerprint(self.config):
      self.since, self.measured = stored["since_epoch"], stored["max_abs_log_ratio"]

  def save(self, run_dir: os.PathLike | str) -> None:
    """Keeps in the run folder what was measured; nothing where the choice was never changed."""
    if self.measured is None or not processes.is_first():
      return
    content = {
      "config": run_folder.fingerprint(self.config),
      "since_epoch": self.since,
      "max_abs_log_ratio": self.measured,
    }
    path = epath.Path(run_dir) / FILE
    text = json.dumps(content, indent=1) + "\n"
    if not path.exists() or path.read_text() != text:
      run_folder.write(path, text.encode())
