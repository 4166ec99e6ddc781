"""The settings that recipes share."""

import dataclasses

from tpgrpo_jax.config.fields import (
  Checkpoint,
  Config,
  Ema,
  Eval,
  Log,
  Lora,
  Model,
  Optimizer,
  Prompts,
  Sampler,
  Text,
  Train,
  Vae,
)


def tiny_text() -> Config:
  """The settings that the recipes of the built-in task share; found on two CPU cores."""
  return Config(
    sampler=Sampler(num_steps=4, window=(0, 3)),
    optimizer=Optimizer(learning_rate=1.5e-4),
    train=Train(epochs=120, microbatch=32, updates_per_epoch=4),
    ema=Ema(decay=0.95, every=1),
    eval=Eval(num_steps=4, prompts=256),
    log=Log(images_every=20),
  )


def sd35m() -> Config:
  """What the SD3.5-Medium recipes share: the settings of arXiv 2602.06422, Sec. 5.1, without its KL."""
  return Config(
    model=Model("sd3", "stabilityai/stable-diffusion-3.5-medium", dtype="bfloat16", remat="full"),
    text=Text(dtype="bfloat16"),
    vae=Vae(dtype="bfloat16"),
    lora=Lora(rank=32, alpha=64.0),
    prompts=Prompts("folder"),
    sampler=Sampler(schedule="sd3", guidance_scale=4.5, height=512, width=512),
    train=Train(epochs=1000, prompts_per_epoch=48, group_size=24, microbatch=32),
    eval=Eval(every=30, num_steps=40, batch=32),
    checkpoint=Checkpoint(every=5),
  )


def flux_dev() -> Config:
  """What the FLUX.1-dev recipes share: the settings of arXiv 2602.06422, App. B."""
  base = sd35m()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, variant="flux", path="black-forest-labs/FLUX.1-dev"),
    sampler=dataclasses.replace(
      base.sampler, num_steps=6, window=(0, 5), schedule="flux", guidance_scale=3.5
    ),
    eval=dataclasses.replace(base.eval, num_steps=28),
  )
