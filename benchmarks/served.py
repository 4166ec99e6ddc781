"""What an epoch costs when its reward stands behind `serve`, on the same machine.

  python benchmarks/served.py                                three runs of each kind, in turn
  python benchmarks/served.py --method=tp_grpo --epochs=6 --rounds=2

Trains the built-in task, with OCR in the run's own process and behind `python -m tpgrpo_jax.serve`. The
first two epochs of a run compile and are left out. All other numbers of the runs must be the same.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags
from etils import epath
import numpy as np

from tpgrpo_jax.runs import metrics

_METHOD = flags.DEFINE_string("method", "tempflow", "Of configs/tiny_text.py.")
_EPOCHS = flags.DEFINE_integer("epochs", 8, "Of each run.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each kind.")
_COMPILING = 2  # epochs
ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def server():
  """The address of a server of OCR."""
  command = [sys.executable, "-m", "tpgrpo_jax.serve", "--rewards=ocr", "--port=0"]
  process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout is not None
    yield process.stdout.readline().split()[0]
  finally:
    process.terminate()
    process.wait()


def train(folder, rewards=None):
  """Trains a run, with the recipe's reward or others; returns its epochs' rows."""
  fields = {
    "run.dir": folder, "train.epochs": _EPOCHS.value, "eval.every": _EPOCHS.value, "eval.prompts": 16,
    "checkpoint.every": _EPOCHS.value, "log.tensorboard": False, "log.images_every": 0,
  }  # fmt: skip
  if rewards is not None:
    fields["rewards"] = json.dumps(rewards)
  arguments = [f"--config.{name}={value}" for name, value in fields.items()]
  recipe = f"--config={ROOT}/configs/tiny_text.py:{_METHOD.value}"
  command = [sys.executable, "-m", "tpgrpo_jax.train", recipe, *arguments]
  subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
  return [
    r for r in metrics.read_rows(epath.Path(folder) / "metrics.jsonl") if r["kind"] == "train"
  ]


def untimed(rows):
  """The rows without seconds and what is made of them."""
  timed = ("time/", "perf/")
  return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def main(argv: list[str]) -> None:
  """Trains all runs and prints the figure."""
  del argv
  rows = {"here": [], "served": []}
  with server() as url, tempfile.TemporaryDirectory() as folder:
    spec = {"ocr": {"weight": 1.0, "make": "remote", "url": url, "reward": "ocr"}}
    for turn in range(_ROUNDS.value):
      for kind, rewards in (("here", None), ("served", spec)):
        rows[kind].append(train(f"{folder}/{kind}{turn}", rewards))
  same = all(untimed(rows["here"][0]) == untimed(run) for runs in rows.values() for run in runs)
  seconds = {
    kind: np.array([[r["time/epoch"] for r in run[_COMPILING:]] for run in runs])
    for kind, runs in rows.items()
  }
  medians = {kind: np.median(s, axis=1) for kind, s in seconds.items()}
  print(
    json.dumps(
      {
        "figure": "epoch behind serve / epoch here",
        "method": _METHOD.value,
        "ratio": round(float(np.median(seconds["served"]) / np.median(seconds["here"])), 3),
        "ratio_of_rounds": np.round(medians["served"] / medians["here"], 3).tolist(),
        "seconds": {kind: np.round(m, 2).tolist() for kind, m in medians.items()},
        "same_metrics": same,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
      }
    ),
    flush=True,
  )


if __name__ == "__main__":
  app.run(main)
