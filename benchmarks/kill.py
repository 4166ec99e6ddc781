"""Kills runs of the built-in task at bad moments, starts them again, compares with a run left alone.

python benchmarks/kill.py --kills 100 --method tempflow

Each life of a run ends by SIGKILL: at a random moment, during compilation, while a checkpoint is being
written, or inside the reward; one in twenty by SIGTERM, which must save and be gone within 60 s. A run
that ends in spite of it is compared bit for bit: parameters, optimizer, EMA, best weights and every metric
but times; then another begins, until there were enough kills. The last line is JSON; the exit status is 1
when anything differed.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from tpgrpo_jax import rewards
from tpgrpo_jax.config import presets, tasks
from tpgrpo_jax.reporting import history
from tpgrpo_jax.runs import best, checkpoint, metrics
from tpgrpo_jax.training import session as session_lib

HERE = pathlib.Path(__file__).parent
EPOCHS = 12
FIELDS = {
  "train.epochs": EPOCHS,
  "train.prompts_per_epoch": 2,
  "train.group_size": 4,
  "train.microbatch": 4,
  "train.updates_per_epoch": 1,
  "eval.prompts": 8,
  "eval.batch": 8,
  "eval.every": 4,
  "eval.judge_prompts": 8,
  "checkpoint.every": 1,
  "log.tensorboard": False,
  "log.images_every": 0,
  "rewards": {"ocr": {"weight": 1.0, "make": "kill:make"}},
}
MOMENTS = ("random", "compile", "write", "reward")
COMPILES = (
  "jit(sample_microbatch)",
  "jit(sample)",
  "jit(train_step)",
)  # the programs that take seconds


def make():
  """The OCR reward, which says when it is at work (in the file that $KILL_MARK names)."""
  inner = rewards.HOST_REWARDS["ocr"]()
  mark = pathlib.Path(os.environ.get("KILL_MARK", os.devnull))

  def reward(images, prompts, metadata):
    mark.write_text("at work")
    return inner(images, prompts, metadata)

  return reward


def main() -> None:
  """Kills, compares and reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=100)
  parser.add_argument("--method", default="tp_grpo", choices=presets.METHODS)
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--folder", help="where the runs lie; by default a temporary one")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.folder or temporary)
    result = kill_runs(folder, args.method, args.kills, random.Random(args.seed))
  print(json.dumps(result))
  sys.exit(bool(result["differences"]))


def kill_runs(folder: pathlib.Path, method: str, kills: int, rng: random.Random) -> dict:
  """Counts by kind of what happened."""
  began = time.monotonic()
  for name in ("whole", "again"):
    shutil.rmtree(folder / name, ignore_errors=True)
  start(folder / "whole", folder, method).wait()
  wanted, compiled = contents(folder / "whole"), time.monotonic()
  # As long as a life is that finds its programs compiled.
  start(folder / "again", folder, method).wait()
  life = time.monotonic() - compiled
  if again := compare(contents(folder / "again"), wanted):
    raise RuntimeError(f"two runs that nobody killed differ: {again}")
  counts, waits, differences, runs = collections.Counter(), [], [], 0
  while sum(counts.values()) < kills:
    run = folder / "killed"
    shutil.rmtree(run, ignore_errors=True)
    runs += 1
    ended = False
    while not ended:
      enough = sum(counts.values()) >= kills
      moment = "none" if enough else "term" if rng.random() < 0.05 else rng.choice(MOMENTS)
      process = start(run, folder, method, moment)
      ended = end_life(process, moment, run, folder, life, rng, counts, waits)
      print(f"run {runs}: {dict(counts)}", file=sys.stderr, flush=True)
    differences += [f"run {runs}: {line}" for line in compare(contents(run), wanted)]
  return {
    "benchmark": "kill",
    "method": method,
    "kills": dict(counts),
    "runs": runs,
    "epochs": EPOCHS,
    "longest_sigterm_s": round(max(waits, default=0.0), 1),
    "differences": differences,
    "minutes": round((time.monotonic() - began) / 60, 1),
  }


def small_fields(method: str) -> dict[str, Any]:
  """FIELDS, and what the method makes of them where a recipe's own sizes are larger."""
  small = presets.apply(tasks.tiny_text(), {n: v for n, v in FIELDS.items() if "." in n})
  row = presets.METHODS[method]
  return FIELDS | {name: value(small) for name, value in row.items() if callable(value)}


def start(
  run: pathlib.Path, folder: pathlib.Path, method: str, moment: str = "none"
) -> subprocess.Popen:
  """The real command; it compiles anew where it shall die of it."""
  mark = folder / "mark"
  mark.unlink(missing_ok=True)
  shutil.rmtree(folder / "compile", ignore_errors=True)
  programs = folder / ("compile" if moment == "compile" else "programs")
  fields = small_fields(method) | {"run.dir": run, "run.programs": programs}
  options = [f"--config.{name}={value}" for name, value in fields.items()]
  recipe = f"{HERE.parent / 'configs' / 'tiny_text.py'}:{method}"
  return subprocess.Popen(
    [sys.executable, "-m", "tpgrpo_jax.train", "--config", recipe, *options],
    cwd=HERE.parent,
    env=os.environ
    | {"KILL_MARK": str(mark), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    | ({"JAX_LOG_COMPILES": "1"} if moment == "compile" else {}),
    stdout=subprocess.DEVNULL,
    stderr=open(folder / "stderr.txt", "w"),
  )


def end_life(process, moment, run, folder, life, rng, counts, waits) -> bool:
  """Ends one life at its moment; True when the run had come to its end before."""
  began, pause = time.monotonic(), rng.uniform(0.0, life)
  log, program = folder / "stderr.txt", rng.choice(COMPILES)
  due = {
    "none": lambda: False,
    "random": lambda: time.monotonic() > began + pause,
    "term": lambda: time.monotonic() > began + pause and (folder / "mark").exists(),
    "compile": lambda: f"Compiling {program}" in log.read_text() and rng.random() < 0.001,
    "write": lambda: time.monotonic() > began + pause / 2 and writing(run),
    "reward": lambda: time.monotonic() > began + pause and (folder / "mark").exists(),
  }[moment]
  while process.poll() is None:
    if not due():
      time.sleep(0.002)
      continue
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM if moment == "term" else signal.SIGKILL)
    process.wait()
    if process.returncode == 0:  # too late
      return True
    if moment == "term":
      waits.append(time.monotonic() - sent)
      # 143 while it trains; the signal's own status once everything is closed.
      if process.returncode not in (128 + signal.SIGTERM, -signal.SIGTERM) or waits[-1] > 60:
        raise RuntimeError(
          f"SIGTERM: gone after {waits[-1]:.0f} s with status {process.returncode}:\n"
          + log.read_text()[-3000:]
        )
    counts[moment] += 1
    return False
  if process.returncode != 0:
    raise RuntimeError(f"the run failed by itself:\n{(folder / 'stderr.txt').read_text()[-3000:]}")
  return True


def writing(run: pathlib.Path) -> bool:
  """Whether a checkpoint or the best weights are half-written."""
  return any(run.glob("checkpoints/*tmp*")) or any(run.glob("best/*tmp*"))


def contents(run: pathlib.Path) -> tuple[dict[str, np.ndarray], list[dict]]:
  """All arrays of the last checkpoint and of the best weights, and the rows without times."""
  config = history.load_run_config(run)
  session = session_lib.open_session(config)
  with jax.set_mesh(session.mesh):
    abstract = session_lib.abstract_state(session)
    with checkpoint.RunCheckpoints(run, read_only=True) as checkpoints:
      state, _ = checkpoints.restore(abstract)
    weights, extra = best.load(run, abstract.ema)
  named = {"state": state, f"best after {extra['step']}": weights}
  arrays = {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(named)}
  rows = metrics.read_rows(run / "metrics.jsonl")
  return arrays, [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def compare(found, wanted) -> list[str]:
  """What differs between two `contents`."""
  lines = [name for name in wanted[0] if not np.array_equal(found[0].get(name), wanted[0][name])]
  if found[1] != wanted[1]:
    numbers = [[(row["kind"], row["epoch"]) for row in rows] for rows in (found[1], wanted[1])]
    same = "other numbers" if numbers[0] == numbers[1] else f"rows {numbers[0]}"
    lines.append(f"metrics.jsonl: {same}")
  return lines


if __name__ == "__main__":
  main()
