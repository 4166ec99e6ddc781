"""The small pipelines of pipeline.npz as folders, and configs for them."""

import dataclasses
import json
import pathlib
import sys

import numpy as np

from tpgrpo_jax import config as config_lib

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
sys.path.append(str(pathlib.Path(__file__).parent.parent / "rewards"))
LENGTHS = {"sd3": 20, "flux": 24}
GUIDANCE = {"sd3": (1.0, 4.5), "flux": (3.5, 1.5)}
NUM_STEPS, HEIGHT, WIDTH = 4, 48, 80


def load():
  return np.load(GOLDEN / "pipeline.npz")


def prompts(golden):
  return json.loads(str(golden["prompts"]))


def write_pipeline(golden, family, folder):
  """The folder of a pipeline, file by file as diffusers saved it."""
  prefix = f"{family}/files/"
  for key in (key for key in golden.files if key.startswith(prefix)):
    path = folder / key.removeprefix(prefix)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(golden[key].tobytes())
  return folder


def make_config(family, folder, work, fields=None):
  """A config on one of the pipelines; `fields` are {"group.field": value}."""
  config = config_lib.Config(
    run=config_lib.Run(str(work / "run")),
    model=config_lib.Model(family, str(folder)),
    text=config_lib.Text(max_sequence_length=LENGTHS[family], cache=str(work / "cache")),
    sampler=config_lib.Sampler(
      num_steps=NUM_STEPS,
      window=(0, 3),
      schedule=family,
      guidance_scale=GUIDANCE[family][-1],
      height=HEIGHT,
      width=WIDTH,
    ),
    lora=config_lib.Lora(rank=2, alpha=4.0),
    rewards={"jpeg_compressibility": 1.0},
    train=config_lib.Train(
      epochs=1, prompts_per_epoch=2, group_size=4, microbatch=4, updates_per_epoch=2
    ),
    eval=config_lib.Eval(num_steps=NUM_STEPS, prompts=2, batch=2),
    log=config_lib.Log(tensorboard=False),
  )
  for name, value in (fields or {}).items():
    group, _, field = name.partition(".")
    if field:
      value = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group: value})
  return config
