"""The released models' sizes, and their updates as shapes, for the benchmarks beside this file."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields, tasks
from tpgrpo_jax.forecasting import lowering
from tpgrpo_jax.models import lora, mmdit, z_image
from tpgrpo_jax.training import batches, build, pipeline, step
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class TrueModel:
  """A released model at 512 x 512 pixels, and how its recipe samples.

  Attributes:
    config: sizes, as on the hub.
    tokens: of text.
    num_steps: T.
    guidance_scale: of classifier-free guidance; 1 is none.
    guidance: what the model is told (FLUX.1-dev), or None.
    latent: [h, w, c].
    targets: of the adapters.
  """

  config: Any
  tokens: int
  num_steps: int
  guidance_scale: float
  guidance: float | None = None
  latent: tuple[int, int, int] = (64, 64, 16)
  targets: tuple[str, ...] = model_fields.REFERENCE_LORA_TARGETS

  def create(self, key: jax.Array, *, dtype: Any = jnp.bfloat16, remat: str = "full") -> nnx.Module:
    """The model that computes in `dtype`, with the recipe's adapters; pure."""
    options = dict(dtype=dtype, remat=remat, guidance=self.guidance)
    model = models.build_transformer(self.config, **options)(key)
    lora.add_lora(model, key, rank=32, alpha=64.0, init="gaussian", targets=self.targets)
    return model

  def shapes(self, **options: Any) -> tuple[Any, Any, Any]:
    """(graphdef, trainable in float32, frozen in bfloat16), as shapes."""
    model = nnx.eval_shape(lambda: self.create(jax.random.key(0), **options))
    graphdef, trainable, frozen = lora.split_trainable(model, rank=1)
    stored = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    return graphdef, trainable, jax.tree.map(stored, frozen)

  def condition(self, batch: int) -> types.Condition:
    """The shapes of a batch's text."""
    text = _float32(batch, self.tokens, self.config.joint_attention_dim)
    if isinstance(self.config, z_image.ZImageConfig):
      return types.Condition(text, length=jax.ShapeDtypeStruct((batch,), jnp.int32))
    if not hasattr(self.config, "pooled_projection_dim"):
      return types.Condition(text)
    return types.Condition(text, _float32(batch, self.config.pooled_projection_dim))


TRUE_MODELS = {
  "sd35_medium": TrueModel(
    lowering.HUB_SIZES["stabilityai/stable-diffusion-3.5-medium"][0],
    tokens=333,
    num_steps=10,
    guidance_scale=4.5,
  ),
  "flux_dev": TrueModel(
    lowering.HUB_SIZES["black-forest-labs/FLUX.1-dev"][0],
    tokens=512,
    num_steps=6,
    guidance_scale=1.0,
    guidance=3.5,
  ),
  "flux2_klein": TrueModel(
    lowering.HUB_SIZES["black-forest-labs/FLUX.2-klein-base-4B"][0],
    tokens=512,
    num_steps=8,
    guidance_scale=4.0,
    latent=(32, 32, 128),
    targets=tasks.FLUX2_TARGETS,
  ),
  "z_image": TrueModel(
    lowering.HUB_SIZES["Tongyi-MAI/Z-Image"][0],
    tokens=256,
    num_steps=10,
    guidance_scale=5.0,
    targets=tasks.Z_IMAGE_TARGETS,
  ),
}


def shrink(model: TrueModel, blocks: int) -> TrueModel:
  """The same kind of model with few and narrow blocks, for tests."""
  fields = {f.name for f in dataclasses.fields(model.config)}
  small = dict(num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32)
  small |= dict(num_layers=blocks, num_single_layers=blocks)
  small |= dict(dim=3 * 128, n_heads=3, n_kv_heads=3, n_layers=blocks, cap_feat_dim=32)
  if isinstance(model.config, mmdit.MMDiTConfig):
    small |= dict(caption_projection_dim=2 * model.config.attention_head_dim)
    small |= dict(dual_attention_layers=tuple(range(blocks // 2)), pos_embed_max_size=16)
  config = dataclasses.replace(model.config, **{k: v for k, v in small.items() if k in fields})
  return dataclasses.replace(model, config=config, tokens=9, latent=(8, 8, model.latent[-1]))


def recipe(model: TrueModel, batch: int) -> config_lib.Config:
  """The settings of an update of `batch` samples with all their stochastic steps."""
  base = config_lib.Config()
  return dataclasses.replace(
    base,
    sampler=dataclasses.replace(
      base.sampler,
      num_steps=model.num_steps,
      window=(0, model.num_steps - 1),
      schedule="sd3",
      guidance_scale=model.guidance_scale,
    ),
    train=dataclasses.replace(base.train, microbatch=batch, group_size=batch),
  )


class Run(NamedTuple):
  """What a run is made of, with shapes in place of weights.

  Attributes:
    config: as of `recipe`.
    method: the run's functions.
    trainable: float32.
    frozen: bfloat16.
  """

  config: config_lib.Config
  method: method_lib.Method
  trainable: Any
  frozen: Any


def open_run(model: TrueModel, *, batch: int, remat: str) -> Run:
  """Binds the model as training does."""
  config = recipe(model, batch)
  graphdef, trainable, frozen = model.shapes(remat=remat)
  velocity_fn = models.make_velocity_fn(graphdef)
  built = build.Model(
    config=model.config,
    velocity_fn=velocity_fn,
    base_velocity_fn=velocity_fn,
    frozen=frozen,
    trainable=trainable,
    pipeline=pipeline.Pipeline(model.latent, _absent, _absent, {}),
  )
  return Run(config, method_lib.build_method(config, built), trainable, frozen)


def _absent(*_):
  raise NotImplementedError("no benchmark of a true model encodes or decodes")


def conditions(model: TrueModel, batch: int) -> Any:
  """The shapes of what the run's velocity function is conditioned on."""
  condition = model.condition(batch)
  if model.guidance_scale == 1.0:
    return condition
  return types.GuidedCondition(condition, condition)


def draw_condition(model: TrueModel, shapes: Any, draw: Callable[[Any], jax.Array]) -> Any:
  """Values of a condition: every caption has all its tokens, and all else is drawn."""
  whole = lambda leaf: jnp.full_like(draw(leaf), model.tokens)
  return jax.tree.map(lambda leaf: (whole if leaf.dtype == jnp.int32 else draw)(leaf), shapes)


def update(model: TrueModel, run: Run, *, batch: int) -> tuple[Any, tuple]:
  """(the train step of one microbatch with all its stochastic steps, the shapes of its arguments)."""
  create = functools.partial(state_lib.init_state, optimizer=run.method.optimizer)
  window = run.method.window
  states, level = _float32(window + 1, batch, *model.latent), _float32(window)
  final, log_prob = _float32(batch, *model.latent), _float32(window, batch, 1)
  velocity = _float32(window, batch, *model.latent)
  trajectory = types.Transitions(states, None, velocity, log_prob, level, level, final)
  advantage, weight = _float32(1, window, batch), _float32(1, window, batch)
  pieces = batches.Batch([trajectory], [conditions(model, batch)], advantage, weight)
  batch = jax.eval_shape(functools.partial(batches.stacked, run.config), pieces)
  arguments = (jax.eval_shape(create, run.trainable), run.frozen, {}, batch)
  return step.make_train_step(run.config, run.method), arguments


def _float32(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)
