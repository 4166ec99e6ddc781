"""Starts `python -m tpgrpo_jax.serve` as a user does, on a free port."""

import contextlib
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def serve(*arguments, path=""):
  """(process, its address) of a server that is ready; ends it."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{path}"}
  process = subprocess.Popen(
    [sys.executable, "-m", "tpgrpo_jax.serve", "--port=0", *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    line = process.stdout.readline()
    if not line.startswith("http"):
      raise RuntimeError(process.communicate(timeout=30)[1])
    yield process, line.split()[0]
  finally:
    process.kill()
    process.communicate()
