"""The tasks of the recipes: functions without arguments that say what is trained on what."""

from collections.abc import Callable
import dataclasses

from tpgrpo_jax.config.fields import (
  Checkpoint,
  Config,
  Ema,
  Eval,
  Log,
  Lora,
  Loss,
  Model,
  Optimizer,
  Prompts,
  Sampler,
  Text,
  Train,
  Vae,
)

PICKSCORE = {
  "pickscore": {
    "weight": 1.0,
    "path": "yuvalkirstain/PickScore_v1",
    "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
  }
}
# A server of ours at this address, or another's: docs/geneval.md. The rule that it is started with gives
# from 1 down to -14, for sixteen objects where one is asked for.
GENEVAL = {
  "geneval": {
    "weight": 1.0,
    "make": "remote",
    "url": "http://127.0.0.1:8090",
    "reward": "geneval",
    "canary": "person",
    "low": -14.0,
    "high": 1.0,
  }
}
DINA_LRM = {
  "dina_lrm": {
    "weight": 1.0,
    "path": "stabilityai/stable-diffusion-3.5-medium",
    "lora": "weights/dina_lrm/checkpoint/backbone_lora",
    "head": "weights/dina_lrm/checkpoint/rm_head.safetensors",
    "dtype": "bfloat16",
  }
}
OCR_SCENES = {"ocr": {"weight": 1.0, "detect": True, "rule": "flow_grpo", "text_score": 0.5}}


def tiny_text() -> Config:
  """The built-in task: spell a word; settings found on two CPU cores."""
  return Config(
    sampler=Sampler(num_steps=4, window=(0, 3)),
    optimizer=Optimizer(learning_rate=1.5e-4, schedule="linear"),
    train=Train(epochs=120, microbatch=64, updates_per_epoch=2),
    ema=Ema(decay=0.95, every=1),
    eval=Eval(num_steps=4, prompts=256, judge_prompts=256),
    log=Log(images_every=20),
  )


def tiny_shapes() -> Config:
  """The second built-in task: paint the shapes that a prompt asks for, GenEval in small.

  It trains on the parts that are right, as Flow-GRPO on GenEval, and reports in how many pictures all is.
  """
  base = tiny_text()
  return dataclasses.replace(
    base,
    model=Model("tiny_shapes"),
    prompts=Prompts("shapes"),
    rewards={"parts": {"weight": 1.0, "make": "shapes", "strict": False}},
    sampler=Sampler(num_steps=8, window=(0, 7), noise_level=0.4, schedule="shifted", shift=3.0),
    loss=Loss(kl_coef=2e-4),  # keeps what the reward does not see
    optimizer=dataclasses.replace(base.optimizer, learning_rate=3e-4),
    train=dataclasses.replace(base.train, epochs=60, prompts_per_epoch=16),
    eval=dataclasses.replace(
      base.eval, num_steps=8, rewards=("shapes",), prompts=252, judge_prompts=774
    ),
  )


def sd35m() -> Config:
  """SD3.5-Medium at 512 x 512: the settings of arXiv 2602.06422, Sec. 5.1, without its KL."""
  return Config(
    model=Model("sd3", "stabilityai/stable-diffusion-3.5-medium", dtype="bfloat16", remat="full"),
    text=Text(dtype="bfloat16"),
    vae=Vae(dtype="bfloat16"),
    lora=Lora(rank=32, alpha=64.0),
    sampler=Sampler(schedule="sd3", guidance_scale=4.5, height=512, width=512),
    train=Train(epochs=1000, prompts_per_epoch=48, group_size=24, microbatch=32),
    eval=Eval(every=30, num_steps=40, batch=32),
    checkpoint=Checkpoint(every=5),
  )


def sd35m_ocr() -> Config:
  """SD3.5-Medium learns to render text, judged by OCR."""
  return dataclasses.replace(
    sd35m(), prompts=Prompts("folder", "datasets/ocr"), rewards=dict(OCR_SCENES)
  )


def sd35m_pickscore() -> Config:
  """SD3.5-Medium learns what people prefer, by PickScore."""
  return dataclasses.replace(
    sd35m(), prompts=Prompts("folder", "datasets/pickscore"), rewards=dict(PICKSCORE)
  )


def sd35m_geneval() -> Config:
  """SD3.5-Medium learns objects, numbers, colours and places, judged by GenEval's rules.

  GenEval has 553 prompts: the first 128 are evaluated as the run goes on, the other 425 judge it.
  """
  base = sd35m()
  return dataclasses.replace(
    base,
    prompts=Prompts("geneval", "datasets/geneval"),
    rewards={label: dict(options) for label, options in GENEVAL.items()},
    eval=dataclasses.replace(base.eval, judge_prompts=425),
  )


def sd35m_dina() -> Config:
  """SD3.5-Medium learns what people prefer, by DiNa-LRM, which looks at latents: training decodes nothing."""
  return dataclasses.replace(sd35m_pickscore(), rewards=dict(DINA_LRM))


def flux_pickscore() -> Config:
  """FLUX.1-dev learns what people prefer: the settings of arXiv 2602.06422, App. B."""
  base = sd35m_pickscore()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, variant="flux", path="black-forest-labs/FLUX.1-dev"),
    sampler=dataclasses.replace(
      base.sampler, num_steps=6, window=(0, 5), schedule="flux", guidance_scale=3.5
    ),
    eval=dataclasses.replace(base.eval, num_steps=28),
  )


def flux_kontext_pickscore() -> Config:
  """FLUX.1-Kontext-dev learns which edits people prefer, by PickScore: the settings of FLUX.1-dev."""
  base = flux_pickscore()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model, variant="flux_kontext", path="black-forest-labs/FLUX.1-Kontext-dev"
    ),
    prompts=Prompts("folder", "datasets/edits"),
    sampler=dataclasses.replace(base.sampler, guidance_scale=2.5),
  )


# What diffusers' own scripts train of FLUX.2: all that attention reads and writes; in the single blocks the
# feed-forward is part of it.
FLUX2_TARGETS = (*Lora().targets, "attn.to_qkv_mlp_proj", "attn.to_out")
Z_IMAGE_TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")


def flux2_klein() -> Config:
  """FLUX.2-klein-base-4B at 384 x 384: steps, guidance and size of Flow-Factory's recipe."""
  base = sd35m()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model, variant="flux2", path="black-forest-labs/FLUX.2-klein-base-4B"
    ),
    lora=dataclasses.replace(base.lora, targets=FLUX2_TARGETS),
    sampler=dataclasses.replace(
      base.sampler,
      num_steps=8,
      window=(0, 7),
      schedule="flux2",
      guidance_scale=4.0,
      height=384,
      width=384,
    ),
    eval=dataclasses.replace(base.eval, num_steps=28),
  )


def flux2_klein_ocr() -> Config:
  """FLUX.2-klein-base-4B learns to render text, judged by OCR."""
  return dataclasses.replace(
    flux2_klein(), prompts=Prompts("folder", "datasets/ocr"), rewards=dict(OCR_SCENES)
  )


def flux2_klein_pickscore() -> Config:
  """FLUX.2-klein-base-4B learns what people prefer, by PickScore."""
  return dataclasses.replace(
    flux2_klein(), prompts=Prompts("folder", "datasets/pickscore"), rewards=dict(PICKSCORE)
  )


def z_image() -> Config:
  """Z-Image at 512 x 512: steps, guidance and size of Flow-Factory's recipe, which counts guidance from 0."""
  base = sd35m()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, variant="z_image", path="Tongyi-MAI/Z-Image"),
    lora=dataclasses.replace(base.lora, targets=Z_IMAGE_TARGETS),
    sampler=dataclasses.replace(base.sampler, schedule="shifted", shift=6.0, guidance_scale=5.0),
    text=dataclasses.replace(base.text, max_sequence_length=256),
    vae=dataclasses.replace(base.vae, images_per_chunk=2),  # a v5e-16 holds it: docs/scaling.md
    eval=dataclasses.replace(base.eval, num_steps=28),
  )


def z_image_pickscore() -> Config:
  """Z-Image learns what people prefer, by PickScore."""
  return dataclasses.replace(
    z_image(), prompts=Prompts("folder", "datasets/pickscore"), rewards=dict(PICKSCORE)
  )


TASKS: dict[str, Callable[[], Config]] = {
  "tiny_text": tiny_text,
  "tiny_shapes": tiny_shapes,
  "sd35m_ocr": sd35m_ocr,
  "sd35m_pickscore": sd35m_pickscore,
  "sd35m_geneval": sd35m_geneval,
  "sd35m_dina": sd35m_dina,
  "flux_pickscore": flux_pickscore,
  "flux_kontext_pickscore": flux_kontext_pickscore,
  "flux2_klein_ocr": flux2_klein_ocr,
  "flux2_klein_pickscore": flux2_klein_pickscore,
  "z_image_pickscore": z_image_pickscore,
}
