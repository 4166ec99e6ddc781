"""The run folder: whose it is, the config that made it, and the rows of its metrics.

It holds `config.json`, `metrics.jsonl`, `checkpoints/` (runs.checkpoint), `best/` (runs.best), `images/` and
`rollouts/`, on a file system or under gs://bucket/.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import pathlib
import socket
from typing import Any
import warnings

from etils import epath

from tpgrpo_jax import version
from tpgrpo_jax.config import bridge
from tpgrpo_jax.runs import processes

RESUMABLE_FIELDS = (
    "run.*", "train.epochs", "train.updates", "train.log_every", "output",
    "eval.*", "log.*", "checkpoint.*", "mesh.*", "distributed.*",
    "text.cache", "prompts.cache", "text.device", "vae.images_per_chunk", "scoring.*",
)  # fmt: skip
"""Config fields that may differ when a run is resumed: they do not change what is learned.

`train.epochs` does where the learning rate falls towards the last of them: see `check_config`. Scores of
another `eval` cannot be compared, so the best weights are then chosen anew (runs.best). docs/launch.md lists
the fields.
"""

_LOCK_FILE = ".lock"
_A_FILE = "it, or a part of it, is a file; must be a folder. Name another run.dir."
_OF_STORAGE = {
  errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG
}  # fmt: skip

_WITHOUT_LOCKS = {
  errno.ENOSYS,
  errno.ENOLCK,
  errno.EOPNOTSUPP,
  errno.EINVAL,
}  # some FUSE, NFS, Lustre


@contextlib.contextmanager
def named_errors(run_dir: os.PathLike | str) -> Iterator[None]:
  """Turns what a full, read-only or broken file system says into a ValueError that names the run folder."""
  try:
    yield
  except OSError as error:
    if error.errno not in _OF_STORAGE:
      raise
    place = f" ({error.filename})" if error.filename else ""
    raise ValueError(
      f"run.dir={os.fspath(run_dir)!r}: {error.strerror}{place}. Make room, or mend its permissions; then "
      "start the same command again. The finished checkpoints are whole."
    ) from error


def is_remote(run_dir: os.PathLike | str) -> bool:
  """Whether the folder is a name in an object store: no rename, no append, no lock."""
  return "://" in os.fspath(run_dir)


@contextlib.contextmanager
def hold(run_dir: os.PathLike | str) -> Iterator[None]:
  """Makes the folder and keeps every other run out of it while the block lasts; process 0 only.

  The lock is the operating system's: it ends with the process, however that ends. An object store has
  none; there `.lock` says who trains, and nobody is kept out.

  Raises:
    ValueError: a path that is no folder or cannot be written to, or another run in the folder.
  """
  if not processes.is_first():
    yield
    return
  field = f"run.dir={os.fspath(run_dir)!r}"
  owner = f"process {os.getpid()} on {socket.gethostname()}\n"
  if is_remote(run_dir):
    _claim_remote(run_dir, field, owner)
    yield
    return
  folder = pathlib.Path(run_dir)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / _LOCK_FILE, "a+")
  except (FileExistsError, NotADirectoryError) as error:
    raise ValueError(f"{field}: {_A_FILE}") from error
  except OSError as error:
    raise ValueError(
      f"{field}: cannot be written to ({error.strerror}). Mend its permissions, or name another run.dir."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in _WITHOUT_LOCKS:
        warnings.warn(
          f"{field}: its file system has no locks ({error.strerror}), so nothing keeps a second run "
          "out. See to it that one run at a time trains in it.",
          stacklevel=3,
        )
        yield
        return
      raise _taken(field, lock) from error
    lock.truncate(0)
    lock.write(owner)
    lock.flush()
    yield


def check_free(run_dir: os.PathLike | str) -> None:
  """Raises what `hold` would, as far as one sees it without making or writing anything."""
  if is_remote(run_dir):
    return
  folder, field = pathlib.Path(run_dir), f"run.dir={os.fspath(run_dir)!r}"
  nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
  if not nearest.is_dir():
    raise ValueError(f"{field}: {_A_FILE}")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(
      f"{field}: cannot be written to ({nearest}). Mend its permissions, or name another run.dir."
    )
  if not (folder / _LOCK_FILE).is_file():
    return
  with open(folder / _LOCK_FILE) as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno not in _WITHOUT_LOCKS:
        raise _taken(field, lock) from error


def _taken(field, lock):
  lock.seek(0)
  return ValueError(
    f"{field}: {lock.read().strip() or 'another process'} is training in it: must be one run at "
    "a time. Wait for it or stop it, or name another run.dir."
  )


def _claim_remote(run_dir, field, owner):
  try:
    write(epath.Path(run_dir) / _LOCK_FILE, owner.encode())
  except ImportError as error:
    raise ValueError(
      f"{field}: gcsfs is missing, which writes to buckets. {version.install('gcs')}"
    ) from error
  except Exception as error:  # of whatever kind the store's library has
    raise ValueError(
      f"{field}: cannot be written to ({type(error).__name__}: {error}). Check that the bucket exists "
      "and that this machine's account may write to it: gcloud storage cp FILE gs://BUCKET/"
    ) from error


def write(path: os.PathLike | str, content: bytes) -> None:
  """Writes a file whole or not at all; its folder is made if need be."""
  path = epath.Path(path)
  if is_remote(path):  # an object appears when it is complete
    path.write_bytes(content)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(content)
  temporary.replace(path)


def append(path: os.PathLike | str, content: bytes) -> None:
  """Adds to the end of a file, which is made if need be."""
  path = epath.Path(path)
  if is_remote(path):  # objects cannot grow
    write(path, (path.read_bytes() if path.exists() else b"") + content)
    return
  with open(path, "ab") as file:
    file.write(content)


def remove(run_dir: os.PathLike | str, name: str) -> None:
  """Removes a folder of the run's, if it is there."""
  path = epath.Path(run_dir) / name
  if path.exists():
    path.rmtree()


def save_config(run_dir: os.PathLike | str, config: Any) -> None:
  """Writes the config as `<run_dir>/config.json`, whole or not at all; process 0 only.

  Args:
    run_dir: the run's folder, created if need be.
    config: a frozen dataclass of primitives.
  """
  if not processes.is_first():
    return
  text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
  write(epath.Path(run_dir) / "config.json", text.encode())


def check_config(
  run_dir: os.PathLike | str, config: Any, ignore: tuple[str, ...] = RESUMABLE_FIELDS
) -> None:
  """Checks that the folder holds no checkpoint yet, or was made by the same config.

  Args:
    run_dir: the run's folder.
    config: the config asked for now.
    ignore: patterns of dotted field names that may differ; train.epochs only where optimizer.schedule is
      constant.

  Raises:
    ValueError: other fields differ (each is listed with both values), or config.json is damaged or missing.
  """
  path = epath.Path(run_dir) / "config.json"
  checkpoints = path.parent / "checkpoints"
  if not (checkpoints.exists() and any(checkpoints.iterdir())):
    return  # nothing was trained: a first start that failed binds nobody
  if not path.exists():
    raise ValueError(
      f"{path}: is missing, so nobody knows what made the checkpoints beside it. Bring it back, or use "
      "another run.dir."
    )
  try:
    old = bridge.flatten(json.loads(path.read_text()))
  except ValueError as error:
    raise ValueError(
      f"{path}: not valid JSON ({error}). Repair it, or use another run.dir."
    ) from error
  # Through JSON and back, because there a tuple is a list.
  new = bridge.flatten(json.loads(json.dumps(dataclasses.asdict(config))))
  falls, lines = new.get("optimizer.schedule", "constant") != "constant", []
  for field in [*new, *(f for f in old if f not in new)]:
    changes_rate = falls and field == "train.epochs"
    ignored = not changes_rate and any(fnmatch.fnmatchcase(field, pattern) for pattern in ignore)
    if ignored or (field in old and field in new and old[field] == new[field]):
      continue
    has = repr(old[field]) if field in old else "no such field"
    asks = f"you ask for {new[field]!r}" if field in new else "you do not set it"
    why = f"; optimizer.schedule={new['optimizer.schedule']!r} falls until then" * changes_rate
    lines.append(f"  {field}: the run has {has}, {asks}{why}")
  if lines:
    raise ValueError(
      f"run.dir={os.fspath(run_dir)!r}: this folder was made by another config.\n"
      + "\n".join(lines)
      + "\nTo resume it, set the old value; to start anew, use another run.dir."
    )


def check_length(run_dir: os.PathLike | str, epochs: int, finished: int | None) -> None:
  """Raises ValueError for a run that is to be shorter than it is.

  Args:
    run_dir: the run's folder.
    epochs: train.epochs, asked for now.
    finished: of its newest checkpoint; None where it has none.
  """
  if finished is not None and epochs < finished:
    raise ValueError(
      f"train.epochs={epochs}: the run in {os.fspath(run_dir)} has finished {finished}; must be as many or "
      f"more. Leave it {finished}, or use another run.dir."
    )


def fingerprint(config: Any, ignore: tuple[str, ...] = RESUMABLE_FIELDS) -> str:
  """A hash of the fields that may not differ when a run is resumed: what belongs to another has another."""
  fields = bridge.flatten(json.loads(json.dumps(dataclasses.asdict(config))))
  bound = {k: v for k, v in fields.items() if not any(fnmatch.fnmatchcase(k, p) for p in ignore)}
  return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def truncate_metrics(path: os.PathLike | str, next_epoch: int) -> int:
  """Drops the rows that a resumed run will write again; process 0 only.

  A row that cannot be read (the half-written last one of a killed run) is dropped too. The file is
  replaced in one step, and only if something was dropped; a missing file is no error.

  Args:
    path: a file with one JSON object a line, each with an integer "epoch".
    next_epoch: the first epoch that will be run; rows with epoch < next_epoch stay.

  Returns:
    How many rows were dropped.
  """
  path = epath.Path(path)
  if not processes.is_first():
    return 0
  if not path.exists():
    if next_epoch:
      warnings.warn(f"{path}: is missing; the rows of the finished epochs are lost.", stacklevel=2)
    return 0
  content = path.read_bytes()
  lines = [line for line in content.split(b"\n") if line.strip()]
  damaged = [number for number, line in enumerate(lines[:-1], 1) if _epoch(line) is None]
  if damaged:
    warnings.warn(f"{path}: rows {damaged} cannot be read; they are dropped.", stacklevel=2)
  kept = [line for line in lines if (epoch := _epoch(line)) is not None and epoch < next_epoch]
  new = b"".join(line + b"\n" for line in kept)
  if new != content:
    write(path, new)
  return len(lines) - len(kept)


def _epoch(line):
  try:
    epoch = json.loads(line)["epoch"]
  except (ValueError, TypeError, KeyError):
    return None
  return epoch if isinstance(epoch, int) else None
