"""Signals heard as they come, also while the main thread is in a library and Python's own handlers wait."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import threading

INTERRUPTED = 128 + signal.SIGINT  # the status of a process that Ctrl-C ended


@contextlib.contextmanager
def listening(on_signal: Callable[[int], None]) -> Iterator[None]:
  """Calls on_signal(number) in a thread of its own while the block lasts; only in the main thread.

  A program that XLA compiles keeps the main thread for minutes, and Python's handlers with it. Those of the
  signals stay as they are, and whoever listened before hears them too.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def listen():
    while heard := os.read(reader, 1):
      on_signal(heard[0])
      if before != -1:
        with contextlib.suppress(OSError):  # it is full, or closed
          os.write(before, heard)

  thread = threading.Thread(target=listen, daemon=True, name="interrupts")
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writer)
    thread.join()
    os.close(reader)


@contextlib.contextmanager
def second_ends_at_once() -> Iterator[None]:
  """While the block lasts, the second SIGINT ends the process, whatever it is doing; for commands."""
  heard = []

  def count(number):
    heard.append(number)
    if heard.count(signal.SIGINT) > 1:
      os.write(2, b"interrupted\n")
      os._exit(INTERRUPTED)

  with listening(count):
    yield


# A forked process has the parent's handlers; what Ctrl-C tells both must not count twice.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
