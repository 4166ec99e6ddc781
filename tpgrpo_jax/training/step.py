"""The update: credit to advantages, then one optimizer step over microbatches of (sample, step) pairs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.training import build
from tpgrpo_jax.training import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What one optimizer update learns from: C microbatches of B samples with W steps each.

  Attributes:
    trajectories: C of them.
    conditions: C of them.
    advantage: [C, W, B].
    weight: [C, B], 0 for samples that are left out.
  """

  trajectories: list[types.Trajectory]
  conditions: list[Any]
  advantage: jax.Array
  weight: jax.Array


def make_credit_fn(config: config_lib.Config, method: build.Method):
  """Returns jitted completion_reward [W+1, B] -> (StepCredit, advantage [W, B], weight [B])."""
  group_size = config.train.group_size

  @jax.jit
  def assign(completion_reward):
    credit = method.credit.function(completion_reward)
    advantage = method.normalize(credit.reward, group_size)
    clipped = jnp.clip(advantage, -config.advantage.clip, config.advantage.clip)
    weight = jnp.any(advantage != 0, axis=0).astype(jnp.float32)
    return credit, clipped, weight

  return assign


def make_train_step(config: config_lib.Config, method: build.Method):
  """Returns jitted (state, frozen, reference, Batch) -> (state, metrics).

  The gradient of the mean loss over all (sample, step) pairs with weight 1 is accumulated in float32
  over a scan whose every iteration evaluates the velocity at one step of one microbatch: the batch
  shape and layout of the rollout, so that the first update's log-ratio is exactly 0.
  """

  def train_step(state, frozen, reference, batch: Batch):
    pairs, conditions = _pairs(batch)
    weight_sum = jnp.maximum(jnp.sum(batch.weight) * batch.advantage.shape[1], 1.0)

    def accumulate(carry, pair):
      grads, sums = carry
      condition = jax.tree.map(lambda c: c[pair["chunk"]], conditions)
      grad_fn = jax.value_and_grad(_pair_loss, has_aux=True)
      (_, metrics), new = grad_fn(
        state.trainable, config, method, frozen, reference, pair, condition, weight_sum
      )
      grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, new)
      return (grads, _combine(sums, metrics)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trainable)
    (grads, metrics), _ = jax.lax.scan(accumulate, (zeros, _no_metrics()), pairs)
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    metrics["grad_norm"] = jnp.sqrt(sum(squares))
    return state_lib.apply_gradients(state, grads, method.optimizer, config.ema), metrics

  return jax.jit(train_step, donate_argnums=0)


def _pair_loss(trainable, config, method, frozen, reference, pair, condition, weight_sum):
  """Weighted share of one (microbatch, step) in the mean loss, and its metrics."""
  params = {"frozen": frozen, "trainable": trainable}
  x, sigma, sigma_next = pair["x"], pair["sigma"], pair["sigma_next"]
  level = jnp.full(x.shape[:1], sigma)
  velocity = method.velocity_fn(params, x, level, condition)
  log_prob = sampler.score(
    method.step_fn, method.log_prob_fn, x, pair["x_next"], velocity, sigma, sigma_next
  )
  old, weight = pair["log_prob"], pair["weight"]
  policy = surrogate.clipped_surrogate(
    log_prob, old, pair["advantage"], clip_range=config.loss.clip_range
  )
  kl = jnp.zeros_like(policy)
  if config.loss.kl_coef:
    gaussian = lambda v: method.step_fn(x, v, sigma, sigma_next)
    reference_velocity = method.reference_velocity_fn(reference, x, level, condition)
    kl = surrogate.gaussian_kl(gaussian(velocity), gaussian(reference_velocity))
  mean = lambda values: jnp.sum(weight * values) / weight_sum
  log_ratio = jax.lax.stop_gradient(log_prob - old)
  ratio = jnp.exp(log_ratio)
  total = mean(policy + config.loss.kl_coef * kl)
  return total, {
    "loss": total,
    "kl": mean(kl),
    "ratio/mean": mean(ratio),
    "ratio/min": jnp.min(ratio),
    "ratio/max": jnp.max(ratio),
    "ratio/max_abs_log": jnp.max(jnp.abs(log_ratio)),
    "clip/above": mean(ratio > 1 + config.loss.clip_range),
    "clip/below": mean(ratio < 1 - config.loss.clip_range),
  }


_EXTREMES = {
  "ratio/min": (jnp.minimum, jnp.inf, min),
  "ratio/max": (jnp.maximum, -jnp.inf, max),
  "ratio/max_abs_log": (jnp.maximum, 0.0, max),
}
_SUMS = ("loss", "kl", "ratio/mean", "clip/above", "clip/below")


def _no_metrics():
  start = {name: value for name, (_, value, _) in _EXTREMES.items()} | dict.fromkeys(_SUMS, 0.0)
  return {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}


def _combine(a, b):
  return {name: _EXTREMES.get(name, (jnp.add,))[0](a[name], b[name]) for name in a}


def _pairs(batch):
  """Leading axis C W over (microbatch, step), and the conditions stacked to leading axis C."""
  stack = lambda *leaves: jnp.stack(leaves)
  trajectory = jax.tree.map(stack, *batch.trajectories)
  conditions = jax.tree.map(stack, *batch.conditions)
  chunks, window = batch.advantage.shape[:2]
  names = ("x", "x_next", "log_prob", "sigma", "sigma_next")
  pairs = {name: getattr(trajectory, name) for name in names}
  pairs["advantage"] = batch.advantage
  pairs["weight"] = jnp.broadcast_to(batch.weight[:, None], batch.advantage.shape)
  flat = {name: a.reshape(chunks * window, *a.shape[2:]) for name, a in pairs.items()}
  flat["chunk"] = jnp.repeat(jnp.arange(chunks), window)
  return flat, conditions


def split_updates(config: config_lib.Config, rollout, advantage, weight) -> list[Batch]:
  """Cuts an epoch into `updates_per_epoch` batches of whole microbatches, in order.

  Args:
    config: of the run.
    rollout: of the epoch.
    advantage: [W, B].
    weight: [B].
  """
  chunks = len(rollout.trajectories)
  share = chunks // config.train.updates_per_epoch
  advantage = advantage.reshape(len(advantage), chunks, -1).swapaxes(0, 1)
  weight = weight.reshape(chunks, -1)
  return [
      Batch(rollout.trajectories[i : i + share], rollout.conditions[i : i + share],
            advantage[i : i + share], weight[i : i + share])
      for i in range(0, chunks, share)
  ]  # fmt: skip


def merge_metrics(rows: list[dict[str, jax.Array]]) -> dict[str, float]:
  """One row of an epoch from those of its updates; sums become means, extremes stay extremes."""
  merged = {k: sum(float(r[k]) for r in rows) / len(rows) for k in (*_SUMS, "grad_norm")}
  merged |= {k: float(_EXTREMES[k][2](r[k] for r in rows)) for k in _EXTREMES}
  # The first update is on-policy: anything but 0 here says that rollout and update disagree.
  merged["ratio/first_update_max_abs_log"] = float(rows[0]["ratio/max_abs_log"])
  return merged
