"""The small pipelines of pipeline.npz as folders, and configs for them."""

import dataclasses
import json
import pathlib
import sys

import numpy as np

from tpgrpo_jax import config as config_lib

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
sys.path.append(str(pathlib.Path(__file__).parent.parent / "rewards"))
LENGTHS = {"sd3": 20, "flux": 24, "flux2": 48, "z_image": 96}
GUIDANCE = {"sd3": (1.0, 4.5), "flux": (3.5, 1.5), "flux2": (1.0, 4.0), "z_image": (1.0, 5.0)}
SCHEDULES = {
  "sd3": ("sd3", 3.0),
  "flux": ("flux", 3.0),
  "flux2": ("flux2", 3.0),
  "z_image": ("shifted", 6.0),
}
TARGETS = {
  "flux2": (*config_lib.Lora().targets, "attn.to_qkv_mlp_proj", "attn.to_out"),
  "z_image": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
}
SIZES = {"": (48, 80), "small/": (32, 48)}  # the second one of the pipelines that read Qwen3 alone
NUM_STEPS = 4
FAMILIES = tuple(LENGTHS)
QWEN = ("flux2", "z_image")


def load():
  """All arrays of both files."""
  return {k: v for name in ("pipeline", "qwen_pipelines") for k, v in _arrays(name).items()}


def _arrays(name):
  with np.load(GOLDEN / f"{name}.npz") as file:
    return {k if "/" in k else f"{name}/{k}": file[k] for k in file.files}


def prompts(golden, family="sd3"):
  return json.loads(str(golden["qwen_pipelines/prompts" if family in QWEN else "pipeline/prompts"]))


def latents(golden, family="sd3", place=""):
  return golden[f"{family}/{place}latents" if family in QWEN else "pipeline/latents"]


def write_pipeline(golden, family, folder):
  """The folder of a pipeline, file by file as diffusers saved it."""
  prefix = f"{family}/files/"
  for key in (key for key in golden if key.startswith(prefix)):
    path = folder / key.removeprefix(prefix)
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(golden[key].tobytes())
  return folder


def make_config(family, folder, work, fields=None):
  """A config on one of the pipelines; `fields` are {"group.field": value}."""
  schedule, shift = SCHEDULES[family]
  lora = {"targets": TARGETS[family]} if family in TARGETS else {}
  config = config_lib.Config(
    run=config_lib.Run(str(work / "run")),
    model=config_lib.Model(family, str(folder)),
    text=config_lib.Text(max_sequence_length=LENGTHS[family], cache=str(work / "cache")),
    sampler=config_lib.Sampler(
      num_steps=NUM_STEPS,
      window=(0, 3),
      schedule=schedule,
      shift=shift,
      guidance_scale=GUIDANCE[family][-1],
      height=SIZES[""][0],
      width=SIZES[""][1],
    ),
    lora=config_lib.Lora(rank=2, alpha=4.0, **lora),
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
