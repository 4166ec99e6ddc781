"""A run that is asked to end (SIGTERM) saves and goes; one that fails in a reward saves and stops."""

from collections.abc import Iterator
import contextlib
import signal

import jax
import numpy as np

from tpgrpo_jax import processes

EXIT_CODE = 128 + signal.SIGTERM  # so that schedulers start the run again


class Preempted(Exception):
  """The run was asked to end."""


class Notice:
  """Whether this process was asked to end.

  Attributes:
    given: it was.
    agreed: all processes are ending the epoch together.
  """

  def __init__(self):
    self.given = self.agreed = False


@contextlib.contextmanager
def watch() -> Iterator[Notice]:
  """Takes SIGTERM while the block lasts; call it in the main thread, after distributed.initialize."""
  notice = Notice()

  def take(*_):
    notice.given = True

  before = signal.signal(signal.SIGTERM, take)
  try:
    yield notice
  finally:
    signal.signal(signal.SIGTERM, before)


def agree(notice: Notice, failure: BaseException | None = None) -> None:
  """Ends the epoch in all processes alike; every process calls it at the same places.

  Args:
    notice: of this process.
    failure: what went wrong in this process, such as a reward that gave up.

  Raises:
    Preempted: any process was asked to end.
    BaseException: the failure, or a RuntimeError where another process has one.
  """
  if jax.process_count() == 1:
    asked, failed = notice.given, failure is not None
  else:
    flags = processes.sum_over(np.asarray([notice.given, failure is not None], np.int32))
    asked, failed = bool(flags[0]), bool(flags[1])
  notice.agreed = asked or failed
  if failure is not None:
    raise failure
  if failed:
    raise RuntimeError("another process failed; its message says why.")
  if asked:
    raise Preempted
