"""A run's programs from shapes alone: nothing is loaded, and the devices need not exist."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, rewards, types
from tpgrpo_jax.flow import completion
from tpgrpo_jax.models import (
  flux,
  flux2,
  flux2_vae,
  hf,
  lora,
  mmdit,
  quantize,
  text_source,
  tiny_vae,
  vae,
  z_image,
)
from tpgrpo_jax.training import batches, build, losses, pipeline, rollout, step
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib

_VAE: dict[str, Any] = dict(
  block_out_channels=(128, 256, 512, 512),
  layers_per_block=2,
  latent_channels=16,
  use_quant_conv=False,
  use_post_quant_conv=False,
)
_FLUX_VAE = vae.VAEConfig(scaling_factor=0.3611, shift_factor=0.1159, **_VAE)
_KLEIN_4B = flux2.Flux2Config(
  num_layers=5,
  num_single_layers=20,
  num_attention_heads=24,
  joint_attention_dim=7680,
  guidance_embeds=False,
)
# The released models of the recipes, as config.json on the hub has them: (transformer, autoencoder).
HUB_SIZES: dict[str, tuple[models.Sizes, vae.VAEConfig]] = {
  "stabilityai/stable-diffusion-3.5-medium": (
    mmdit.MMDiTConfig(
      num_layers=24,
      num_attention_heads=24,
      caption_projection_dim=1536,
      pos_embed_max_size=384,
      qk_norm="rms_norm",
      dual_attention_layers=tuple(range(13)),
    ),
    vae.VAEConfig(scaling_factor=1.5305, shift_factor=0.0609, **_VAE),
  ),
  "black-forest-labs/FLUX.1-dev": (flux.FluxConfig(guidance_embeds=True), _FLUX_VAE),
  "black-forest-labs/FLUX.1-Kontext-dev": (flux.FluxConfig(guidance_embeds=True), _FLUX_VAE),
  "black-forest-labs/FLUX.2-klein-base-4B": (_KLEIN_4B, flux2_vae.Flux2VAEConfig()),
  "black-forest-labs/FLUX.2-klein-4B": (_KLEIN_4B, flux2_vae.Flux2VAEConfig()),
  "black-forest-labs/FLUX.2-klein-base-9B": (
    flux2.Flux2Config(
      num_layers=8,
      num_single_layers=24,
      num_attention_heads=32,
      joint_attention_dim=12288,
      guidance_embeds=False,
    ),
    flux2_vae.Flux2VAEConfig(),
  ),
  "Tongyi-MAI/Z-Image": (z_image.ZImageConfig(), _FLUX_VAE),
  "Tongyi-MAI/Z-Image-Turbo": (z_image.ZImageConfig(), _FLUX_VAE),
}
TINY_VAES = {
  f"madebyollin/{name}": tiny_vae.TinyVAEConfig(latent_channels=16) for name in ("taesd3", "taef1")
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run on a mesh, with shapes in place of weights.

  Attributes:
    config: of the run.
    mesh: of its devices.
    model: its weights are jax.ShapeDtypeStruct with a sharding.
    method: the run's own functions.
    state: of training, likewise shapes.
    reference: params of the adapter-free model; {} without a KL term.
  """

  config: config_lib.Config
  mesh: jax.sharding.Mesh
  model: build.Model
  method: method_lib.Method
  state: state_lib.TrainState
  reference: Any

  @property
  def microbatches(self) -> int:
    """In an epoch."""
    train = self.config.train
    return train.prompts_per_epoch * train.group_size // train.microbatch

  @property
  def place(self) -> np.ndarray:
    """Where the noise goes in the first microbatch."""
    return method_lib.draw_place(self.config, 0, 0).astype(np.int32)

  @property
  def completions(self) -> types.Plan | None:
    """How the completions are packed."""
    return method_lib.build_plan(self.config, self.method, self.place)

  @property
  def states(self) -> int:
    """S of a microbatch: its samples, or its anchors."""
    return self.config.train.microbatch // self.method.members

  @property
  def latents(self) -> int:
    """Scored of one microbatch: those of its trajectories or anchors, and all completions or noisy states."""
    segments = 0 if self.completions is None else len(self.completions.state)
    if self.method.credit.completions == "states":
      segments = self.method.window
    return self.states + segments * self.config.train.microbatch

  @property
  def images(self) -> int:
    """Of them, those that are decoded: all, or none where no reward looks at pictures."""
    return self.latents if rewards.reads(self.config.rewards).pictures else 0

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, 3)."""
    _, decoder = load_sizes(self.config)
    height, width, _ = self.model.pipeline.latent_shape
    scale = 1 if decoder is None else decoder.downscale
    return height * scale, width * scale, 3

  @property
  def passes(self) -> int:
    """Passes through the transformer in a rollout, one after the other."""
    count, plan = self.config.sampler.num_steps, self.completions
    if plan is None:
      return count
    most = self.config.completion.lanes_per_chunk
    slots = completion.num_lane_evaluations(plan, lanes_per_chunk=most)
    return count + slots // completion.chunk_size(plan.load.shape[1], most)


def open_plan(config: config_lib.Config, mesh: jax.sharding.Mesh) -> Plan:
  """Binds the config as training does.

  Raises:
    ValueError: a mesh that does not divide the microbatch, or a model whose sizes are not known here.
  """
  mesh_lib.check_microbatch(config, mesh)
  model = abstract_model(config, mesh)
  method = method_lib.build_method(config, model, shards=mesh_lib.batch_shards(mesh))
  objective = losses.OBJECTIVES[config.loss.objective]
  state = state_lib.abstract_state(
    model.trainable, method.optimizer, mesh, keeps_old=objective.keeps_old
  )
  reference = {}
  if config.loss.kl_coef:
    trained = {} if config.lora.rank else model.trainable
    reference = {"frozen": model.frozen, "trainable": trained}
  return Plan(config, mesh, model, method, state, reference)


def load_sizes(config: config_lib.Config) -> tuple[models.Sizes, vae.VAEConfig | None]:
  """Sizes of transformer and autoencoder: from the folder at model.path, or of a hub id from HUB_SIZES.

  Raises:
    ValueError: a hub id that is not in HUB_SIZES.
  """
  variant = models.MODELS[config.model.variant]
  path = config.model.path or variant.path
  if pathlib.Path(path).is_dir():
    sizes: Any = hf.load_config(hf.resolve(path, subfolder="transformer"))
    decoder: Any = hf.load_config(pathlib.Path(path) / "vae") if variant.pipeline else None
    return sizes, decoder
  if path not in HUB_SIZES:
    raise ValueError(
      f"model.path={path!r}: is no folder here, and nothing is fetched. Give a folder with the pipeline's "
      f"config.json files (no weights are read), or one of {', '.join(HUB_SIZES)}."
    )
  return HUB_SIZES[path]


def load_completion_decoder(path: str) -> Any:
  """Its sizes: from a folder, or of a hub id from TINY_VAES; raises ValueError for other hub ids."""
  if not pathlib.Path(path).is_dir() and path not in TINY_VAES:
    raise ValueError(
      f"completion.decoder={path!r}: is no folder here, and nothing is fetched. Give a folder with its "
      f"config.json (no weights are read), or one of {', '.join(TINY_VAES)}."
    )
  return TINY_VAES.get(path) or hf.load_config(path, field="completion.decoder")


def abstract_model(config: config_lib.Config, mesh: jax.sharding.Mesh) -> build.Model:
  """What `build.build_model` makes, without weights."""
  sizes, decoder_sizes = load_sizes(config)
  structure = build.outline(config, sizes)
  if config.lora.rank:
    trainable = structure.adapters
    base = lora.merge_trees(structure.base, structure.buffers)
    frozen = _stored(base, config.model.dtype)
    if config.model.quantize:
      frozen = quantize.quantize(frozen, config.model.quantize)
  else:
    trainable, frozen = structure.base, structure.buffers
  surroundings = _abstract_pipeline(config, mesh, sizes, decoder_sizes)
  return build.Model(
    config=sizes,
    velocity_fn=models.make_velocity_fn(structure.graphdef),
    base_velocity_fn=models.make_velocity_fn(structure.base_graphdef),
    frozen=mesh_lib.abstract(mesh, frozen),
    trainable=mesh_lib.abstract(mesh, trainable),
    pipeline=surroundings,
  )


def _abstract_pipeline(config, mesh, sizes, decoder_sizes):
  """`encode` gives shapes, of one prompt's embedding."""
  if decoder_sizes is None:
    return pipeline.tiny_pipeline(config.model.variant, sizes)
  variant = models.MODELS[config.model.variant]
  name = variant.pipeline
  family, dtype = text_source.FAMILIES[name], jnp.dtype(config.text.dtype)
  tokens = config.text.max_sequence_length or family.max_sequence_length
  tokens += 77 if name == "sd3" else 0  # CLIP's tokens stand before T5's, or zeros in their place
  shape = pipeline.latent_shape(config.sampler, sizes, decoder_sizes)
  gives = (*family.gives, *(["image"] if variant.task == "edit" else []))
  shapes = {
    "text": ((tokens, sizes.joint_attention_dim), dtype),
    "pooled": ((getattr(sizes, "pooled_projection_dim", 0),), dtype),
    "length": ((), jnp.dtype("int32")),
    "image": (shape, jnp.dtype("float32")),
  }

  def encode(prompts):
    made = {n: jax.ShapeDtypeStruct((len(prompts), *shapes[n][0]), shapes[n][1]) for n in gives}
    return types.Condition(**made)  # pyright: ignore[reportArgumentType]

  decode, abstract = pipeline.decoder_outline(config.vae, decoder_sizes)
  stored = lambda weights: mesh_lib.abstract(mesh, _stored(weights, config.vae.dtype))
  found = pipeline.Pipeline(shape, encode, decode, stored(abstract))
  if path := config.completion.decoder:
    small = load_completion_decoder(path)
    pipeline.check_completion_decoder(path, small, decoder_sizes)
    paint, abstract = pipeline.decoder_outline(config.vae, small)
    found = found._replace(decode_completions=paint, completion_decoder=stored(abstract))
  return found


def rollout_program(plan: Plan) -> tuple[Any, tuple, dict[str, Any]]:
  """(jitted function, args, kwargs) of one microbatch: sampler, completions and decoding are one program."""
  sample = rollout.make_rollout_fn(plan.config, plan.model, plan.method)
  assert isinstance(sample, functools.partial)
  key = jax.eval_shape(lambda: jax.random.key(0))
  group = divided(plan.mesh, jax.ShapeDtypeStruct((plan.states, 2), jnp.int32))
  params = plan.model.params(plan.state.trainable)
  args = (params, key, 0, group, condition(plan), plan.place, plan.completions)
  return sample.func, args, sample.keywords


def update_program(plan: Plan) -> tuple[Any, tuple, dict[str, Any]]:
  """(jitted function, args, kwargs) of one optimizer update."""
  train, rows = plan.config.train, plan.method.window
  share = plan.microbatches
  if train.updates_by == "samples":
    share //= train.updates_per_epoch
  else:
    rows //= train.updates_per_epoch
  forward = plan.config.sampler.rollout == "ode"
  pieces = batches.Batch(
    [transitions(plan, 0 if forward else rows)] * share,
    [condition(plan)] * share,
    np.zeros((share, rows, train.microbatch), np.float32),
    np.ones((share, rows, train.microbatch), np.float32),
    np.ones((share, rows, plan.states), np.float32) if forward else None,
    jax.eval_shape(lambda: jax.random.key(0)) if forward else None,
  )
  batch = jax.eval_shape(functools.partial(batches.stacked, plan.config), pieces)
  taken = ("transitions", "conditions")
  laid = {n: _behind_an_axis(getattr(batch, n), getattr(pieces, n)[0]) for n in taken}
  batch = dataclasses.replace(batch, **laid)
  make = step.make_train_step
  if scores_itself(plan.config):
    make, batch = step.make_rescoring_step, dataclasses.replace(batch, phase=np.int32(0))
  args = (plan.state, plan.model.frozen, plan.reference, batch)
  return make(plan.config, plan.method), args, {}


def scores_itself(config: config_lib.Config) -> bool:
  """Whether old log-probs are the update's own from the start; with "auto" a run may change to it."""
  has_ratio = losses.OBJECTIVES[config.loss.objective].has_ratio
  return has_ratio and config.loss.old_log_prob == "update"


def _behind_an_axis(whole, one):
  """The shapes of `whole`, laid out as those of `one` behind another axis."""

  def place(whole, one):
    spec = P(None, *one.sharding.spec)
    return jax.ShapeDtypeStruct(
      whole.shape, whole.dtype, sharding=NamedSharding(one.sharding.mesh, spec)
    )

  return jax.tree.map(place, whole, one)


def condition(plan: Plan, rows: int | None = None) -> Any:
  """The shapes of a microbatch's embedded prompts; `rows` of them, or as many as the rollout takes."""
  prompts = ["A"] * (rows or plan.states // plan.method.neighbours)
  return divided(plan.mesh, method_lib.build_condition(plan.config, plan.model, prompts))


def transitions(plan: Plan, rows: int | None = None) -> types.Transitions:
  """The shapes of a microbatch's transitions, divided as the sampler leaves them: along its states.

  Args:
    plan: of the run.
    rows: steps that they hold; None for all that the rollout keeps.
  """
  if rows is None:
    rows = 0 if plan.config.sampler.rollout == "ode" else plan.method.window
  latent, kept = plan.model.pipeline.latent_shape, jnp.dtype(plan.config.sampler.latents)

  def shape(*dims, spec, dtype=np.dtype("float32")) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(plan.mesh, spec))

  across = P(None, mesh_lib.BATCH)
  members = (rows, plan.states, plan.method.members)
  level = shape(rows, spec=P())
  velocity = shape(rows, plan.states, *latent, spec=across)
  follows = plan.config.sampler.rollout == "trajectory"  # each state the one before
  return types.Transitions(
    states=shape(rows + follows, plan.states, *latent, spec=across, dtype=kept),
    members=None if follows else shape(*members, *latent, spec=across, dtype=kept),
    velocity=velocity if losses.reads_old_velocity(plan.config) else None,
    log_prob=shape(*members, spec=across),
    sigma=level,
    sigma_next=level,
    final=shape(plan.states, *latent, spec=P(mesh_lib.BATCH)),
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes that a tree of shapes with shardings takes on one device; arrays without one are copied."""

  def count(leaf):
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf, np.int32)
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(count(leaf) for leaf in jax.tree.leaves(tree))


def bytes_read_per_pass(tree: Any) -> float:
  """Bytes of weights that one pass through a model reads on a device: all but what "tensor" divides."""

  def count(leaf):
    tensor = any(axis == "tensor" for axis in leaf.sharding.spec)
    whole = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return whole / (leaf.sharding.mesh.shape["tensor"] if tensor else 1)

  return sum(count(leaf) for leaf in jax.tree.leaves(tree))


def _stored(tree, dtype):
  """Floating-point weights in the dtype that they are loaded in."""

  def cast(leaf):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if floating else leaf.dtype)

  return jax.tree.map(cast, tree)


def divided(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Batches as processes.put_batch lays them out."""
  copied, divided = NamedSharding(mesh, P()), mesh_lib.batch_sharding(mesh)

  def place(leaf):
    sharding = copied if leaf.shape[0] == 1 else divided
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(place, tree)
