"""How far long work is: bars where stderr is a terminal, whole lines in a log file; process 0 only."""

from collections.abc import Iterator
import contextlib
import sys
import threading
import time
from typing import Any

import tqdm

from tpgrpo_jax.runs import processes

EVERY = 60.0  # seconds between two lines of one piece of work
SOON = 2.0  # seconds; what is compiled sooner is not worth a line


def say(line: str) -> None:
  """Writes a line beside the bars."""
  if processes.is_first():
    tqdm.tqdm.write(line, file=sys.stderr)


class Bar:
  """Counts pieces of work: opened, advanced, closed.

  On a terminal it is drawn again every second, so that one sees that long pieces are alive.
  """

  def __init__(self, name: str, total: int, unit: str):
    """Of `total` pieces, which are called `unit`."""
    self._name, self._total, self._unit = name, total, unit
    self._done, self._began = 0, time.monotonic()
    self._said = self._began
    hidden = None if processes.is_first() else True  # None: where stderr is no terminal
    self._bar = tqdm.tqdm(total=total, desc=name, unit=f" {unit}", leave=False, disable=hidden)
    self._ticker = None if self._bar.disable else _Ticker(1.0, self._bar.refresh)

  def __enter__(self) -> "Bar":
    return self

  def __exit__(self, *unused) -> None:
    if self._ticker:
      self._ticker.stop()
    self._bar.close()

  def advance(self, count: int) -> None:
    """Says that `count` more pieces are done."""
    self._done += count
    self._bar.update(count)
    now = time.monotonic()
    if self._bar.disable and now - self._said >= EVERY:
      self._said = now
      say(f"{self._name}: {self._done}/{self._total} {self._unit}, {now - self._began:.0f} s")


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
  """Shows for how long a program has been compiled while the block lasts, and then how long it took."""
  began, said = time.monotonic(), threading.Event()
  hidden = None if processes.is_first() else True
  bar = tqdm.tqdm(
    desc=f"compiling {name}", bar_format="{desc}: {elapsed}", leave=False, disable=hidden
  )

  def show():
    if not bar.disable:
      bar.refresh()
    elif time.monotonic() - began >= SOON and not said.is_set():
      said.set()
      say(f"compiling {name} ...")

  ticker = _Ticker(0.5, show)
  try:
    yield
  finally:
    ticker.stop()
    bar.close()
  if (took := time.monotonic() - began) >= SOON:
    say(f"compiled {name} in {took:.0f} s")


def first(name: str, program: Any) -> contextlib.AbstractContextManager[None]:
  """`compiling` around the first call of a jitted program, or a partial of one; nothing around the others."""
  cached = getattr(getattr(program, "func", program), "_cache_size", lambda: 1)
  return contextlib.nullcontext() if cached() else compiling(name)


class _Ticker:
  """Calls a function again and again, in a thread of its own."""

  def __init__(self, seconds, function):
    self._ended = threading.Event()

    def run():
      while not self._ended.wait(seconds):
        function()

    self._thread = threading.Thread(target=run, daemon=True, name="progress")
    self._thread.start()

  def stop(self):
    self._ended.set()
    self._thread.join()
