"""DiNa-LRM (arXiv 2602.11146): how well a latent shows its prompt, clean or noisy, without a picture."""

from collections.abc import Callable, Sequence
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.models.hf import dina_files
from tpgrpo_jax.rewards import latents, towers

NOISE_LEVEL = 0.4
TAPS = (4, 8, 12)


def make(
  *,
  path: str | os.PathLike[str],
  head: str | os.PathLike[str],
  lora: str | os.PathLike[str] = "",
  noise_level: float = NOISE_LEVEL,
  taps: Sequence[int] = TAPS,
  heads: int = 8,
  dtype: str = "float32",
  placement: types.Placement | None = None,
) -> types.LatentRewardFn:
  """Makes the reward (raw + 10) / 10 of latents of SD3.5-Medium and their prompts' embeddings.

  Source: the authors' code, HKUST-C4G/diffusion-rm. The first 12 blocks with LoRA see the latent at its noise
  level; a head reads the states of image and text after blocks 4, 8 and 12. A finished latent is first
  noised to `noise_level`, x = (1 - u) x + u noise, as their code does it. Ours: the noise is the same for all
  latents and calls (theirs is drawn anew, verl-omni's has a fixed seed), u is taken as it is and not rounded
  to one of the scheduler's thousand levels, and a noisy latent is seen as it is, at its own level.

  Args:
    path: SD3.5-Medium in diffusers' layout, the pipeline or its transformer: a folder or hub id.
    head: the head's safetensors file.
    lora: the adapters, a file or folder in PEFT's layout; "" where they are merged into the weights at path.
    noise_level: u, that finished latents are noised to.
    taps: blocks whose states the head reads, counted from 1 (config.json of the weights: visual_head_idx and
      text_head_idx, which must be equal).
    heads: of the head's attention (config.json: num_attn_heads).
    dtype: float32 or bfloat16, of weights and computation; the authors' is bfloat16.
    placement: where the weights go; None for the default device.

  Raises:
    ValueError: an option out of its range, or files that do not hold what they should; where the head
      is a pickle, how to convert it.
  """
  towers.check_options(dtype, towers.BATCH)
  if isinstance(noise_level, str | bool) or not 0.0 < noise_level < 1.0:
    raise ValueError(
      f"noise_level={noise_level!r}: must be above 0 and below 1. 0.4 is the authors'."
    )
  kw = dict(dtype=towers.DTYPES[dtype], shardings=None if placement is None else placement.params)
  # Before the backbone: it takes a moment, and its file is the one that users have to make.
  loaded = dina_files.load_head(head, heads=heads, **kw)
  if loaded.config.taps != len(taps):
    raise ValueError(
      f"taps={tuple(taps)}: are {len(taps)} blocks, and the head at head={str(head)!r} reads "
      f"{loaded.config.taps}. The public one's are (4, 8, 12)."
    )
  backbone = dina_files.load_backbone(path, lora, tuple(taps), **kw)
  sizes = backbone.config.transformer
  if sizes.width != loaded.config.token_dim:
    raise ValueError(
      f"head={str(head)!r}: reads states of width {loaded.config.token_dim}, and the transformer at path has "
      f"{sizes.width}. It was made for stabilityai/stable-diffusion-3.5-medium."
    )
  score = make_score(backbone.graphdef, loaded.graphdef, noise_level)
  weights = {"backbone": backbone.weights, "head": loaded.weights}
  return latents.make_latent_reward(score, weights, _check_model(sizes))


def make_score(backbone: Any, head: Any, noise_level: float) -> Callable[..., jax.Array]:
  """Returns the pure function (weights, x [S, h, w, c], sigma [S], condition) -> score [S].

  Args:
    backbone: structure of a models.dina.Backbone.
    head: structure of a models.dina.Head.
    noise_level: that latents of sigma = 0 are noised to.
  """

  def score(
    weights: Any, x: Float[jax.Array, "S h w c"], sigma: Float[jax.Array, " S"], condition: Any
  ) -> Float32[jax.Array, " S"]:
    x, level = noised(x, sigma, noise_level)
    begin = nnx.merge(backbone, weights["backbone"])
    end = nnx.merge(head, weights["head"])
    raw = end(*begin(x, level, condition.text, condition.pooled))
    return (raw + 10.0) / 10.0

  return score


def noised(
  x: Float[jax.Array, "S h w c"], sigma: Float[jax.Array, " S"], noise_level: float
) -> tuple[Float32[jax.Array, "S h w c"], Float32[jax.Array, " S"]]:
  """(latents, levels) as the model sees them: finished ones are noised, by one noise for all; others stay."""
  x, wide = x.astype(jnp.float32), sigma[:, None, None, None]
  noise = jax.random.normal(jax.random.key(0), x.shape[1:])
  dirty = (1.0 - noise_level) * x + noise_level * noise
  level = jnp.where(sigma == 0.0, noise_level, sigma)
  return jnp.where(wide == 0.0, dirty, x), level.astype(jnp.float32)


def _check_model(sizes):
  def check(latent_shape: tuple[int, int, int], condition: types.Condition) -> None:
    height, width, channels = latent_shape
    if channels != sizes.in_channels:
      raise ValueError(
        f"reads latents of {sizes.in_channels} channels, and the model that is trained makes {channels}: "
        "latents of another autoencoder. Train the model that the reward was made for."
      )
    largest = sizes.latents.largest
    if max(height, width) > largest:
      raise ValueError(
        f"has positions for latents of {largest} a side, and the model makes {height} x {width}."
      )
    found = [np.shape(a)[-1] if a is not None else 0 for a in (condition.text, condition.pooled)]
    wanted = [sizes.joint_attention_dim, sizes.pooled_projection_dim]
    if found != wanted:
      raise ValueError(
        f"reads embeddings of widths {wanted}, and the model's have {found}: of other text encoders."
      )

  return check
