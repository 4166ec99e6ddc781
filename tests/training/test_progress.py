"""A person sees that long work is alive; a log file gets whole lines of it."""

import contextlib
import functools
import io
import os
import termios
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.cost import memory
from tpgrpo_jax.training import notices, progress


@contextlib.contextmanager
def terminal(monkeypatch):
  """Makes stderr a pseudo-terminal; gives a function that reads what was written to it since."""
  reader, writer = os.openpty()
  termios.tcsetwinsize(writer, (24, 80))
  os.set_blocking(reader, False)
  stderr = io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True)

  with monkeypatch.context() as patch:
    patch.setattr("sys.stderr", stderr)
    yield lambda: os.read(reader, 1 << 16).decode()
  stderr.close()
  os.close(reader)


def test_a_log_file_gets_whole_lines_at_most_one_a_minute(capsys, monkeypatch):
  with progress.Bar("update", 8, "updates") as bar:
    bar.advance(1)
    assert not capsys.readouterr().err
    monkeypatch.setattr(progress, "EVERY", 0.0)
    bar.advance(2)
    monkeypatch.setattr(progress, "EVERY", 60.0)
    bar.advance(5)
  assert capsys.readouterr().err == "update: 3/8 updates, 0 s\n"


def test_a_log_file_gets_a_line_before_and_after_a_long_compilation(capsys, monkeypatch):
  with progress.compiling("the rollout"):
    pass
  assert not capsys.readouterr().err
  monkeypatch.setattr(progress, "SOON", 0.2)
  with progress.compiling("the rollout"):
    time.sleep(1.2)
  said = capsys.readouterr().err
  assert said == "compiling the rollout ...\ncompiled the rollout in 1 s\n"


def test_a_compilation_that_fails_is_not_said_to_be_done(capsys, monkeypatch):
  monkeypatch.setattr(progress, "SOON", 0.0)
  with pytest.raises(ValueError), progress.compiling("the rollout"):
    raise ValueError
  assert "compiled" not in capsys.readouterr().err


def test_a_terminal_gets_bars_that_move_while_nothing_is_done(monkeypatch):
  with terminal(monkeypatch) as read:
    with progress.Bar("update", 2, "updates") as bar:
      bar.advance(1)
      time.sleep(1.5)
      shown = read()
    with progress.compiling("the update"):
      time.sleep(1.2)
      compiling = read()
  assert "\r" in shown and "update:  50%" in shown and "1/2 [00:01" in shown
  assert "compiling the update: 00:00" in compiling and "compiling the update: 00:01" in compiling
  assert "\n" not in shown + compiling


def test_only_the_first_call_of_a_program_compiles(capsys, monkeypatch):
  monkeypatch.setattr(progress, "SOON", 0.0)
  for program in (jax.jit(lambda x: x + 1), functools.partial(jax.jit(lambda x: x + 2))):
    for count in (1, 0):
      with progress.first("it", program):
        program(jnp.zeros(2))
      assert capsys.readouterr().err.count("compiled it") == count


def device(peak, limit=8 * 2**30):
  stats = None if peak is None else {"peak_bytes_in_use": peak, "bytes_limit": limit}
  return SimpleNamespace(memory_stats=lambda: stats)


def test_peak_memory_is_that_of_the_fullest_device_where_devices_tell(capsys):
  assert memory.peak_row("rollout") == {}  # of a CPU
  assert memory.peak_row("rollout", [device(None), device(None)]) == {}
  rollout = memory.peak_row("rollout", [device(2**30), device(3 * 2**30)])
  assert rollout == {"memory/rollout_peak_gib": 3.0, "memory/limit_gib": 8.0}
  update = memory.peak_row("update", [device(5 * 2**30, None)])
  assert update == {"memory/update_peak_gib": 5.0}
  noticed = notices.Notices(config_lib.Config())
  for _ in range(2):
    noticed.epoch(rollout | update)
  said = capsys.readouterr().err
  line = (
    "peak device memory by the end of the first rollout 3.00 GiB, update 5.00 GiB, of 8.00 GiB."
  )
  assert said == f"note: {line}\n"
