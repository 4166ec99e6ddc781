"""The model that ships: an SD3 transformer of 2 M parameters on gray pixels, which reads bytes.

It has neither a text encoder nor an autoencoder: prompts become one-hot bytes, and latents are pixels.
"""

from collections.abc import Sequence
import pathlib

import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models import byte_text, mmdit

FOLDER = pathlib.Path(__file__).parent.parent / "assets" / "tiny_text"
LATENT_SHAPE = (24, 48, 1)
CONFIG = mmdit.MMDiTConfig(
  sample_size=48,
  patch_size=8,
  in_channels=1,
  num_layers=4,
  attention_head_dim=32,
  num_attention_heads=4,
  joint_attention_dim=byte_text.embedding_dim(6),
  caption_projection_dim=128,
  pooled_projection_dim=byte_text.embedding_dim(6),
  out_channels=1,
  pos_embed_max_size=6,
  qk_norm="rms_norm",
)


def encode(config: mmdit.MMDiTConfig, prompts: Sequence[str]) -> types.Condition:
  """Prompts -> Condition of NumPy arrays, for a transformer of the given sizes."""
  return byte_text.encode(prompts, config.joint_attention_dim - byte_text.BYTES)


def decode(latents: jax.Array) -> jax.Array:
  """Latents [N, H, W, 1] -> images [N, H, W, 3] float in [0, 1]."""
  return jnp.repeat(jnp.clip(latents * 0.5 + 0.5, 0.0, 1.0), 3, axis=-1)


def pixels_to_latents(pixels: jax.Array) -> jax.Array:
  """Gray pixels uint8 [N, H, W] -> latents [N, H, W, 1] in [-1, 1]."""
  return jnp.asarray(pixels, jnp.float32)[..., None] / 127.5 - 1.0
