"""From a config to a model with its weights on the mesh."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import logging
import pathlib
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, registry, types
from tpgrpo_jax.models import hf, layers, lora, quantize
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import pipeline

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
  """A transformer with its weights on the mesh.

  Attributes:
    config: sizes, as loaded.
    velocity_fn: of one Condition; params are {"frozen", "trainable"}.
    base_velocity_fn: the same without adapters.
    frozen: weights that never change.
    trainable: their initial values.
    pipeline: what stands around it; None for a transformer alone.
    identity: part of the pipeline -> a name of its files' content.
  """

  config: models.Sizes
  velocity_fn: types.VelocityFn
  base_velocity_fn: types.VelocityFn
  frozen: Any
  trainable: Any
  pipeline: Any = None
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def params(self, trainable: Any) -> dict[str, Any]:
    """What sampling takes: the weights with these trainable ones, and the decoders'."""
    around = self.pipeline
    decoders = (around.decoder, around.completion_decoder) if around else ({}, {})
    weights = {"frozen": self.frozen, "trainable": trainable}
    return weights | dict(zip(("decoder", "completion_decoder"), decoders))


class Draft(NamedTuple):
  """What is known of a model before any weight is read.

  Attributes:
    folder: of its transformer.
    sizes: as its config.json has them.
    outline: of its weights.
  """

  folder: pathlib.Path
  sizes: models.Sizes
  outline: "Outline"


def draft(config: config_lib.Config) -> Draft:
  """Reads the config.json of the transformer.

  Raises:
    ValueError: no such variant or folder, a folder of another model, LoRA targets that match nothing, a
      guidance scale that the model cannot be told.
  """
  variant = registry.lookup(models.MODELS, config.model.variant, field="model.variant")
  folder = hf.resolve(config.model.path or variant.path, subfolder="transformer")
  sizes = hf.load_config(folder)
  if type(sizes) is not variant.sizes:
    known = [n for n, v in models.MODELS.items() if v.sizes is type(sizes) and v.pipeline]
    raise ValueError(
      f"model.path={config.model.path!r}: holds a {hf.class_name(sizes)}, but model.variant="
      f"{config.model.variant!r} is another model. Use model.variant={' or '.join(map(repr, known))}."
      if known
      else f"model.path={config.model.path!r}: holds a {hf.class_name(sizes)}, which is no transformer "
      "that can be trained. Point it at the pipeline's folder."
    )
  return Draft(folder, sizes, outline(config, sizes))


def drafted_model(config: config_lib.Config, drafted: Draft) -> Model:
  """The model with shapes in place of weights, and one patch as its picture: for counting."""
  patch, structure = drafted.sizes.latents.patch, drafted.outline
  base = lora.merge_trees(structure.base, structure.buffers)
  unused = lambda *args: None
  return Model(
    config=drafted.sizes,
    velocity_fn=models.make_velocity_fn(structure.graphdef),
    base_velocity_fn=models.make_velocity_fn(structure.base_graphdef),
    frozen=base if config.lora.rank else structure.buffers,
    trainable=structure.adapters,
    pipeline=pipeline.Pipeline((patch, patch, 1), unused, unused, {}),  # pyright: ignore[reportArgumentType]
  )


def build_model(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  prompts: Sequence[types.Prompt | str] | None = None,
  drafted: Draft | None = None,
) -> Model:
  """Loads the weights and lays them out on the mesh.

  Args:
    config: of the run.
    mesh: of the run.
    prompts: all that the model will be asked for, texts where no metadata is read; None opens the
      transformer alone.
    drafted: of the same config; None makes it.

  Raises:
    ValueError: as `draft`, or weights or adapters that do not fit.
  """
  folder, sizes, structure = drafted or draft(config)
  # Before the transformer: the text encoders are gone when it comes.
  surroundings = None if prompts is None else pipeline.open_pipeline(config, mesh, sizes, prompts)
  dtype = jnp.dtype(config.model.dtype)
  adapters, base, buffers = structure.adapters, structure.base, structure.buffers
  abstract = lora.merge_trees(base, buffers)
  load = functools.partial(
    hf.load_params, folder, abstract, shardings=mesh_lib.param_shardings(mesh, abstract)
  )
  if config.lora.rank:
    layout = mesh_lib.param_shardings(mesh, adapters)
    if config.lora.path:
      adapter = hf.load_lora(config.lora.path, sizes, abstract)
      _check_adapter(config.lora, adapter, adapters)
      trainable = jax.device_put(adapter.trainable, layout)
    else:
      create = lambda key: structure.create(key)[1]
      trainable = jax.jit(create, out_shardings=layout)(jax.random.key(config.seed))
    frozen = load(dtype=dtype)
    if config.model.quantize:
      frozen = quantize.quantize(frozen, config.model.quantize)
  else:
    loaded = load(dtype=np.float32)
    trainable, frozen = _like(base, loaded), _like(buffers, loaded)
  return Model(
    config=sizes,
    velocity_fn=models.make_velocity_fn(structure.graphdef),
    base_velocity_fn=models.make_velocity_fn(structure.base_graphdef),
    frozen=frozen,
    trainable=trainable,
    pipeline=surroundings,
    identity={
      "transformer": hf.fingerprint(folder),
      **(surroundings.identity if surroundings else {}),
    },
  )


def jit(config: config_lib.Config, program: Callable[..., Any], **options: Any) -> Any:
  """jax.jit for rollout and update, compiled so that both round alike where XLA can be told to.

  On a CPU XLA hands matrix products to YNNPACK, which sums in another order than XLA's own loops. Whether
  a product goes there depends on what XLA fuses it with, and that differs between rollout and update. In
  bfloat16 the difference moves some results by a whole rounding step, and guidance and blocks amplify it:
  the first log-ratio was 9e-4 where it must be 0. Float32 stays as it is.
  """
  if config.model.dtype != "float32" and layers.platform() == "cpu":
    options["compiler_options"] = _without_ynnpack()
  return jax.jit(program, **options)


@functools.cache
def _without_ynnpack():
  """XLA's option for it; None where this version has no such option."""
  options = {"xla_cpu_experimental_ynn_fusion_type": ""}
  try:
    jax.jit(lambda: 0, compiler_options=options).lower().compile()
  except jax.errors.JaxRuntimeError:
    return None
  return options


def without_remat(config: config_lib.Config, model: Model) -> Model:
  """The same model, whose backward pass computes nothing twice: what it does is the model's own work."""
  if config.model.remat == "none":
    return model
  plain = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
  structure = outline(plain, model.config)
  return dataclasses.replace(
    model,
    velocity_fn=models.make_velocity_fn(structure.graphdef),
    base_velocity_fn=models.make_velocity_fn(structure.base_graphdef),
  )


class Outline(NamedTuple):
  """A model before its weights.

  Attributes:
    create: key -> (graphdef, trainable, frozen) with fresh weights; pure.
    graphdef: with adapters, where the config has them.
    base_graphdef: without.
    adapters: shapes of what is trained with LoRA (all weights without).
    base: shapes of the weights that files hold and that can be trained.
    buffers: shapes of those that never are.
  """

  create: Callable[[jax.Array], tuple[Any, Any, Any]]
  graphdef: Any
  base_graphdef: Any
  adapters: Any
  base: Any
  buffers: Any


def outline(config: config_lib.Config, sizes: models.Sizes) -> Outline:
  """What `build_model` fills with weights; nothing is computed, and nothing twice."""
  settings, adapters = config.model, dataclasses.replace(config.lora, path="")
  return _outline(
    sizes, settings.dtype, settings.remat, _told_guidance(config, sizes), adapters, config.seed
  )


@functools.lru_cache(maxsize=16)
def _outline(sizes, dtype, remat, guidance, adapters, seed):
  create = models.build_transformer(sizes, dtype=jnp.dtype(dtype), remat=remat, guidance=guidance)

  def create_adapted(key):
    model_key, lora_key = jax.random.split(key)
    model = create(model_key)
    if adapters.rank:
      lora.add_lora(
        model,
        lora_key,
        rank=adapters.rank,
        alpha=adapters.alpha,
        init=adapters.init,
        targets=adapters.targets,
      )
    return lora.split_trainable(model, rank=adapters.rank)

  key = jax.random.key(seed)
  graphdef, trainable, _ = _structure(create_adapted, key)
  base_graphdef, base, buffers = _structure(lambda k: lora.split_trainable(create(k), rank=0), key)
  return Outline(create_adapted, graphdef, base_graphdef, trainable, base, buffers)


def _told_guidance(config, sizes):
  """The guidance scale that is an input of the model, or None."""
  scale = config.sampler.guidance_scale
  if models.MODELS[config.model.variant].guidance != "embedded":
    if getattr(sizes, "guidance_embeds", False):
      raise ValueError(
        f"model.path={config.model.path!r}: its transformer is told a guidance scale (config.json: "
        "guidance_embeds is true, as in FLUX.2-dev), which is not trained here. Use a FLUX.2-klein."
      )
    return None
  if sizes.guidance_embeds:
    return scale
  if scale > 1.0:
    raise ValueError(
      f"sampler.guidance_scale={scale}: this model knows no guidance (FLUX.1-schnell was made to do "
      "without; config.json: guidance_embeds is false). Set it to 1."
    )
  return None


def _check_adapter(lora_config, adapter, wanted):
  """Raises ValueError unless the file's adapters are those that the config describes."""
  found, asked = hf.flatten(adapter.trainable), hf.flatten(wanted)
  rows = [("lora.rank", lora_config.rank, adapter.rank)]
  if adapter.states_alpha:
    rows.append(("lora.alpha", lora_config.alpha, adapter.alpha))
  elif lora_config.alpha != adapter.alpha:
    warnings.warn(
      f"lora.path={lora_config.path!r}: does not say its alpha. lora.alpha={lora_config.alpha} is taken; "
      f"diffusers and ComfyUI would take the rank, {adapter.alpha}.",
      stacklevel=2,
    )
  if found.keys() != asked.keys():
    rows.append(("lora.targets", lora_config.targets, adapter.targets))
  differences = [
    f"  {name}={ours!r}: the file has {its!r}" for name, ours, its in rows if ours != its
  ]
  if differences:
    raise ValueError(
      f"lora.path={lora_config.path!r}: its adapters are not those of the config. Set the config to "
      "the file's values:\n" + "\n".join(differences)
    )


def _structure(create, key):
  """(graphdef, abstract trainable, abstract frozen); nothing is computed."""
  kept = {}

  def shapes(key):
    kept["graphdef"], *trees = create(key)
    return trees

  trainable, frozen = jax.eval_shape(shapes, key)
  return kept["graphdef"], trainable, frozen


def _like(shape_tree, tree):
  """The part of `tree` that `shape_tree` names."""
  if not isinstance(shape_tree, dict):
    return tree
  return {k: _like(v, tree[k]) for k, v in shape_tree.items()}
