"""What stands around the transformer: text before it, pixels after it."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import pathlib
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from tpgrpo_jax import caches, models, types
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.models import hf, prompt_cache, prompt_embedding, text_source, tiny, tiny_vae, vae
from tpgrpo_jax.models.hf import files, table
from tpgrpo_jax.training import editing
from tpgrpo_jax.training import mesh as mesh_lib

Autoencoder = vae.VAEConfig | tiny_vae.TinyVAEConfig


class Pipeline(NamedTuple):
  """The surroundings of a transformer.

  Attributes:
    latent_shape: (h, w, c) of one sample.
    encode: texts -> Condition of NumPy arrays.
    decode: (decoder, latents [N, h, w, c]) -> images [N, H, W, 3] float in [0, 1].
    decoder: the weights of `decode`, on the mesh.
    identity: part -> a name of its files' content.
    grid: what the noise levels take from the pipeline's scheduler: those of the keywords of
      flow.schedule.dynamic_mu that it sets, and "terminal", the last level above 0.
    add: (Condition of texts, their prompts) -> the same with what the model reads beside texts.
    show: prompts -> the prompts as rewards are given them.
    decode_completions: as `decode`, of the images that credit alone looks at; None where `decode` paints
      them.
    completion_decoder: the weights of `decode_completions`, on the mesh.
  """

  latent_shape: tuple[int, int, int]
  encode: Callable[[Sequence[str]], types.Condition]
  decode: Callable[[Any, jax.Array], jax.Array]
  decoder: Any
  identity: Mapping[str, str] = {}
  grid: Mapping[str, float] = {}
  add: Callable[..., types.Condition] = lambda condition, prompts: condition
  show: Callable[[Sequence[types.Prompt]], list[types.Prompt]] = list
  decode_completions: Callable[[Any, jax.Array], jax.Array] | None = None
  completion_decoder: Any = {}

  def condition(self, prompts: Sequence[types.Prompt | str]) -> types.Condition:
    """All that the model reads of prompts; bare texts are prompts without metadata."""
    return self.add(self.encode(types.texts_of(prompts)), prompts)

  def paint(self, params: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """Images uint8 [S, n, H, W, 3] of latents [S, n, h, w, c]: n - 1 completions, and the own one behind.

    Args:
      params: as of Model.params.
      latents: of a microbatch.
    """

    def paint(decode, weights, latents):
      images = models.images_uint8(decode(weights, latents.reshape(-1, *latents.shape[2:])))
      return images.reshape(*latents.shape[:2], *images.shape[1:])

    if self.decode_completions is None or latents.shape[1] == 1:
      return paint(self.decode, params["decoder"], latents)
    completed = paint(self.decode_completions, params["completion_decoder"], latents[:, :-1])
    own = paint(self.decode, params["decoder"], latents[:, -1:])
    return jnp.concatenate([completed, own], axis=1)


def open_pipeline(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  sizes: models.Sizes,
  prompts: Sequence[types.Prompt | str],
) -> Pipeline:
  """Opens what the config's variant needs around its transformer.

  Text encoders are loaded for prompts that are not in the cache, and freed before this returns.

  Args:
    config: of the run.
    mesh: for the decoder; the text encoders are divided over the devices of this process.
    sizes: of the transformer.
    prompts: all that will be asked for; with their metadata where the model edits pictures.

  Raises:
    ValueError: a wrong or partial folder, sizes that do not fit, a prompt or picture that cannot be read.
  """
  if models.MODELS[config.model.variant].pipeline:
    return _open_diffusers(config, mesh, sizes, prompts)
  assert isinstance(sizes, models.mmdit.MMDiTConfig)  # build_model has looked
  variant = config.model.variant
  shape = tiny.BUILT_IN[variant].latent_shape
  if not tiny.fits(variant, sizes):
    pixels = {1: "gray", 3: "coloured"}[shape[2]]
    fitting = [repr(name) for name in tiny.BUILT_IN if tiny.fits(name, sizes)] or ["'sd3'"]
    raise ValueError(
      f"model.path={config.model.path!r}: its transformer takes latents of {sizes.in_channels} channels and "
      f"text of width {sizes.joint_attention_dim}; model.variant={variant!r} paints {pixels} pixels and "
      f"reads bytes. Use model.variant={' or '.join(fitting)}."
    )
  around = tiny_pipeline(variant, sizes)
  texts = list(dict.fromkeys(types.texts_of(prompts)))
  for first in range(0, len(texts), 512):
    around.encode(texts[first : first + 512])  # says which prompt is too long
  size = (config.sampler.height, config.sampler.width)
  if any(size) and size != shape[:2]:
    raise ValueError(
      f"sampler.height={size[0]}, sampler.width={size[1]}: the model {variant!r} paints {shape[0]} x "
      f"{shape[1]} pixels. Leave both 0."
    )
  return around


def tiny_pipeline(variant: str, sizes: models.mmdit.MMDiTConfig) -> Pipeline:
  """Of a built-in model, which reads bytes and paints pixels itself."""
  built_in = tiny.BUILT_IN[variant]
  encode = functools.partial(built_in.encode, sizes)
  return Pipeline(built_in.latent_shape, encode, lambda decoder, latents: tiny.decode(latents), {})


def _open_diffusers(config, mesh, sizes, prompts):
  """A pipeline as the hub stores it."""
  root = _fetch(config)
  variant = models.MODELS[config.model.variant]
  edits = variant.task == "edit"
  (text_source.check_edits if edits else text_source.check_from_text)(root)
  folder = root / "vae"
  vae_config = hf.load_config(folder)
  if type(vae_config) is not variant.autoencoder:
    raise ValueError(
      f"{folder}: holds a {hf.class_name(vae_config)}, must be an {variant.autoencoder.CLASS}."
    )
  check_distilled(config.sampler, root)
  shape = latent_shape(config.sampler, sizes, vae_config)
  grid = read_scheduler(config.sampler, variant, root)
  source = _text_source(config, root)
  check_captions(source.length, sizes)
  beside_text = {}
  if edits:
    outline = autoencoder_outline(config.vae, vae_config)
    size = (shape[0] * vae_config.downscale, shape[1] * vae_config.downscale)
    beside_text = editing.open_pictures(config, folder, outline, size, prompts)._asdict()
  embedded = prompt_cache.embed_prompts(
    source,
    ["", *types.texts_of(prompts)],
    cache=caches.place("prompts", config.text.cache),
    shardings=prompt_embedding.on_cpu if config.text.device == "cpu" else _local_shardings,
  )
  decode, abstract = decoder_outline(config.vae, vae_config)
  shardings = mesh_lib.param_shardings(mesh, abstract)
  dtype = jnp.dtype(config.vae.dtype)
  decoder = hf.load_params(folder, abstract, shardings=shardings, dtype=dtype)
  identity = {"vae": hf.fingerprint(folder), "text": prompt_cache.identity(source)}
  if path := config.completion.decoder:
    field = "completion.decoder"
    small_folder = hf.resolve(path, field=field)
    small = hf.load_config(small_folder, field=field)
    check_completion_decoder(path, small, vae_config)
    paint, abstract = decoder_outline(config.vae, small)
    shardings = mesh_lib.param_shardings(mesh, abstract)
    weights = hf.load_params(small_folder, abstract, shardings=shardings, dtype=dtype, field=field)
    beside_text |= {"decode_completions": paint, "completion_decoder": weights}
    identity["completion decoder"] = hf.fingerprint(small_folder)
  return Pipeline(shape, embedded.embed, decode, decoder, identity, grid, **beside_text)


def check_completion_decoder(path: str, small: Any, sizes: vae.VAEConfig) -> None:
  """Raises ValueError where completion.decoder is no small decoder for this autoencoder's latents."""
  if not isinstance(small, tiny_vae.TinyVAEConfig):
    raise ValueError(
      f"completion.decoder={path!r}: holds a {hf.class_name(small)}, must be an "
      f"{tiny_vae.TinyVAEConfig.CLASS}, such as madebyollin/taesd3 for SD3 and madebyollin/taef1 for FLUX.1. "
      "Leave it empty for the pipeline's own."
    )
  found, wanted = (small.latent_channels, small.downscale), (sizes.scaled_channels, sizes.downscale)
  if found != wanted or small.out_channels != 3:
    raise ValueError(
      f"completion.decoder={path!r}: makes {small.out_channels} channels of latents with {found[0]}, "
      f"{found[1]} pixels each; the pipeline's autoencoder makes 3 of {wanted[0]}, {wanted[1]} pixels each. "
      "Use the one that was made for this family, or leave it empty."
    )


def decoder_outline(config: config_lib.Vae, sizes: Autoencoder) -> tuple[Callable[..., Any], Any]:
  """(`decode` of a Pipeline, the shapes of the weights it takes); nothing is computed."""
  graphdef, abstract = autoencoder_outline(config, sizes)
  decode = functools.partial(vae.decode_chunked, graphdef, images_per_chunk=config.images_per_chunk)
  return decode, abstract


def autoencoder_outline(config: config_lib.Vae, sizes: Autoencoder) -> tuple[Any, Any]:
  """(structure of an autoencoder, the shapes of its weights); nothing is computed."""
  create = models.build_autoencoder(sizes, dtype=jnp.dtype(config.dtype))
  model = jax.eval_shape(create, jax.random.key(0))
  graphdef, _, abstract = models.lora.split_trainable(model, rank=1)  # nothing of it is trained
  return graphdef, abstract


def _fetch(config):
  """The pipeline's folder, with all weights that this run reads."""
  path = config.model.path
  if pathlib.Path(path).is_dir():
    return pathlib.Path(path)
  family = text_source.FAMILIES[models.MODELS[config.model.variant].pipeline]
  encoders = [part.encoder for part in family.parts if config.text.t5 or part.kind != "t5"]
  folders = [hf.resolve(path, subfolder=name) for name in ("vae", *encoders)]
  return folders[0].parent


def _text_source(config, root):
  text = config.text
  return text_source.TextSource(
    root,
    models.MODELS[config.model.variant].pipeline,
    max_sequence_length=text.max_sequence_length or None,
    dtype=text.dtype,
    use_t5=text.t5,
  )


def _local_shardings(tree):
  """Divides weights over the devices of this process, so that each embeds what its own disk misses."""
  return mesh_lib.param_shardings(mesh_lib.local_mesh(), tree)


def latent_shape(
  sampler: config_lib.Sampler, sizes: models.Sizes, vae_config: vae.VAEConfig
) -> tuple[int, int, int]:
  """(h, w, c) of one latent.

  Raises:
    ValueError: a height or width that the patches do not divide or that the transformer has no
      positions for, or an autoencoder of other channels.
  """
  channels, patch, own, largest = sizes.latents
  if channels != vae_config.scaled_channels:
    raise ValueError(
      f"the transformer takes latents of {channels} channels, the autoencoder has "
      f"{vae_config.scaled_channels}: they belong to different models. Fetch the folder again."
    )
  pixels, sides = vae_config.downscale, []
  for name in ("height", "width"):
    value = getattr(sampler, name) or own * pixels
    unit = pixels * patch
    if value % unit:
      near = max(unit, value // unit * unit)
      raise ValueError(
        f"sampler.{name}={value}: must be a multiple of {unit}, the {pixels} pixels of a latent x the "
        f"{patch} latents of a patch. Use {near} or {near + unit}."
      )
    if largest and value > largest * pixels:
      raise ValueError(
        f"sampler.{name}={value}: the transformer has positions for {largest * pixels} pixels at most."
      )
    sides.append(value // pixels)
  return sides[0], sides[1], channels


def check_captions(length: int, sizes: models.Sizes) -> None:
  """Raises ValueError where the transformer has no places for all tokens of a caption."""
  if isinstance(sizes, models.z_image.ZImageConfig) and length > sizes.most_tokens:
    raise ValueError(
      f"text.max_sequence_length={length}: the transformer has places for {sizes.most_tokens} tokens of a "
      f"caption at most (axes_lens={sizes.axes_lens}). Set it to {sizes.most_tokens} or less."
    )


def check_distilled(sampler: config_lib.Sampler, root: pathlib.Path) -> None:
  """Raises ValueError for a guidance scale where the pipeline was distilled to do without."""
  index = text_source.read_index(root)
  if index.get("is_distilled") and sampler.guidance_scale > 1.0:
    raise ValueError(
      f"sampler.guidance_scale={sampler.guidance_scale}: this pipeline was distilled to do without guidance "
      f"({text_source.INDEX_FILE}: is_distilled is true, as in FLUX.2-klein-4B). Set it to 1, or take the "
      "base model."
    )


# Fields of diffusers' FlowMatchEulerDiscreteScheduler: under what name the grid takes them, and of the others
# the only value that is followed.
_OF_GRID = {
  "base_shift": "base_shift", "max_shift": "max_shift", "base_image_seq_len": "base_tokens",
  "max_image_seq_len": "max_tokens", "shift_terminal": "terminal",
}  # fmt: skip
_FOLLOWED = {
  "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "invert_sigmas": False,
  "time_shift_type": "exponential", "use_karras_sigmas": False, "use_exponential_sigmas": False,
  "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip

_ANY = (-math.inf, math.inf, "a finite number")
_SIZE = (0, math.inf, "a finite number above 0")
# What lies between two numbers, neither of which it is.
_RANGES = {
  "shift": _SIZE, "base_image_seq_len": _SIZE, "max_image_seq_len": _SIZE,
  "shift_terminal": (0, 1, "a number between 0 and 1"),
}  # fmt: skip


def read_scheduler(
  sampler: config_lib.Sampler, variant: models.Variant, root: pathlib.Path
) -> dict[str, float]:
  """What the noise levels take from the pipeline's own scheduler (`Pipeline.grid`).

  Warns where the config asks for another schedule or shift than the pipeline was made for, and of each
  field that is not followed.

  Raises:
    ValueError: a field of another type, or a number out of its range.
  """
  path = root / "scheduler" / "scheduler_config.json"
  if not path.is_file():
    return {}
  stored = files.read_json(path)
  shift = stored.get("shift", 1.0)
  numbers = {"shift": shift} | {k: stored[k] for k in _OF_GRID if stored.get(k) is not None}
  for name, value in numbers.items():
    least, most, rule = _RANGES.get(name, _ANY)
    if not (table.is_finite(value) and least < value < most):
      raise ValueError(f"{path}: {name}={value!r}: must be {rule}. Fetch the file again.")
  dynamic_shift = stored.get("use_dynamic_shifting", False)
  if not isinstance(dynamic_shift, bool):
    raise ValueError(
      f"{path}: use_dynamic_shifting={dynamic_shift!r}: must be true or false. Fetch the file again."
    )
  base, most = numbers.get("base_image_seq_len", 256), numbers.get("max_image_seq_len", 4096)
  if base >= most:
    raise ValueError(
      f"{path}: max_image_seq_len={most}: must be above base_image_seq_len={base}. Fetch the file again."
    )
  ignored = [f"{k}={stored[k]!r}" for k, v in _FOLLOWED.items() if stored.get(k, v) != v]
  if ignored:
    warnings.warn(
      f"{path}: {', '.join(ignored)}: not followed here. Pictures differ from the pipeline's own.",
      stacklevel=2,
    )
  fixed, dynamic = variant.schedules
  found = (fixed, shift) if shift != 1.0 else ("linear", shift)
  if dynamic_shift:
    found = (dynamic, sampler.shift)
  asked = (sampler.schedule, sampler.shift if sampler.schedule == fixed else found[1])
  if asked != found:
    warnings.warn(
      f"sampler.schedule={sampler.schedule!r}, shift={sampler.shift}: the pipeline was made for "
      f"{found[0]!r}" + (f", shift={shift}" if found[0] == fixed else "") + f" ({path}).",
      stacklevel=2,
    )
  kind = lambda name: int if name.endswith("seq_len") else float
  return {_OF_GRID[k]: kind(k)(v) for k, v in numbers.items() if k in _OF_GRID}
