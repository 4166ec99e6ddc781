"""Ctrl-C is heard while the main thread is deep in a library, as it is while XLA compiles."""

import os
import signal
import subprocess
import sys

from tpgrpo_jax.runs import interrupts

# pbkdf2 keeps the main thread for minutes, and Python's handlers with it.
COMPILES = """
import hashlib, signal
from tpgrpo_jax import command
from tpgrpo_jax.runs import preemption

signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it


def main(argv):
  with preemption.watch():
    print("compiling", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**30)


command.run(main, argv=["train"])
"""


def test_the_first_ctrl_c_is_answered_and_the_second_ends_at_once_while_a_program_compiles():
  process = subprocess.Popen(
    [sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout.readline() == "compiling\n"
    process.send_signal(signal.SIGINT)
    said = iter(process.stderr.readline, "")
    assert any(line.startswith("Ctrl-C: saves the finished epochs") for line in said)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert "interrupted" in process.stderr.read()
  finally:
    process.kill()
    process.communicate()


def test_who_listened_before_hears_too_and_a_forked_process_tells_nobody():
  outer, inner = [], []
  before = signal.signal(signal.SIGUSR1, lambda *_: None)
  try:
    with interrupts.listening(outer.append):
      with interrupts.listening(inner.append):
        if not (child := os.fork()):
          os.kill(os.getpid(), signal.SIGUSR1)
          os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (outer, inner) == ([], [])
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (outer, inner) == ([signal.SIGUSR1], [signal.SIGUSR1])
    assert signal.set_wakeup_fd(-1) == -1
  finally:
    signal.signal(signal.SIGUSR1, before)
