"""A run that is asked to end (SIGTERM, Ctrl-C) saves and goes; one that fails in a reward saves and stops."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import os
import signal
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np

from tpgrpo_jax.runs import interrupts, processes

OnChunk = Callable[[futures.Future | None], Any]
"""Called between the pieces of long work, with a scoring to wait for or None; raises to end the work."""


class Preempted(Exception):
  """The run was asked to end.

  Attributes:
    signal: that asked.
    epoch: up to which the run is saved; 0 where nothing is.
  """

  def __init__(self, number: int = signal.SIGTERM):
    super().__init__()
    self.signal, self.epoch = number, 0


class Notice:
  """Whether this process was asked to end.

  Attributes:
    given: it was.
    agreed: all processes are ending the epoch together.
    signal: that asked.
  """

  def __init__(self):
    self.given = self.agreed = False
    self.signal = signal.SIGTERM


@contextlib.contextmanager
def watch() -> Iterator[Notice]:
  """Takes SIGTERM and SIGINT while the block lasts; call it in the main thread, after distributed.initialize.

  The second SIGINT is what it always was, a KeyboardInterrupt. A process that ignores SIGINT, as those of a
  shell's background do, goes on to.
  """
  notice, said = Notice(), threading.Event()

  def say(number):  # at once, and `take` when the main thread is back from compiling
    if number == signal.SIGINT and not said.is_set():
      said.set()
      os.write(
        2, b"\nCtrl-C: saves the finished epochs, if any, and ends. Once more: ends at once.\n"
      )

  def take(number, _):
    if number == signal.SIGINT and notice.given:
      raise KeyboardInterrupt
    notice.given, notice.signal = True, number

  asking = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
  before = {number: signal.signal(number, take) for number in asking}
  try:
    with interrupts.listening(say):
      yield notice
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def leave(number: int = signal.SIGTERM) -> NoReturn:
  """Ends the process, everything being saved and closed.

  Args:
    number: of the signal that asked; 128 + number is the status, so that schedulers start the run again.
  """
  if jax.process_count() > 1:
    jax.distributed.shutdown()  # the others' farewell
  sys.stderr.flush()
  os._exit(128 + number)  # without waiting for the thread of a reward that hangs


def go_on(scoring: futures.Future | None) -> None:
  """The OnChunk of work that nobody asks to end."""
  if scoring is not None:
    scoring.exception()  # waits; what it is shows when its result is asked for


def agree(notice: Notice, scoring: futures.Future | None = None) -> None:
  """The OnChunk that ends the work in all processes alike; every process calls it at the same places.

  Args:
    notice: of this process.
    scoring: waited for, unless a process is asked to end meanwhile; it may have failed.

  Raises:
    Preempted: any process was asked to end.
    BaseException: of the scoring, or a RuntimeError where another process has one.
  """
  several, waits, failure = jax.process_count() > 1, True, None
  while waits:
    if scoring is not None and not notice.given:
      futures.wait([scoring], timeout=1.0 if several else 0.2)
    waits = scoring is not None and not scoring.done()
    failure = scoring.exception() if scoring is not None and not waits else None
    flags = [notice.given, failure is not None, waits]
    if several:
      flags = processes.sum_over(np.asarray(flags, np.int32))
    asked, failed, waits = map(bool, flags)
    waits = waits and not (asked or failed)
  notice.agreed = asked or failed
  if failure is not None:
    raise failure
  if failed:
    raise RuntimeError("another process failed; its message says why.")
  if asked:
    raise Preempted(notice.signal)
