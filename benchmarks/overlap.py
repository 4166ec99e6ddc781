"""Does a slow reward cost time of its own? python benchmarks/overlap.py

Runs epochs of the built-in task whose reward waits as long as the rollout of a microbatch takes, as a
server would: the rollout and the rewards together against the longer of the two. With C microbatches
(C + 1) / C is the best that can be had: the last microbatch's images are scored when the devices have
nothing left to do.
"""

import argparse
import dataclasses
import tempfile
import time

import jax
import numpy as np
import timing

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import tasks
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import session as session_lib

SECONDS = [0.0]  # that a call of the reward waits


def make():
  """A reward that waits."""

  def reward(images, prompts, metadata):
    time.sleep(SECONDS[0])
    return images.mean(axis=(1, 2, 3)).astype(np.float32) / 255, {}

  return reward


def main() -> None:
  """Measures and reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--chunks", type=int, default=8, help="microbatches of an epoch")
  parser.add_argument("--microbatch", type=int, default=32)
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    session = session_lib.open_session(make_config(folder, args.chunks, args.microbatch))
    with jax.set_mesh(session.mesh):
      measure(session, args)


def make_config(folder: str, chunks: int, microbatch: int) -> config_lib.Config:
  """The built-in task with a reward that waits."""
  base = tasks.tiny_text()
  train = dataclasses.replace(
    base.train, prompts_per_epoch=chunks, group_size=microbatch, microbatch=microbatch
  )
  return dataclasses.replace(
    base,
    run=dataclasses.replace(base.run, dir=folder),
    rewards={"slow": {"weight": 1.0, "make": "overlap:make"}},
    train=dataclasses.replace(train, updates_per_epoch=1),
    log=dataclasses.replace(base.log, tensorboard=False),
  )


def measure(session, args):
  """Reports the ratio."""
  state = session_lib.init_state(session)
  sample = lambda: epoch_lib.sample_epoch(session, state, 0).rollout.seconds
  sample()  # compiles
  alone, together, waits = [], [], []
  for _ in range(args.repeats):
    SECONDS[0] = 0.0
    alone.append(sum(sample().values()))
    SECONDS[0] = alone[-1] / args.chunks
    seconds = sample()
    together.append(sum(seconds.values()))
    waits.append(seconds["reward_wait"] / together[-1])
  ratios = np.asarray(together) / np.asarray(alone)
  timing.report(
    "overlap",
    threads=0,
    chunks=args.chunks,
    microbatch=args.microbatch,
    repeats=args.repeats,
    best_possible=round((args.chunks + 1) / args.chunks, 3),
    ratio=round(float(np.median(ratios)), 3),
    lowest=round(float(ratios.min()), 3),
    highest=round(float(ratios.max()), 3),
    device_waits=round(float(np.median(waits)), 3),
  )


if __name__ == "__main__":
  import overlap  # the module that the reward is looked up in, and not a second copy of it

  overlap.main()
