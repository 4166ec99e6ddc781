"""What a run carries from update to update, and its optimizer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.training import mesh as mesh_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The trained part of the model; all that a checkpoint must hold.

  Attributes:
    trainable: weights that the optimizer updates, float32.
    ema: their exponential moving average.
    opt_state: of optax.
    update: int32 scalar, optimizer updates done.
  """

  trainable: Any
  ema: Any
  opt_state: Any
  update: jax.Array


def make_optimizer(config: config_lib.Optimizer) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping; the learning rate warms up linearly, then stays."""
  rate = config.learning_rate
  if config.warmup_updates:
    # Update n of the warm-up, counted from 1, has n / warmup_updates of the rate: none is lost.
    rate = optax.linear_schedule(rate / config.warmup_updates, rate, config.warmup_updates - 1)
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
  )


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update; pure, so jax.eval_shape serves it."""
  copy = lambda: jax.tree.map(jnp.copy, trainable)  # each is donated, and a buffer only once
  return TrainState(copy(), copy(), optimizer.init(trainable), jnp.zeros((), jnp.int32))


def abstract_state(
  trainable: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
  """The state's shapes and layout, what a checkpoint is restored into; nothing is allocated."""
  return mesh_lib.abstract(mesh, jax.eval_shape(lambda t: init_state(t, optimizer), trainable))


def apply_gradients(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema: config_lib.Ema
) -> TrainState:
  """One optimizer update, and one EMA update whenever `ema.every` updates are full."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  update = state.update + 1
  step_size = jnp.where(update % ema.every == 0, 1.0 - ema.decay, 0.0)
  average = optax.incremental_update(trainable, state.ema, step_size)
  return TrainState(trainable, average, opt_state, update)
