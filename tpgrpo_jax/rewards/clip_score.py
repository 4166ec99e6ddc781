"""Rewards by how well CLIP finds image and prompt to agree: CLIPScore and PickScore."""

import os

import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.rewards import preprocess, towers

CLIPSCORE_WEIGHT = 2.5


def make_clipscore(
  *,
  path: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] = "",
  prefix: str = "",
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward 2.5 max(cos(image, prompt), 0), with cos of the towers' projections.

  Source: CLIPScore (arXiv 2104.08718), equation 1, which took ViT-B/32 and put "A photo depicts "
  before each caption. For generators it is used with ViT-L/14 and the bare prompt, as here. Flow-GRPO's
  code has 100 cos / 30 instead, 4/3 of this, and shrinks images bilinearly.

  Args:
    path: a CLIPModel in transformers' layout, such as openai/clip-vit-large-patch14: a folder or hub id.
    tokenizer: folder or hub id of the tokenizer; "" for path's own.
    prefix: put before every prompt.
    dtype: float32 or bfloat16, of the weights and of the towers.
    batch: images at once on each device.
    placement: where weights and prompts go; None for the default device.

  Raises:
    ValueError: an option out of its range, or a folder that does not hold what it should.
  """
  return _make(
    "clipscore", path, tokenizer, dtype, batch, placement,
    hint="that of ViT-L/14 is openai/clip-vit-large-patch14",
    clean=lambda prompt: prefix + prompt,
    score=lambda cos, scale: CLIPSCORE_WEIGHT * jnp.maximum(cos, 0.0),
  )  # fmt: skip


def make_pickscore(
  *,
  path: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] = "",
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward exp(logit_scale) cos(image, prompt), about 18 to 25.

  Source: PickScore (arXiv 2305.01569), and its model card's code: without the softmax over images.
  Flow-GRPO's code divides it by 26; the papers report it undivided.

  Args:
    path: yuvalkirstain/PickScore_v1, a CLIPModel (CLIP-H) in transformers' layout: a folder or hub id.
    tokenizer: folder or hub id of the tokenizer, laion/CLIP-ViT-H-14-laion2B-s32B-b79K; "" for path's own.
    dtype: float32 or bfloat16, of the weights and of the towers.
    batch: images at once on each device.
    placement: where weights and prompts go; None for the default device.

  Raises:
    ValueError: an option out of its range, or a folder that does not hold what it should.
  """
  return _make(
    "pickscore", path, tokenizer, dtype, batch, placement,
    hint="PickScore's is laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    clean=lambda prompt: prompt,
    score=lambda cos, scale: scale * cos,
  )  # fmt: skip


def _make(label, path, tokenizer, dtype, batch, placement, *, hint, clean, score):
  towers.check_options(dtype, batch)
  folder = towers.open_folder(path)
  shardings = None if placement is None else placement.params
  encoder = hf_clip.load_clip(folder, dtype=towers.DTYPES[dtype], shardings=shardings)
  tokenize = towers.load_tokenize(
    label, folder, tokenizer, encoder.config.text, hint=hint, clean=clean
  )
  return towers.make_text_image_reward(
    encoder, tokenize, preprocess.clip_pixels, score, batch=batch, placement=placement
  )
