"""A report that renews itself whenever its run folders have changed: plain files, no server."""

from collections.abc import Callable, Sequence
import functools
import os
import pathlib
import time
from typing import Any

from etils import epath

from tpgrpo_jax.reporting import history, page
from tpgrpo_jax.runs import metrics

_WATCHED = ("metrics.jsonl", "metrics.jsonl.gz", "images/*", "rollouts/*.npz")


def watch(
  arguments: Sequence[str],
  output: str | os.PathLike[str],
  *,
  every: float,
  say: Callable[[str], Any] = functools.partial(print, flush=True),
  sleep: Callable[[float], Any] = time.sleep,
) -> pathlib.Path:
  """Writes the page now and after each change, until all runs have ended or Ctrl-C.

  An open page loads itself again; the last one that is written does not. Runs without rows are waited for.

  Args:
    arguments: as of `history.load_runs`.
    output: folder of the page.
    every: seconds between two looks.
    say: takes a line each time that the page was written.
    sleep: waits.

  Raises:
    ValueError: as of `history.load_runs`, but for rows that are not there yet.
  """
  last = groups = None
  folders = [_folder_of(argument) for argument in arguments]
  try:
    if not all(map(_has_rows, folders)):
      say("waits for the first evaluation")
    while True:
      found = fingerprint(folders)  # before reading: what comes in between is seen the next time
      if found != last and all(map(_has_rows, folders)):
        groups, last = history.load_runs(arguments), found
        if all(has_ended(run) for runs in groups.values() for run in runs):
          return _write(groups, output, say, "all runs have ended")
        _write(groups, output, say, f"looks again every {every:g} s", refresh=max(every, 1.0))
      sleep(every)
  except KeyboardInterrupt:
    if groups is None:
      raise
    return _write(groups, output, say, "ends")


def _write(groups, output, say, what, refresh=0.0):
  path = page.write_report(groups, output, refresh=refresh)
  epochs = sum(len(run.train) for runs in groups.values() for run in runs)
  say(f"{path}: {epochs} epochs; {what}")
  return path


def _folder_of(argument):
  """Of "dir" or "label=dir"."""
  folder = epath.Path(argument)
  return folder if folder.is_dir() else epath.Path(argument.partition("=")[2] or argument)


def _has_rows(folder):
  """Whether a run can be read; what is no run is left to `load_runs` to name."""
  return not (folder / "config.json").is_file() or bool(metrics.rows_of(folder))


def fingerprint(folders: Sequence[epath.Path]) -> tuple[tuple[str, int, int], ...]:
  """What changes when a run does: names, sizes and times of the files that a report reads."""
  found = []
  for folder in folders:
    for pattern in _WATCHED:
      for path in sorted(folder.glob(pattern)):
        try:
          stat = path.stat()
        except OSError:  # a run removes files
          continue
        found.append((str(path), stat.length, stat.mtime))
  return tuple(found)


def has_ended(run: history.Run) -> bool:
  """Whether a run has written its last row: that of other prompts, or its last evaluation without any."""
  done = max((row.get("epoch", 0) for row in run.train), default=0)
  if run.judged:
    return run.judged.get("epoch", 0) >= done
  finished = run.evals and run.evals[-1].get("epoch") == run.config.train.epochs
  return bool(finished) and not run.config.eval.judge_prompts
