"""The models that ship: SD3 transformers of some 2 M parameters on pixels, which read bytes.

They have neither text encoders nor autoencoders: prompts become one-hot bytes, and latents are pixels.
"""

from collections.abc import Callable, Sequence
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models import byte_text, mmdit

ASSETS = pathlib.Path(__file__).parent.parent / "assets"


class BuiltIn(NamedTuple):
  """A built-in model.

  Attributes:
    folder: its weights.
    latent_shape: (height, width, channels), of which channels is 1 (gray) or 3.
    config: its sizes.
    reads: whether `encode` can make text of a width.
    encode: (sizes, prompts) -> Condition of NumPy arrays, for a transformer of these sizes.
  """

  folder: pathlib.Path
  latent_shape: tuple[int, int, int]
  config: mmdit.MMDiTConfig
  reads: Callable[[int], bool]
  encode: Callable[[mmdit.MMDiTConfig, Sequence[str]], types.Condition]


def _sizes(
  side: int, channels: int, text_width: int, *, layers: int, heads: int
) -> mmdit.MMDiTConfig:
  """Sizes of a transformer for images of at most side x side pixels, 8 x 8 of which are a token.

  A token is as wide as a patch has numbers: narrower ones cannot carry the noise that they predict.
  """
  head_dim, patch = 32, 8
  return mmdit.MMDiTConfig(
    sample_size=side,
    patch_size=patch,
    in_channels=channels,
    num_layers=layers,
    attention_head_dim=head_dim,
    num_attention_heads=heads,
    joint_attention_dim=text_width,
    caption_projection_dim=heads * head_dim,
    pooled_projection_dim=text_width,
    out_channels=channels,
    pos_embed_max_size=side // patch,
    qk_norm="rms_norm",
  )


def _reads_bytes(width: int) -> bool:
  return width > byte_text.BYTES


def _encode_bytes(sizes: mmdit.MMDiTConfig, prompts: Sequence[str]) -> types.Condition:
  return byte_text.encode(prompts, sizes.joint_attention_dim - byte_text.BYTES)


def _reads_words(width: int) -> bool:
  return width > WORDS and (width - WORDS) % byte_text.HALF_BYTES == 0


def _encode_words(sizes: mmdit.MMDiTConfig, prompts: Sequence[str]) -> types.Condition:
  letters = (sizes.joint_attention_dim - WORDS) // byte_text.HALF_BYTES
  return byte_text.encode_words(prompts, WORDS, letters)


WORDS = 8  # of a prompt for shapes, each of at most 10 bytes
TEXT = BuiltIn(
  ASSETS / "tiny_text",
  (24, 48, 1),
  _sizes(48, 1, byte_text.embedding_dim(6), layers=4, heads=4),
  _reads_bytes,
  _encode_bytes,
)
SHAPES = BuiltIn(
  ASSETS / "tiny_shapes",
  (32, 32, 3),
  _sizes(32, 3, byte_text.word_embedding_dim(WORDS, 10), layers=3, heads=6),
  _reads_words,
  _encode_words,
)
BUILT_IN = {"tiny": TEXT, "tiny_shapes": SHAPES}
"""model.variant -> what it is."""


def fits(variant: str, sizes: mmdit.MMDiTConfig) -> bool:
  """Whether a transformer of these sizes has a built-in model's channels and reads its kind of text."""
  built_in = BUILT_IN[variant]
  same = sizes.in_channels == built_in.latent_shape[2]
  return same and built_in.reads(sizes.joint_attention_dim)


def decode(latents: jax.Array) -> jax.Array:
  """Latents [N, H, W, 1 or 3] -> images [N, H, W, 3] float in [0, 1]."""
  pixels = jnp.clip(latents * 0.5 + 0.5, 0.0, 1.0)
  return jnp.repeat(pixels, 3 // latents.shape[-1], axis=-1)


def pixels_to_latents(pixels: jax.Array) -> jax.Array:
  """Pixels uint8 [N, H, W, 1 or 3] -> latents of that shape in [-1, 1]."""
  return jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0
