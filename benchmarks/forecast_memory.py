"""What aot says that a program needs, against what it takes: python benchmarks/forecast_memory.py

The rollout and the update of the built-in task, in microbatches large enough that they need much more than
the process itself, on one CPU device, whose memory is the process's own. Each is run twice on arrays of
zeros; the second time the process's peak less what it held before is set against the forecast's results and
temporaries. One JSON line each.
"""

import argparse
import ctypes
import dataclasses
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import timing

from tpgrpo_jax.config import tasks
from tpgrpo_jax.forecasting import forecast, lowering
from tpgrpo_jax.training import mesh as mesh_lib

GIB = 2**30
STATUS = pathlib.Path("/proc/self/status")


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--microbatch", type=int, default=1024)
  args = parser.parse_args()
  base = tasks.tiny_text()
  sizes = dataclasses.replace(
    base.train, prompts_per_epoch=2, group_size=args.microbatch, microbatch=args.microbatch
  )
  config = dataclasses.replace(base, train=dataclasses.replace(sizes, updates_per_epoch=1))
  devices = jax.devices()[:1]
  said = forecast.forecast(config, devices, chip=None, margin=0.0)
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  plan = lowering.open_plan(config, mesh)
  programs = {"rollout": lowering.rollout_program, "update": lowering.update_program}
  with jax.set_mesh(mesh):
    for phase in said.phases:
      began = time.perf_counter()
      taken = measure(*programs[phase.name](plan))
      needed = phase.results + phase.temporaries
      timing.report(
        f"forecast_memory_{phase.name}",
        threads=0,
        microbatch=args.microbatch,
        arguments_gib=round(phase.arguments / GIB, 3),
        said_gib=round(needed / GIB, 3),
        taken_gib=round(taken / GIB, 3),
        ratio=round(taken / needed, 3),
        seconds=round(time.perf_counter() - began, 1),
      )


def measure(function, args, kwargs) -> int:
  """Bytes that a call adds to the process at its highest."""
  run = lambda: jax.block_until_ready(function(*jax.tree.map(zeros, args), **kwargs))
  run()
  arguments = jax.block_until_ready(jax.tree.map(zeros, args))
  ctypes.CDLL("libc.so.6").malloc_trim(0)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
  before = resident("VmRSS")
  jax.block_until_ready(function(*arguments, **kwargs))
  return resident("VmHWM") - before


def zeros(leaf):
  """An array of a shape; what is an array already stays."""
  if not isinstance(leaf, jax.ShapeDtypeStruct):
    return leaf
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key(0)
  array = np.zeros(leaf.shape, leaf.dtype)
  return jnp.asarray(array) if leaf.sharding is None else jax.device_put(array, leaf.sharding)


def resident(name: str) -> int:
  """A line of /proc/self/status, in bytes."""
  found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
  assert found, name
  return int(found[1]) * 1024


if __name__ == "__main__":
  main()
