"""From a config to functions and arrays: the only place that binds them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit, models, registry, types
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.flow import completion, guidance, schedule, steps
from tpgrpo_jax.models import hf, lora, quantize
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import pipeline
from tpgrpo_jax.training import state as state_lib

log = logging.getLogger(__name__)

# dynamics -> (step, log_prob); the noise level is bound by `_bind_dynamics`.
DYNAMICS = {
  "sde": (steps.sde_step, steps.gaussian_log_prob),
  "cps": (steps.cps_step, steps.cps_log_prob),
  "dance": (steps.dance_step, steps.gaussian_log_prob),
}


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
    """What sampling takes: the weights with these trainable ones, and the decoder's."""
    decoder = self.pipeline.decoder if self.pipeline else {}
    return {"frozen": self.frozen, "trainable": trainable, "decoder": decoder}


@dataclasses.dataclass(frozen=True)
class Method:
  """All functions of a run, bound to its config.

  Attributes:
    velocity_fn: guided when the config says so; the SAME one in rollout and update.
    reference_velocity_fn: the adapter-free model, likewise guided.
    step_fn: the stochastic step.
    log_prob_fn: its score.
    sigmas: [T + 1] grid of training.
    window: W.
    credit: method and the completions it needs.
    normalize: (reward, group_size) -> advantage.
    optimizer: of optax.
  """

  velocity_fn: types.VelocityFn
  reference_velocity_fn: types.VelocityFn
  step_fn: types.StepFn
  log_prob_fn: types.LogProbFn
  sigmas: np.ndarray
  window: int
  credit: types.CreditMethod
  normalize: Any
  optimizer: optax.GradientTransformation


def build_model(
  config: config_lib.Config, mesh: jax.sharding.Mesh, prompts: Sequence[str] | None = None
) -> Model:
  """Loads the weights and lays them out on the mesh.

  Args:
    config: of the run.
    mesh: of the run.
    prompts: all that the model will be asked for; None opens the transformer alone.

  Raises:
    ValueError: no such variant or folder, weights or adapters that do not fit, LoRA targets that
      match nothing, a guidance scale that the model cannot be told.
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
  # Before the transformer: the text encoders are gone when it comes.
  surroundings = None if prompts is None else pipeline.open_pipeline(config, mesh, sizes, prompts)
  dtype = jnp.dtype(config.model.dtype)
  structure = outline(config, sizes)
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
  """What `build_model` fills with weights; nothing is computed."""
  create = models.build_transformer(
    sizes,
    dtype=jnp.dtype(config.model.dtype),
    remat=config.model.remat,
    guidance=_told_guidance(config, sizes),
  )

  def create_adapted(key):
    model_key, lora_key = jax.random.split(key)
    model = create(model_key)
    if config.lora.rank:
      lora.add_lora(
        model,
        lora_key,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        init=config.lora.init,
        targets=config.lora.targets,
      )
    return lora.split_trainable(model, rank=config.lora.rank)

  key = jax.random.key(config.seed)
  graphdef, adapters, _ = _structure(create_adapted, key)
  base_graphdef, base, buffers = _structure(lambda k: lora.split_trainable(create(k), rank=0), key)
  return Outline(create_adapted, graphdef, base_graphdef, adapters, base, buffers)


def _told_guidance(config, sizes):
  """The guidance scale that is an input of the model, or None."""
  scale = config.sampler.guidance_scale
  if models.MODELS[config.model.variant].guidance != "embedded":
    return None
  if sizes.guidance_embeds:
    return scale
  if scale != 1.0:
    raise ValueError(
      f"sampler.guidance_scale={scale}: this model knows no guidance (FLUX.1-schnell was made to do "
      "without; config.json: guidance_embeds is false). Set it to 1."
    )
  return None


def _check_adapter(lora_config, adapter, wanted):
  """Raises ValueError unless the file's adapters are those that the config describes."""
  found, asked = hf.flatten(adapter.trainable), hf.flatten(wanted)
  rows = [
    ("lora.rank", lora_config.rank, adapter.rank),
    ("lora.alpha", lora_config.alpha, adapter.alpha),
  ]
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


def build_method(config: config_lib.Config, model: Model) -> Method:
  """Binds sampler, credit, advantages and optimizer to the config."""
  sampler = config.sampler
  sigmas = make_sigmas(sampler, model, sampler.num_steps)
  step_fn, log_prob_fn = _bind_dynamics(sampler, sigmas)
  table = credit.BALANCED if config.credit.balance else credit.CREDIT
  method = registry.lookup(table, config.credit.method, field="credit.method")
  if not isinstance(method, types.CreditMethod):
    method = types.CreditMethod(method, completions="all")  # the user's own function
  _check_credit(config, method)
  return Method(
    velocity_fn=guide(config, model.velocity_fn),
    reference_velocity_fn=guide(config, model.base_velocity_fn),
    step_fn=step_fn,
    log_prob_fn=log_prob_fn,
    sigmas=sigmas,
    window=sampler.window[1] - sampler.window[0],
    credit=method,
    normalize=advantages.ADVANTAGES[config.advantage.normalization],
    optimizer=state_lib.make_optimizer(config.optimizer),
  )


def _check_credit(config, method):
  """Raises ValueError unless a credit method, perhaps the user's own, returns what credit is."""
  window = config.sampler.window[1] - config.sampler.window[0]
  batch = config.train.prompts_per_epoch * config.train.group_size
  field = f"credit.method={config.credit.method!r}"
  rule = f"must return StepCredit(reward [{window}, {batch}], is_turning_point [{window}, {batch}])"
  rewards = jax.ShapeDtypeStruct((window + 1, batch), jnp.float32)
  if method.completions not in ("all", "none") or not callable(method.function):
    raise ValueError(f"{field}: must be a function, or CreditMethod(function, 'all' or 'none').")
  found = jax.eval_shape(method.function, rewards)
  shapes = [getattr(leaf, "shape", None) for leaf in jax.tree.leaves(found)]
  if not isinstance(found, types.StepCredit) or shapes != [(window, batch)] * 2:
    raise ValueError(
      f"{field}: {rule} for completion rewards [{window + 1}, {batch}], returns {found}. See "
      "docs/bring_your_own.md."
    )


def _bind_dynamics(sampler, sigmas):
  step_fn, log_prob_fn = DYNAMICS[sampler.dynamics]
  options = {"noise_level": sampler.noise_level}
  if sampler.dynamics == "sde":
    options["sigma_max"] = float(sigmas[1])
  return functools.partial(step_fn, **options), log_prob_fn


def make_sigmas(sampler: config_lib.Sampler, model: Model, num_steps: int) -> np.ndarray:
  """The grid of noise levels, [num_steps + 1]."""
  height, width, _ = model.pipeline.latent_shape
  image_tokens = height * width // 4  # of a FLUX.1, whose patches are 2 x 2; no one else asks
  return schedule.SCHEDULES[sampler.schedule](num_steps, sampler.shift, image_tokens)


def is_guided(config: config_lib.Config) -> bool:
  """Whether a step evaluates the model twice, with the prompt and without."""
  variant = models.MODELS[config.model.variant]
  return variant.guidance == "classifier_free" and config.sampler.guidance_scale != 1.0


def guide(config: config_lib.Config, velocity_fn: types.VelocityFn) -> types.VelocityFn:
  """The velocity function that takes what `build_condition` makes."""
  if not is_guided(config):
    return velocity_fn
  return guidance.classifier_free(velocity_fn, config.sampler.guidance_scale)


def build_condition(config: config_lib.Config, model: Model, prompts: list[str]) -> Any:
  """Embeds prompts on the host: a Condition, or a GuidedCondition when guidance is on."""
  positive = model.pipeline.encode(prompts)
  if not is_guided(config):
    return positive
  return types.GuidedCondition(positive, model.pipeline.encode([""]))


def build_plan(config: config_lib.Config, method: Method, start: int) -> completion.Plan | None:
  """The packing of one epoch's completions; None when the credit method needs none.

  With a drawn window every plan is padded to the largest shape, so that all compile to one program.
  """
  if method.credit.completions == "none":
    return None
  plan = functools.partial(
    completion.plan,
    method.sigmas,
    window=method.window,
    steps=config.completion.steps,
    solver=config.completion.solver,
  )
  starts = range(start, start + 1)
  if config.sampler.window_range:
    low, high = config.sampler.window_range
    starts = range(low, high - method.window + 1)
  rows, lanes = zip(*(plan(start=s).load.shape for s in starts))
  return plan(start=start, at_least=(max(rows), max(lanes)))


def evaluations_per_sample(config: config_lib.Config, plan: completion.Plan | None) -> int:
  """Model evaluations that one sample of the rollout takes, idle lanes too; guidance counts twice."""
  count = config.sampler.num_steps
  if plan is not None:
    lanes_per_chunk = config.completion.lanes_per_chunk
    count += completion.num_lane_evaluations(plan, lanes_per_chunk=lanes_per_chunk)
  return count * (2 if is_guided(config) else 1)
