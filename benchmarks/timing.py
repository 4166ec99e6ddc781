"""Side-by-side timing for the benchmarks beside this file, one JSON line per figure."""

from collections.abc import Callable, Mapping
import importlib.metadata
import json
import os
import time
from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def limit_threads(count: int) -> int:
  """Confines the process to `count` CPU cores; call it before anything runs on a device.

  XLA's CPU backend has no option for its number of threads: it takes the cores that the process may
  run on. Where the system cannot confine a process, all cores are used.

  Args:
    count: cores; 0 is all.

  Returns:
    How many cores the process may run on.
  """
  # OpenMP's idle threads spin by default, on the very cores that the other library is timed on.
  os.environ.setdefault("OMP_WAIT_POLICY", "passive")
  if not hasattr(os, "sched_setaffinity"):
    return os.cpu_count() or 1
  if count:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
  cores = len(os.sched_getaffinity(0))
  os.environ["OMP_NUM_THREADS"] = str(cores)
  return cores


def interleave(
  functions: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 2
) -> dict[str, np.ndarray]:
  """Times the functions in turn, A B C A B C ..., so that a busy machine slows all of them alike.

  Args:
    functions: name -> thunk; what it returns is waited for.
    repeats: rounds.
    warmup: rounds before, which compile and are not timed.

  Returns:
    name -> [repeats] seconds.
  """
  seconds = {name: [] for name in functions}
  for turn in range(warmup + repeats):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function())
      if turn >= warmup:
        seconds[name].append(time.perf_counter() - began)
  return {name: np.asarray(values) for name, values in seconds.items()}


def report_ratio(
  figure: str,
  seconds: Mapping[str, np.ndarray],
  *,
  of: str,
  over: str,
  threads: int,
  scale: float = 1.0,
  **details: Any,
) -> None:
  """Prints one JSON line: the ratio of two medians, and the range of the rounds' own ratios.

  Args:
    figure: its name.
    seconds: as of `interleave`.
    of: name of the numerator.
    over: name of the denominator.
    threads: cores in use.
    scale: multiplies the denominator.
    **details: sizes and whatever else explains the figure.
  """
  a, b = seconds[of], scale * seconds[over]
  ms = lambda s: {
    "median": round(1e3 * float(np.median(s)), 2),
    "min": round(1e3 * float(s.min()), 2),
    "max": round(1e3 * float(s.max()), 2),
  }
  report(
    figure,
    threads=threads,
    ratio=round(float(np.median(a) / np.median(b)), 3),
    ratio_min=round(float((a / b).min()), 3),
    ratio_max=round(float((a / b).max()), 3),
    milliseconds={of: ms(a), over: ms(b)},
    repeats=len(a),
    **details,
  )


def report(figure: str, *, threads: int, **values: Any) -> None:
  """Prints one JSON line with the figure, the machine's device, its load and the versions.

  Args:
    figure: its name.
    threads: cores in use.
    **values: the figure itself.
  """
  device = jax.devices()[0]
  machine = {
    "device": f"{device.platform}: {device.device_kind}",
    "threads": threads,
    "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
  }
  print(json.dumps({"figure": figure, **values, **machine}), flush=True)
