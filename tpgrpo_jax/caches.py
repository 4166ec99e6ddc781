"""Where caches lie, and what is said when they cannot be written to: one rule for all of them.

A cache is in the folder that its field names, else in that of its environment variable, else in
$XDG_CACHE_HOME/tpgrpo_jax, else in ~/.cache/tpgrpo_jax.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import tempfile


def place(name: str, given: str | os.PathLike[str] = "", variable: str = "") -> pathlib.Path:
  """The folder of a cache.

  Args:
    name: below the user's cache folder; "" is that folder itself.
    given: what the field says; "" where it says nothing.
    variable: of the environment, "" for none.
  """
  if chosen := given or (variable and os.environ.get(variable)):
    return pathlib.Path(os.path.expanduser(chosen))
  root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  return pathlib.Path(root) / "tpgrpo_jax" / name


_NO_ROOM = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]


@contextlib.contextmanager
def writing(what: str, folder: os.PathLike[str], field: str) -> Iterator[None]:
  """Names the cache and its field where the block meets a full, read-only or absent file system.

  Args:
    what: is in it.
    folder: of the cache.
    field: of the config that moves it.

  Raises:
    ValueError: in place of the block's OSError, or of an error of another kind that tells of a full or
      read-only one, as TFDS has.
  """
  try:
    yield
  except Exception as error:
    told = [reason for reason in _NO_ROOM if reason in str(error)]
    if not (told or isinstance(error, OSError)):
      raise
    reason = told[0] if told else getattr(error, "strerror", None) or error
    raise ValueError(
      f"{field}={os.fspath(folder)!r}: the cache of {what} cannot be written to ({reason}). "
      f"Name a folder with room, such as --config.{field}=FOLDER."
    ) from error


def check_writable(what: str, folder: os.PathLike[str], field: str) -> None:
  """Makes the folder and writes to it; raises as `writing`."""
  with writing(what, folder, field):
    if os.fspath(folder).startswith("~"):
      raise OSError("there is no home folder")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(4096))
