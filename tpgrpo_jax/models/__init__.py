"""The models, and what turns their weights into pure functions."""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models import flux, flux2, flux2_vae, hf, lora, mmdit, tiny, tiny_vae, vae, z_image

Sizes = mmdit.MMDiTConfig | flux.FluxConfig | flux2.Flux2Config | z_image.ZImageConfig


class Variant(NamedTuple):
  """A family of models.

  Attributes:
    sizes: the class of a transformer's config.
    guidance: "classifier_free" evaluates the model with and without the prompt; "embedded" tells it the
      scale, where it was made for that (FLUX.1-dev).
    pipeline: family of the pipeline around it, of models.text_source.FAMILIES; "" for none.
    path: the weights that ship with the package; "" where none do.
    autoencoder: the class of its autoencoder's config.
    schedules: flow.schedule's names of what its pipeline calls a fixed and a dynamic shift.
    task: "paint" is from text alone, "edit" from a text and a picture, whose latents the model reads.
  """

  sizes: type
  guidance: str
  pipeline: str
  path: str = ""
  autoencoder: type = vae.VAEConfig
  schedules: tuple[str, str] = ("sd3", "flux")
  task: Literal["paint", "edit"] = "paint"


MODELS = {
  **{
    name: Variant(mmdit.MMDiTConfig, "classifier_free", "", str(model.folder))
    for name, model in tiny.BUILT_IN.items()
  },
  "sd3": Variant(mmdit.MMDiTConfig, "classifier_free", "sd3", schedules=("sd3", "sd3_dynamic")),
  "flux": Variant(flux.FluxConfig, "embedded", "flux"),
  "flux_kontext": Variant(flux.FluxConfig, "embedded", "flux_kontext", task="edit"),
  "flux2": Variant(
    flux2.Flux2Config,
    "classifier_free",
    "flux2",
    autoencoder=flux2_vae.Flux2VAEConfig,
    schedules=("shifted", "flux2"),
  ),
  "z_image": Variant(
    z_image.ZImageConfig, "classifier_free", "z_image", schedules=("shifted", "flux")
  ),
}
_TRANSFORMERS: dict[type, Any] = {
  mmdit.MMDiTConfig: mmdit.MMDiT,
  flux.FluxConfig: flux.Flux,
  flux2.Flux2Config: flux2.Flux2,
  z_image.ZImageConfig: z_image.ZImage,
}
_AUTOENCODERS: dict[type, Any] = {
  vae.VAEConfig: vae.AutoencoderKL,
  flux2_vae.Flux2VAEConfig: flux2_vae.AutoencoderKLFlux2,
  tiny_vae.TinyVAEConfig: tiny_vae.AutoencoderTiny,
}


def build_transformer(
  config: Sizes, *, dtype=jnp.float32, remat: str = "none", guidance: float | None = None
) -> Callable[[jax.Array], nnx.Module]:
  """Returns a function key -> transformer, pure, so that jax.eval_shape serves it.

  Args:
    config: sizes.
    dtype: compute dtype.
    remat: what the backward pass recomputes.
    guidance: the scale that a FLUX.1-dev is told.
  """

  def create(key):
    told = {} if guidance is None else {"guidance": guidance}
    options = dict(dtype=dtype, remat=remat, rngs=nnx.Rngs(params=key))
    return _TRANSFORMERS[type(config)](config, **options, **told)

  return create


def build_autoencoder(
  config: vae.VAEConfig | tiny_vae.TinyVAEConfig, *, dtype=jnp.float32
) -> Callable[[jax.Array], vae.AutoencoderKL | tiny_vae.AutoencoderTiny]:
  """Returns a function key -> autoencoder, pure, so that jax.eval_shape serves it."""

  def create(key):
    return _AUTOENCODERS[type(config)](config, dtype=dtype, rngs=nnx.Rngs(params=key))

  return create


def velocity_fn(graphdef: Any, params: Any, x, sigma, condition: types.Condition) -> jax.Array:
  """The model as a pure function: (params, x [B, h, w, c], sigma [B], condition) -> velocity.

  Args:
    graphdef: the model's structure, bound with functools.partial.
    params: {"frozen": tree, "trainable": tree}; the two together are the model's weights.
  """
  model = nnx.merge(graphdef, lora.merge_trees(params["frozen"], params["trainable"]))
  given = {name: value for name, value in vars(condition).items() if value is not None}
  return model(x, sigma, **given)


def make_velocity_fn(graphdef: Any) -> types.VelocityFn:
  """Binds a model's structure."""
  return functools.partial(velocity_fn, graphdef)


def images_uint8(images: jax.Array) -> jax.Array:
  """Images in [0, 1] -> uint8, rounded."""
  return jnp.round(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


__all__ = [
  "MODELS",
  "Variant",
  "build_autoencoder",
  "build_transformer",
  "hf",
  "lora",
  "make_velocity_fn",
  "mmdit",
  "tiny",
]
