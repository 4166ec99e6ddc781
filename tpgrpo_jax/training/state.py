"""What a run carries from update to update, and its optimizer."""

import dataclasses
from typing import Any, NamedTuple

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
    old: weights of the old policy, where the objective has one; else {}.
  """

  trainable: Any
  ema: Any
  opt_state: Any
  update: jax.Array
  old: Any = dataclasses.field(default_factory=dict)


def make_optimizer(
  config: config_lib.Optimizer, *, total_updates: int = 0
) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping.

  Args:
    config: rate, warm-up, schedule and the rest.
    total_updates: of the run, at the last of which linear and cosine schedules reach final_scale.
  """
  # An update reads the rate at the number of those before it: the last one at one less than their number.
  rate = SCHEDULES[config.schedule](config, max(total_updates - config.warmup_updates - 1, 1))
  if config.warmup_updates:
    # Update n of the warm-up, counted from 1, has n / warmup_updates of the rate: none is lost.
    full = config.learning_rate
    warmup = optax.linear_schedule(
      full / config.warmup_updates, full, max(config.warmup_updates - 1, 1)
    )
    after: Any = rate if callable(rate) else optax.constant_schedule(rate)
    rate = optax.join_schedules([warmup, after], [config.warmup_updates])
  return optax.chain(
    optax.clip_by_global_norm(config.max_grad_norm),
    optax.chain(  # optax.adamw, but for what it decays to
      optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
      DECAYS[config.decay_to](config.weight_decay),
      optax.scale_by_learning_rate(rate),
    ),
  )


class DecayToStartState(NamedTuple):
  """The weights that the decay pulls to."""

  start: Any


def decay_to_start(weight_decay: float) -> optax.GradientTransformation:
  """Adds weight_decay (weights - start): decoupled weight decay around the weights at `init` in place of 0.

  L2-SP (arXiv 1802.01483) with AdamW's decoupling. It keeps a copy of the weights.
  """

  def init(params):
    return DecayToStartState(jax.tree.map(jnp.copy, params))

  def update(updates, state, params=None):
    pull = lambda u, w, start: u + weight_decay * (w - start)
    return jax.tree.map(pull, updates, params, state.start), state

  return optax.GradientTransformation(init, update)


DECAYS = {"zero": optax.add_decayed_weights, "start": decay_to_start}


# name -> (config, updates that follow the first after the warm-up) -> what optax takes as a learning rate.
SCHEDULES = {
  "constant": lambda config, updates: config.learning_rate,
  "linear": lambda config, updates: optax.linear_schedule(
    config.learning_rate, config.final_scale * config.learning_rate, updates
  ),
  "cosine": lambda config, updates: optax.cosine_decay_schedule(
    config.learning_rate, updates, config.final_scale
  ),
}


def init_state(
  trainable: Any, optimizer: optax.GradientTransformation, *, keeps_old: bool = False
) -> TrainState:
  """The state before the first update; pure, so jax.eval_shape serves it."""
  copy = lambda: jax.tree.map(jnp.copy, trainable)  # each is donated, and a buffer only once
  old = copy() if keeps_old else {}
  return TrainState(copy(), copy(), optimizer.init(trainable), jnp.zeros((), jnp.int32), old)


def abstract_state(
  trainable: Any,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  keeps_old: bool = False,
) -> TrainState:
  """The state's shapes and layout, what a checkpoint is restored into; nothing is allocated."""
  create = lambda t: init_state(t, optimizer, keeps_old=keeps_old)
  return mesh_lib.abstract(mesh, jax.eval_shape(create, trainable))


def apply_gradients(
  state: TrainState, grads: Any, optimizer: optax.GradientTransformation, ema: config_lib.Ema
) -> TrainState:
  """One optimizer update, and one EMA update whenever `ema.every` updates are full."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)
  update = state.update + 1
  step_size = jnp.where(update % ema.every == 0, 1.0 - ema.decay, 0.0)
  average = optax.incremental_update(trainable, state.ema, step_size)
  return dataclasses.replace(
    state, trainable=trainable, ema=average, opt_state=opt_state, update=update
  )


def move_old(state: TrainState, decay: tuple[float, float, float]) -> TrainState:
  """old <- d old + (1 - d) new after an epoch; d = min(rate (updates - flat), most), 0 up to `flat`.

  DiffusionNFT (arXiv 2509.16117): (0, .001, .5), or (75, .0075, .999); AWM (arXiv 2509.25050): (0, .001, .3).

  Args:
    state: after the epoch's updates.
    decay: (flat, rate, most).
  """
  flat, rate, most = decay
  d = jnp.clip(rate * (state.update - flat), 0.0, most)
  return dataclasses.replace(
    state, old=jax.tree.map(lambda o, n: d * o + (1 - d) * n, state.old, state.trainable)
  )
