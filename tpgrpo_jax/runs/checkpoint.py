"""The state of a run on disk (orbax), below `checkpoints/<step>/` of its folder; `best` has another folder.

A step here is the number of finished epochs, so a run restored from step n goes on with epoch n.
"""

from collections.abc import Mapping
import contextlib
import logging
import os
import tempfile
import time
from typing import Any
import warnings

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from tpgrpo_jax.runs import run_folder

FORMAT = 1
"""Of what a checkpoint holds; raise it when older code could not read a new one."""

_STATE = "state"
_MAX_DIFFERENCES = 12


class UnreadableError(Exception):
  """One checkpoint cannot be read back; the one before it may."""


class RunCheckpoints:
  """The checkpoints of one run: opened once, written in the background, closed at the end.

  Every process must make the same calls in the same order. A `save` that failed in the background
  (disk full) raises in the next call of `save`, `wait` or `close`.
  """

  def __init__(
    self,
    run_dir: os.PathLike | str,
    *,
    keep: int = 2,
    every: int = 1,
    keep_every: int = 0,
    read_only: bool = False,
    folder: str = "checkpoints",
  ):
    """Opens `<run_dir>/<folder>`.

    Args:
      run_dir: the run's folder, local or gs://.
      keep: how many of the newest checkpoints stay on disk.
      every: `save` acts on steps that are a multiple of this, and when the machine announces that
        it will be taken away (jax's preemption service).
      keep_every: steps that are a multiple of this stay for ever; 0 for none.
      read_only: for commands that look at a run, perhaps while it trains: creates, deletes and
        renames nothing.
      folder: within the run's.

    Raises:
      ValueError: keep or every is not positive; read_only and there is no such folder, or not read_only and
        it cannot be written to.
    """
    if keep < 1 or every < 1:
      raise ValueError(f"checkpoint.keep={keep}, checkpoint.every={every}: both must be >= 1.")
    logging.getLogger("absl").addFilter(_without_orbax_chatter)
    self._folder = _absolute(run_dir) / folder
    self._read_only = read_only
    self._pending, self._failed = None, False
    self.preempted = False  # a save saw jax's preemption service announce the end of the machine
    if not read_only and not run_folder.is_remote(run_dir):
      _check_writable(self._folder)
    if read_only and not self._folder.exists():
      raise ValueError(f"run.dir={os.fspath(run_dir)!r}: holds no {folder}. Check the path.")
    saving, preserving = ocp.training.save_decision_policies, ocp.training.preservation_policies
    self._checkpointer = ocp.training.Checkpointer(
      self._folder,
      save_decision_policy=saving.AnySavePolicy(
        [
          saving.FixedIntervalPolicy(every),
          saving.PreemptionCheckpointingPolicy(),
        ]
      ),
      preservation_policy=preserving.AnyPreservationPolicy(
        [preserving.LatestN(keep)] + [preserving.EveryNSteps(keep_every)] * bool(keep_every)
      ),
      # What a killed run left half-written; a reader must not take it from a live one.
      cleanup_tmp_directories=not read_only,
    )

  def __enter__(self) -> "RunCheckpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
    if kind is None:
      self.close()
      return
    with contextlib.suppress(Exception):  # what ended the block says more
      self.close()

  def steps(self) -> list[int]:
    """The steps of all finished checkpoints, ascending; one still being written is among them."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def latest(self) -> int | None:
    """The newest step, or None when the run has no checkpoint yet."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: Any, extra: Mapping[str, Any] | None = None, *, force: bool = False
  ) -> bool:
    """Starts to write a checkpoint and returns once `state` is copied to host memory.

    The caller may donate or overwrite `state` right away. A checkpoint appears under its final
    name only when it is complete.

    Args:
      step: finished epochs.
      state: pytree of jax arrays, typed PRNG keys among them.
      extra: what JSON can hold (epoch, seconds, counters); `restore` returns it with "step" added.
      force: save whatever `every` says; for the last epoch.

    Returns:
      Whether a checkpoint was begun (False too if `step` is the newest one already).

    Raises:
      ValueError: read_only, or a step before the newest one.
    """
    if self._read_only:
      raise ValueError(f"{self._folder}: opened read-only, so it cannot save.")
    newest = self.latest()
    if newest is not None and step <= newest:
      if step == newest:
        return False
      raise ValueError(
        f"step={step}: {self._folder} already has step {newest}. Use another run.dir."
      )
    self._finish_pending()
    with contextlib.suppress(RuntimeError):  # of a JAX whose preemption service is switched off
      self.preempted = multihost_utils.reached_preemption_sync_point(step)
    self._pending = self._checkpointer.save_checkpointables_async(
      step,
      {_STATE: state},
      force=force,
      # Kept in the checkpoint's own metadata: a dict of numbers as a second item would be taken
      # for a pytree of arrays.
      custom_metadata={"extra": {**(extra or {}), "step": step}, "format": FORMAT},
    )
    return self._pending is not None

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint back, bit for bit, onto any mesh.

    With step=None the newest checkpoint that can be read is used; each newer one that cannot is
    reported by a warning and, unless read_only, renamed to `<step>.unreadable-<time>`: the run
    goes on from the older one and will write these steps again.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, as jax.eval_shape of the
        function that made the state, plus the shardings wanted now.
      step: this one and no other.

    Returns:
      (state, extra), extra as given to `save` plus "step".

    Raises:
      ValueError: the checkpoint holds another tree, shape or dtype than `abstract_state` (the
        differences are listed); no such step; or none that can be read.
    """
    _check_shardings(abstract_state)
    self.wait()
    self._checkpointer.reload()
    steps = self.steps()
    if step is not None and step not in steps:
      raise ValueError(f"step={step}: {self._folder} has {steps or 'no checkpoint'}.")
    unreadable, cause = [], None
    for candidate in reversed(steps) if step is None else [step]:
      try:
        restored = self._restore_one(candidate, abstract_state)
      except UnreadableError as error:
        if "permission denied" in str(error).lower().replace("_", " "):
          raise ValueError(
            f"checkpoint {self._folder / str(candidate)}: {error}. Mend its permissions."
          ) from error
        cause = error
        unreadable.append(candidate)
        path = self._folder / str(candidate)
        warnings.warn(f"checkpoint {path} cannot be read: {error}", stacklevel=2)
        continue
      if unreadable and not self._read_only:
        self._set_aside(unreadable)
      return restored  # pyright: ignore[reportReturnType]
    raise ValueError(
      f"{self._folder}: no checkpoint that can be read (tried {unreadable})."
    ) from cause

  def extra(self) -> dict[str, Any]:
    """What was given to `save` with the newest checkpoint, plus "step"; its arrays are not read.

    Raises:
      UnreadableError: its metadata is damaged.
    """
    _, extra = self._metadata(self.steps()[-1])
    return extra

  def wait(self) -> None:
    """Blocks until nothing is being written."""
    self._finish_pending()
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits for what is being written, then ends the background threads."""
    try:
      self._finish_pending()
    except RuntimeError:
      self._close_after_failure()
      raise
    if self._failed:  # which was said when it was found
      self._close_after_failure()
    else:
      self._checkpointer.close()

  def _close_after_failure(self):
    with contextlib.suppress(Exception):  # orbax says the same again
      self._checkpointer.close()

  def _finish_pending(self):
    # result() also ends the thread that orbax starts for each save; without it they pile up.
    pending, self._pending = self._pending, None
    if pending is None:
      return
    try:
      pending.result()
    except Exception as error:
      self._failed = True
      raise RuntimeError(
        f"{self._folder}: a checkpoint could not be written ({_innermost(error)}). The ones before it "
        "are whole. Make room or mend the folder, then start the same command again."
      ) from error
    self._failed = False  # room was made: what close says is new

  def _restore_one(self, step, abstract_state):
    stored, extra = self._metadata(step)
    failure = None
    differences = _differences(stored, abstract_state)
    if not differences:
      try:
        state = self._checkpointer.load_checkpointables(step, {_STATE: abstract_state})[_STATE]
      except Exception as error:
        failure = _innermost(error)
      _agree(failure)
      # Two kinds of PRNG key with data of one shape differ only here.
      differences = _differences(state, abstract_state)
    if differences:
      raise ValueError(
        f"checkpoint {self._folder / str(step)} does not fit this run's state:\n"
        + "\n".join(f"  {line}" for line in differences)
        + "\nUse another run.dir, or the model, lora and optimizer settings that made it."
      )
    return state, extra

  def _metadata(self, step) -> tuple[Any, Any]:
    """(shapes of the state, extra)."""
    stored: Any = None
    extra: Any = None
    version, failure = FORMAT, None
    try:
      metadata = self._checkpointer.checkpointables_metadata(step)
      stored = metadata.metadata.get(_STATE)
      custom: Any = metadata.custom_metadata or {}
      extra, version = custom.get("extra"), custom.get("format", FORMAT)
      if stored is None or extra is None:
        failure = "its metadata is missing or damaged"
    except Exception as error:  # Damaged files surface as anything, bare Exception included.
      failure = _innermost(error)
    _agree(failure)
    if version > FORMAT:
      raise ValueError(
        f"checkpoint {self._folder / str(step)}: has format {version}, this version reads up to {FORMAT}. "
        "Use the version of tpgrpo_jax that wrote it, or a newer one."
      )
    return stored, extra

  def _set_aside(self, steps):
    if jax.process_index() == 0:
      for step in steps:
        # The time keeps apart two that failed at the same step.
        target = self._folder / f"{step}.unreadable-{int(time.time())}"
        (self._folder / str(step)).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("tpgrpo_jax:set_aside")
    self._checkpointer.reload()


def _without_orbax_chatter(record):
  # Some thirty INFO lines a save, and one failure's traceback from each thread that it passes through,
  # which is raised in the end; --verbosity=1 still shows them.
  is_chatter = f"{os.sep}orbax{os.sep}" in record.pathname and (
    record.levelno < logging.WARNING or record.exc_info
  )
  return not is_chatter or logging.getLogger("absl").isEnabledFor(logging.DEBUG)


def _check_writable(folder):
  """Before orbax tries: its threads would keep a process alive whose save failed at the start."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise ValueError(
      f"{folder}: cannot be written to ({error.strerror}). Make room or mend its permissions, or use another "
      "run.dir."
    ) from error


def _absolute(path):
  text = os.fspath(path)
  return epath.Path(text) if "://" in text else epath.Path(os.path.abspath(text))


def _check_shardings(abstract_state):
  for path, leaf in jax.tree.leaves_with_path(abstract_state):
    if getattr(leaf, "sharding", None) is None:
      raise ValueError(
        f"abstract_state: {_name(path)} has no sharding. Give every ShapeDtypeStruct one: a "
        "checkpoint does not decide on which devices it is restored."
      )


def _agree(failure):
  """Raises UnreadableError on every process when any of them failed."""
  ok = failure is None
  if jax.process_count() > 1:
    ok = bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))
  if not ok:
    raise UnreadableError(failure or "another process could not read it")


def _innermost(error):
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split())
  return (
    f"{type(error).__name__}: {text if len(text) < 300 else text[:100] + ' ... ' + text[-180:]}"
  )


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _layout(tree, as_stored):
  """{name: "dtype[shape]"} of every leaf; `as_stored` shows a PRNG key as orbax does, as words."""

  def text(leaf):
    if as_stored and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

  return {_name(path): text(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _differences(found, asked):
  as_stored = not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
  found, asked = _layout(found, as_stored), _layout(asked, as_stored)
  lines = [
    f"{name}: the checkpoint has {found[name]}, you ask for {asked[name]}"
    for name in asked
    if name in found and found[name] != asked[name]
  ]
  lines += [f"{name}: only in the checkpoint" for name in found if name not in asked]
  lines += [f"{name}: not in the checkpoint" for name in asked if name not in found]
  more = len(lines) - _MAX_DIFFERENCES
  return lines[:_MAX_DIFFERENCES] + ([f"... and {more} more"] if more > 0 else [])
