"""The rewards of the devices as shapes, so that they can be compiled without their weights."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.forecasting import lowering
from tpgrpo_jax.models import clip, dina, hf, mmdit
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.rewards import clip_score, latents, preprocess, towers
from tpgrpo_jax.rewards import dina as dina_reward
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

HUB_SIZES = {
  "yuvalkirstain/PickScore_v1": clip.VIT_H_14,
  "openai/clip-vit-large-patch14": clip.VIT_L_14,
}
# label -> (cosine, scale) -> score, as the rewards of those names have it.
_SCORES = {
  "pickscore": lambda cos, scale: scale * cos,
  "clipscore": lambda cos, scale: clip_score.CLIPSCORE_WEIGHT * jnp.maximum(cos, 0.0),
}


def on_devices(config: config_lib.Config) -> tuple[list[dict[str, Any]], list[str]]:
  """(options of the device rewards that can be compiled here, names of those that cannot)."""
  able, unable = [], []
  for label, value in config.rewards.items():
    options = {"make": label} | (value if isinstance(value, dict) else {})
    if options["make"] not in {**rewards.DEVICE_REWARDS, **rewards.LATENT_REWARDS}:
      continue
    known = _sizes(options) is not None
    (able if known else unable).append(options if known else options["make"])
  return able, unable


def program(plan: lowering.Plan, options: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
  """(jitted function, args, kwargs) of one reward on the images, or latents, of one microbatch.

  Args:
    plan: of the run.
    options: as of `on_devices`.
  """
  if options["make"] in rewards.LATENT_REWARDS:
    return _of_latents(plan, options)
  sizes: Any = _sizes(options)
  dtype = towers.DTYPES[options.get("dtype", "float32")]
  create = lambda rngs: clip.CLIP(sizes, dtype=dtype, rngs=rngs)
  graphdef, abstract = encoder.outline(create, dtype)
  model = encoder.Encoder(sizes, graphdef, mesh_lib.abstract(plan.mesh, abstract))
  score = towers.text_image_score(model, preprocess.clip_pixels, _SCORES[options["make"]])
  count = plan.images
  arrays = (
    jax.ShapeDtypeStruct((count, *plan.image_shape), jnp.uint8),
    jax.ShapeDtypeStruct((count, sizes.text.max_position_embeddings), jnp.int32),
  )
  batch = options.get("batch", towers.BATCH)
  shards = mesh_lib.batch_shards(plan.mesh)
  run = functools.partial(towers.run_chunks, score, batch=batch, shards=shards)
  return jax.jit(run), (model.weights, lowering.divided(plan.mesh, arrays)), {}


def _of_latents(plan, options):
  """`program` of DiNa-LRM, with a head of the public one's form."""
  taps, sizes = tuple(options.get("taps", dina_reward.TAPS)), _sizes(options)
  assert isinstance(sizes, mmdit.MMDiTConfig)  # the config's rules have looked
  config = dina.BackboneConfig(sizes, taps)
  head = dina.HeadConfig(config.transformer.width, config.transformer.width, len(taps))
  dtype = towers.DTYPES[options.get("dtype", "float32")]
  backbone, weights = encoder.outline(lambda r: dina.Backbone(config, dtype=dtype, rngs=r), dtype)
  ending, others = encoder.outline(lambda r: dina.Head(head, dtype=dtype, rngs=r), dtype)
  weights = mesh_lib.abstract(plan.mesh, {"backbone": weights, "head": others})
  score = dina_reward.make_score(backbone, ending, dina_reward.NOISE_LEVEL)
  each = plan.latents // plan.states
  shape = (plan.states, each, *plan.model.pipeline.latent_shape)
  x = lowering.divided(plan.mesh, jax.ShapeDtypeStruct(shape, jnp.float32))
  levels = jax.ShapeDtypeStruct((each,), jnp.float32)
  condition = method_lib.positive(lowering.condition(plan, plan.states))
  run = functools.partial(latents.run_states, score)
  return jax.jit(run), (weights, x, levels, condition), {}


def _sizes(options):
  """Of the reward's model, from its folder or hub id; None where they are not known."""
  path = str(options.get("path", ""))
  if options["make"] in rewards.LATENT_REWARDS:
    folder = pathlib.Path(path)
    if folder.is_dir():
      return hf.load_config(hf.resolve(folder, subfolder="transformer"))
    return lowering.HUB_SIZES[path][0] if path in lowering.HUB_SIZES else None
  if options["make"] not in _SCORES:
    return None
  if pathlib.Path(path, encoder.CONFIG_FILE).is_file():
    return clip.CLIPConfig.from_transformers(encoder.load_json(path))
  return HUB_SIZES.get(path)
