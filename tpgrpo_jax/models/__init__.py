"""The models, and what turns prompts and latents into their terms."""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models import byte_text, hf, lora, mmdit

ASSETS = pathlib.Path(__file__).parent.parent / "assets"


class Variant(NamedTuple):
  """A model family member.

  Attributes:
    config: sizes when no weights are loaded.
    latent_shape: (h, w, c) of one sample.
    encode: prompts -> Condition of NumPy arrays, for a transformer of the given config.
    decode: latents [N, h, w, c] -> images [N, H, W, 3] float in [0, 1].
    folder: the weights that ship with the package.
  """

  config: mmdit.MMDiTConfig
  latent_shape: tuple[int, int, int]
  encode: Callable[[mmdit.MMDiTConfig, Sequence[str]], types.Condition]
  decode: Callable[[jax.Array], jax.Array]
  folder: pathlib.Path


def pixels_to_latents(pixels: jax.Array) -> jax.Array:
  """Gray pixels uint8 [N, H, W] -> latents [N, H, W, 1] in [-1, 1]; the tiny model has no VAE."""
  return jnp.asarray(pixels, jnp.float32)[..., None] / 127.5 - 1.0


def _gray_to_rgb(latents):
  return jnp.repeat(jnp.clip(latents * 0.5 + 0.5, 0.0, 1.0), 3, axis=-1)


def _encode_bytes(config, prompts):
  return byte_text.encode(prompts, config.joint_attention_dim - byte_text.BYTES)


_TINY = mmdit.MMDiTConfig(
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

MODELS = {
  "tiny": Variant(_TINY, (24, 48, 1), _encode_bytes, _gray_to_rgb, ASSETS / "tiny_text"),
}


def build_transformer(config: mmdit.MMDiTConfig, *, dtype=jnp.float32, remat: str = "none") -> Any:
  """Returns a function key -> MMDiT, pure, so that jax.eval_shape serves it."""

  def create(key):
    return mmdit.MMDiT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(params=key))

  return create


def velocity_fn(graphdef: Any, params: Any, x, sigma, condition: types.Condition) -> jax.Array:
  """The model as a pure function: (params, x [B, h, w, c], sigma [B], condition) -> velocity.

  Args:
    graphdef: the model's structure, bound with functools.partial.
    params: {"frozen": tree, "trainable": tree}; the two together are the model's weights.
  """
  model = nnx.merge(graphdef, lora.merge_trees(params["frozen"], params["trainable"]))
  return model(x, sigma, condition.text, condition.pooled)


def make_velocity_fn(graphdef: Any) -> types.VelocityFn:
  """Binds a model's structure."""
  return functools.partial(velocity_fn, graphdef)


def images_uint8(images: jax.Array) -> jax.Array:
  """Images in [0, 1] -> uint8, rounded."""
  return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


__all__ = ["MODELS", "Variant", "build_transformer", "hf", "lora", "make_velocity_fn", "mmdit"]
