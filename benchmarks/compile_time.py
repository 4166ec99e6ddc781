"""Compile time of an update with scanned and with unrolled blocks: python benchmarks/compile_time.py

The train step of a released model at its true sizes (LoRA rank 32, bfloat16, every block
rematerialised) is traced, lowered and compiled for CPU from shapes alone; no weight exists.

scanned    The blocks of one kind are stacked, and their program is the body of a scan.
unrolled   The same weights, and the program of every block written out.

Prints a table of seconds, and one JSON line last.
"""

import argparse
import time
from unittest import mock

from flax import nnx
import jax
import numpy as np
import timing
import true_models

from tpgrpo_jax.models import mmdit

PHASES = ("trace", "lower", "compile")


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=sorted(true_models.TRUE_MODELS), default="sd35_medium")
  parser.add_argument("--repeats", type=int, default=3, help="rounds of scanned, unrolled")
  parser.add_argument("--batch", type=int, default=8, help="samples of the microbatch")
  parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
  parser.add_argument("--threads", type=int, default=2, help="CPU cores; 0 is all")
  parser.add_argument(
    "--small", type=int, default=0, help="blocks of a small model instead; 0: true"
  )
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  threads = timing.limit_threads(args.threads)
  model = true_models.TRUE_MODELS[args.model]
  if args.small:
    model = true_models.shrink(model, args.small)
  seconds = {"scanned": [], "unrolled": []}
  operations = {}
  trace(true_models.shrink(model, 2), args.batch, args.remat)  # what JAX does once in a process
  for _ in range(args.repeats):
    for name, blocks in (("scanned", mmdit.scan_blocks), ("unrolled", unrolled)):
      with mock.patch.object(mmdit, "scan_blocks", blocks):
        took, operations[name] = measure(model, args.batch, args.remat)
      seconds[name].append(took)
  report(args, seconds, operations, threads)


def measure(model: true_models.TrueModel, batch: int, remat: str) -> tuple[list[float], int]:
  """([seconds of each phase], operations of the lowered program); nothing is taken from a cache."""
  jax.clear_caches()
  ends = [time.perf_counter()]
  traced = trace(model, batch, remat)
  ends.append(time.perf_counter())
  lowered = traced.lower()
  ends.append(time.perf_counter())
  lowered.compile()
  ends.append(time.perf_counter())
  return list(np.diff(ends)), lowered.as_text().count(" = ")


def trace(model: true_models.TrueModel, batch: int, remat: str):
  """The traced update."""
  run = true_models.open_run(model, batch=batch, remat=remat)
  function, arguments = true_models.update(model, run, batch=batch)
  return function.trace(*arguments)


def unrolled(stack, carry, *terms, remat):
  """What takes the place of mmdit.scan_blocks: a Python loop over the blocks."""
  graphdef, weights = nnx.split(stack)
  body = lambda carry, weights: nnx.merge(graphdef, weights)(*carry, *terms)
  if remat != "none":
    body = jax.checkpoint(body, policy=mmdit.REMAT_POLICIES[remat])
  for i in range(len(jax.tree.leaves(weights)[0])):
    carry = body(carry, jax.tree.map(lambda w, i=i: w[i], weights))
  return carry


def report(args, seconds, operations, threads) -> None:
  """Prints the table, then the JSON line."""
  print(f"{'seconds':>10}" + "".join(f"{phase:>10}" for phase in (*PHASES, "all", "(range)")))
  totals, medians = {}, {}
  for name, rounds in seconds.items():
    rounds = np.asarray(rounds)
    totals[name] = rounds.sum(axis=1)
    medians[name] = dict(zip(PHASES, np.median(rounds, axis=0).round(2).tolist()))
    cells = [*medians[name].values(), float(np.median(totals[name]))]
    low, high = totals[name].min(), totals[name].max()
    print(
      f"{name:>10}" + "".join(f"{cell:10.2f}" for cell in cells) + f"   {low:.1f} to {high:.1f}"
    )
  timing.report_ratio(
    "compile_time",
    totals,
    of="unrolled",
    over="scanned",
    threads=threads,
    phases=medians,
    operations=operations,
    model=args.model,
    small=args.small,
    microbatch=args.batch,
    remat=args.remat,
  )


if __name__ == "__main__":
  main()
