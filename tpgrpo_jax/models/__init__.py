"""The models, and what turns their weights into pure functions."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models import flux, hf, lora, mmdit, tiny

Sizes = mmdit.MMDiTConfig | flux.FluxConfig


class Variant(NamedTuple):
  """A family of models.

  Attributes:
    sizes: the class of a transformer's config.
    guidance: "classifier_free" evaluates the model with and without the prompt; "embedded" tells it the
      scale, where it was made for that (FLUX.1-dev).
    pipeline: family of the pipeline around it, of models.prompt_embedding.FAMILIES; "" for none.
    path: the weights that ship with the package; "" where none do.
  """

  sizes: type
  guidance: str
  pipeline: str
  path: str


MODELS = {
  **{
    name: Variant(mmdit.MMDiTConfig, "classifier_free", "", str(model.folder))
    for name, model in tiny.BUILT_IN.items()
  },
  "sd3": Variant(mmdit.MMDiTConfig, "classifier_free", "sd3", ""),
  "flux": Variant(flux.FluxConfig, "embedded", "flux", ""),
}


def build_transformer(
  config: Sizes, *, dtype=jnp.float32, remat: str = "none", guidance: float | None = None
) -> Callable[[jax.Array], nnx.Module]:
  """Returns a function key -> MMDiT or Flux, pure, so that jax.eval_shape serves it.

  Args:
    config: sizes.
    dtype: compute dtype.
    remat: what the backward pass recomputes.
    guidance: the scale that a FLUX.1-dev is told.
  """

  def create(key):
    options = dict(dtype=dtype, remat=remat, rngs=nnx.Rngs(params=key))
    if isinstance(config, flux.FluxConfig):
      return flux.Flux(config, guidance=guidance, **options)
    return mmdit.MMDiT(config, **options)

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


__all__ = [
  "MODELS",
  "Variant",
  "build_transformer",
  "hf",
  "lora",
  "make_velocity_fn",
  "mmdit",
  "tiny",
]
