"""The update: credit to advantages, then one optimizer step over microbatches of (state, step) pairs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.flow import schedule, steps
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.training import build, losses, sums
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What one optimizer update learns from: C microbatches of B samples, W rows each.

  Attributes:
    transitions: C of them, S M = B.
    conditions: C of them, leading axis S (or 1).
    advantage: [C, W, B].
    weight: [C, W, B], 0 where a sample is left out.
    levels: [C, W, S] noise levels, where the objective is one of the forward process; else None.
    key: of the update.
    limit: scalar; the state stays as it was where a log-ratio is above it. None does without.
    phase: scalar, of `make_rescoring_step`: SCORE, FIRST or LATER; else None.
  """

  transitions: list[types.Transitions]
  conditions: list[Any]
  advantage: Any
  weight: Any
  levels: Any = None
  key: Any = None
  limit: Any = None
  phase: Any = None


SCORE, FIRST, LATER = range(3)  # what a rescoring step does with a batch


def make_credit_fn(config: config_lib.Config, method: method_lib.Method):
  """Returns jitted (rewards [N, W+1, B], weights [N], extras) -> (StepCredit, advantage [W, B], weight [B]).

  N streams are credited and normalised each for itself, and their advantages added with their weights; the
  StepCredit is the first stream's.
  """

  @jax.jit
  def assign(rewards, weights, extras):
    credits = [method.credit.function(r, **_of_stream(extras, n)) for n, r in enumerate(rewards)]
    shared = lambda credit, a: a if credit.share is None else a * credit.share
    each = [shared(credit, method.normalize(credit.reward)) for credit in credits]
    advantage = advantages.combine_streams(jnp.stack(each), weights)
    clipped = jnp.clip(advantage, -config.advantage.clip, config.advantage.clip)
    weight = jnp.any(advantage != 0, axis=0).astype(jnp.float32)
    return credits[0], clipped, weight

  return assign


def _of_stream(extras, number):
  """The extras of one stream: a key is used once."""
  return {k: jax.random.fold_in(v, number) if k == "key" else v for k, v in extras.items()}


def make_train_step(config: config_lib.Config, method: method_lib.Method):
  """Returns jitted (state, frozen, reference, Batch) -> (state, metrics).

  The gradient of the weighted mean loss over all (sample, step) pairs is accumulated in float32 over a
  scan whose every iteration evaluates the velocity once, at one step of one microbatch: the batch shape
  and layout of the rollout, so that the first update's log-ratio is exactly 0. The members of a state
  share that evaluation. Each part of the mesh's "data" axis sums its own samples' gradients, and the
  parts are added once, after the scan. A batch whose weights are all 0 leaves the weights as they are.
  """
  pair_loss = losses.OBJECTIVES[config.loss.objective].make_loss(config, method)

  def accumulated(weights, pairs, data, weight_sum):
    params, reference, old = weights
    if config.loss.chunks:
      chunked = _chunk_log_ratios(config, method, params, pairs, data[0], lambda pair, new: pair)
      pairs = pairs | {"chunk_log_ratio": chunked[0]}

    def share_of_mean(trainable, pair):
      condition, final = jax.tree.map(lambda a: a[pair["chunk"]], data)
      at = params | {"trainable": trainable}
      loss, metrics = pair_loss(at, reference, old, pair | {"data": final}, condition)
      share, metrics = sums.of_pair(pair["weight"], loss, metrics, weight_sum)
      return share, (metrics, ())

    pairs, of_group = sums.side_by_side(config, pairs, share_of_mean)
    gradient = jax.grad(of_group, has_aux=True)

    def accumulate(carry, pair):
      grads, metrics = carry
      new, (found, _) = gradient(params["trainable"], pair)
      grads = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), grads, new)
      return (grads, sums.of_two(metrics, found)), None

    start = sums.none(lambda pair: of_group(params["trainable"], pair)[1][0], pairs)
    (grads, metrics), _ = jax.lax.scan(accumulate, (_zeros(params), start), pairs)
    return mesh_lib.total(grads), sums.of_parts(metrics)

  def train_step(state, frozen, reference, batch: Batch):
    pairs, data = _pairs(config, method, batch)
    weight_sum = jnp.sum(batch.weight)
    weights = {"frozen": frozen, "trainable": state.trainable}, reference, state.old
    divided = (False, *_per_sample(pairs, data), False)
    sum_up = mesh_lib.by_data(accumulated, divided=divided, gives=(False, False))
    grads, metrics = sum_up(weights, pairs, data, weight_sum)
    after = _learn(config, method, state, grads, metrics, weight_sum)
    if batch.limit is not None:
      is_off = metrics["ratio/max_abs_log"] > batch.limit
      after = jax.tree.map(lambda a, b: jnp.where(is_off, a, b), state, after)
    return after, metrics

  return build.jit(config, train_step, donate_argnums=0)


def make_rescoring_step(config: config_lib.Config, method: method_lib.Method):
  """As `make_train_step`, with old scores from this very program: (..., Batch) -> (state, metrics, scores).

  In the phase SCORE it does the forward passes alone and gives the scores (log_prob [C, W, S, M], velocity
  [C, W, S, ...]) for `with_scores`; the state stays. FIRST is the update whose weights are still those of the
  rollout: it scores for itself. LATER compares with the scores of the batch. All phases share one forward
  pass, so unchanged weights give a log-ratio of exactly 0 anywhere. ratio/rollout_max_abs_log is how far
  the rollout's scores are from these.
  """
  pair_loss = losses.make_rescored_loss(config, method)
  scorer = losses.make_scorer(config, method)

  def accumulated(weights, pairs, data, weight_sum, phase):
    (params, reference), (conditions, _) = weights, data
    chunk_scores = None
    if config.loss.chunks:
      found = _chunk_log_ratios(config, method, params, pairs, conditions, losses.old_score)
      pairs, chunk_scores = pairs | {"chunk_log_ratio": found[0]}, found[1]

    def share_of_mean(trainable, pair):
      condition = jax.tree.map(lambda a: a[pair["chunk"]], conditions)
      at = params | {"trainable": trainable}
      loss, metrics, score = pair_loss(at, reference, pair, condition)
      off = jnp.abs(scorer.compare(pair, score, pair))
      metrics["ratio/rollout_max_abs_log"] = jnp.where(phase == LATER, 0.0, off)
      share, metrics = sums.of_pair(pair["weight"], loss, metrics, weight_sum)
      return share, (metrics, score)

    pairs, of_group = sums.side_by_side(config, pairs, share_of_mean)

    def accumulate(carry, pair):
      grads, metrics = carry
      share = functools.partial(of_group, pair=pair)
      mean, backward, (found, score) = jax.vjp(share, params["trainable"], has_aux=True)
      add = lambda: jax.tree.map(
        lambda a, b: a + b.astype(jnp.float32), grads, backward(jnp.ones_like(mean))[0]
      )
      grads = jax.lax.cond(phase == SCORE, lambda: grads, add)
      return (grads, sums.of_two(metrics, found)), score

    start = sums.none(lambda pair: of_group(params["trainable"], pair)[1][0], pairs)
    (grads, metrics), scores = jax.lax.scan(accumulate, (_zeros(params), start), pairs)
    scores = sums.one_by_one(config, scores)
    return mesh_lib.total(grads), sums.of_parts(metrics), chunk_scores or scores

  def rescoring_step(state, frozen, reference, batch: Batch):
    pairs, data = _pairs(config, method, batch)
    weight_sum = jnp.sum(batch.weight)
    weights = {"frozen": frozen, "trainable": state.trainable}, reference
    pairs["is_first"] = jnp.broadcast_to(batch.phase == FIRST, pairs["chunk"].shape)
    divided = (False, *_per_sample(pairs, data), False, False)
    sum_up = mesh_lib.by_data(accumulated, divided=divided, gives=(False, False, True))
    grads, metrics, scores = sum_up(weights, pairs, data, weight_sum, batch.phase)
    after = _learn(config, method, state, grads, metrics, weight_sum)
    after = jax.tree.map(lambda a, b: jnp.where(batch.phase == SCORE, a, b), state, after)
    by_chunk = lambda a: a.reshape(len(batch.transitions), -1, *a.shape[1:])
    return after, metrics, jax.tree.map(by_chunk, scores)

  return build.jit(config, rescoring_step, donate_argnums=0)


def _zeros(params):
  """What the gradients of a scan start from."""
  return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params["trainable"])


def _per_sample(pairs, data):
  """Which of the leaves have a row for each state, behind their leading axis: see `mesh.by_data`."""
  states = pairs["weight"].shape[1]
  is_row = lambda a: a.ndim > 1 and a.shape[1] == states
  return jax.tree.map(is_row, pairs), jax.tree.map(is_row, data)


def with_scores(batch: Batch, scores: dict[str, jax.Array]) -> Batch:
  """The batch with the scores of `make_rescoring_step` in place of the rollout's."""
  # Laid out as they were, so that the next call is one of the same program.
  like = lambda t, name, a: jax.device_put(a, getattr(t, name).sharding)
  replaced = [
    dataclasses.replace(t, **{name: like(t, name, a[c]) for name, a in scores.items()})
    for c, t in enumerate(batch.transitions)
  ]
  return dataclasses.replace(batch, transitions=replaced)


def make_scores(config: config_lib.Config, method: method_lib.Method):
  """Returns (state, frozen, reference, Batch) -> what the SCORE phase computes, to count its operations."""
  scorer = losses.make_scorer(config, method)

  def scores(state, frozen, reference, batch: Batch):
    pairs, (conditions, _) = _pairs(config, method, batch)
    params = {"frozen": frozen, "trainable": state.trainable}

    def score(pair):
      condition = jax.tree.map(lambda c: c[pair["chunk"]], conditions)
      level = jnp.full(pair["x"].shape[:1], pair["sigma"])
      return scorer.score(pair, method.velocity_fn(params, pair["x"], level, condition))

    return jax.lax.map(score, pairs)

  return scores


def _learn(config, method, state, grads, metrics, weight_sum):
  """The state after the gradients, unless every weight is 0; adds the metric of their norm."""
  squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
  metrics["grad_norm"] = jnp.sqrt(sum(squares))
  after = state_lib.apply_gradients(state, grads, method.optimizer, config.ema)
  keep = functools.partial(jax.tree.map, lambda a, b: jnp.where(weight_sum > 0, a, b))
  kept = dict(
    trainable=keep(after.trainable, state.trainable),
    opt_state=keep(after.opt_state, state.opt_state),
    ema=keep(after.ema, state.ema),  # of the weights that are not kept
  )
  return dataclasses.replace(after, **mesh_lib.laid_out(kept))


def _chunk_log_ratios(config, method, params, pairs, conditions, find_old):
  """([C W, S, M] the log-ratio of each step's chunk, scores of all pairs), by a pass without gradients."""
  scorer = losses.make_scorer(config, method)

  def log_ratio(pair):
    condition = jax.tree.map(lambda c: c[pair["chunk"]], conditions)
    level = jnp.full(pair["x"].shape[:1], pair["sigma"])
    new = scorer.score(pair, method.velocity_fn(params, pair["x"], level, condition))
    return scorer.compare(pair, new, find_old(pair, new)), new

  found, scores = jax.lax.map(log_ratio, pairs)
  per_step = found.reshape(-1, method.window, *found.shape[1:]).swapaxes(0, 1)
  chunked = surrogate.chunk_log_ratio(per_step, config.loss.chunks)
  return chunked.swapaxes(0, 1).reshape(found.shape), scores


def _pairs(config, method, batch):
  """Leading axis C W over (microbatch, step), and (conditions, finished latents) of leading axis C."""
  stack = lambda *leaves: jnp.stack(leaves)
  transitions = jax.tree.map(stack, *batch.transitions)
  conditions = jax.tree.map(stack, *batch.conditions)
  chunks, rows = batch.advantage.shape[:2]
  states = transitions.final.shape[1]
  per_member = lambda a: a.reshape(chunks, rows, states, -1)
  pairs = {"advantage": per_member(batch.advantage), "weight": per_member(batch.weight)}
  if batch.levels is None:
    names = ["x", "x_next", "log_prob", "sigma", "sigma_next"]
    names += ["velocity"] * losses.reads_old_velocity(config)
    pairs |= {name: getattr(transitions, name) for name in names}
    pairs["step_weight"] = jax.vmap(functools.partial(_step_weights, config, method))(
      transitions.sigma, transitions.sigma_next
    )
  else:
    keys = jax.random.split(batch.key, (chunks, rows))
    pairs |= {"sigma": batch.levels, "key": keys}
  flat = {name: a.reshape(chunks * rows, *a.shape[2:]) for name, a in pairs.items()}
  flat = {k: a.astype(jnp.float32) if k in ("x", "x_next") else a for k, a in flat.items()}
  flat["chunk"] = jnp.repeat(jnp.arange(chunks), rows)
  return flat, (conditions, transitions.final)


def _step_weights(config, method, sigma, sigma_next):
  """[W] factors of the policy losses of one microbatch's steps."""
  zero = jnp.zeros((1, 1))
  std = jax.vmap(lambda s, n: method.step_fn(zero, zero, s, n).std.reshape(()))(sigma, sigma_next)
  slope = jax.vmap(functools.partial(steps.sensitivity, method.step_fn))(sigma, sigma_next)
  return surrogate.step_weights(
    config.loss.step_weight, std, dt=sigma_next - sigma, sensitivity=slope
  )


def split_updates(
  config: config_lib.Config, rollout, advantage: np.ndarray, weight: np.ndarray, epoch: int
) -> list[Batch]:
  """Cuts an epoch into `updates_per_epoch` batches: of whole microbatches, or of steps, in order.

  Args:
    config: of the run.
    rollout: of the epoch.
    advantage: [W, B].
    weight: [B].
    epoch: its number, from 0, for what is drawn.
  """
  rng = np.random.default_rng((config.seed, epoch, 2))
  chunks, updates = len(rollout.transitions), config.train.updates_per_epoch
  weights = _row_weights(config.loss, rng, *advantage.shape) * weight
  # As the microbatches hold them.
  cut = lambda a: a[:, rollout.order].reshape(len(a), chunks, -1).swapaxes(0, 1)
  advantage, weights = cut(advantage), cut(weights).astype(np.float32)
  levels = _draw_levels(config, rollout, rng, chunks)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), epoch), 1)
  batches = []
  for number, (part, rows) in enumerate(_shares(config, chunks, advantage.shape[1])):
    transitions = rollout.transitions[part]
    if rows != slice(None):
      transitions = [_take_steps(t, rows) for t in transitions]
    batches.append(
      Batch(
        transitions,
        rollout.conditions[part],
        advantage[part, rows],
        weights[part, rows],
        None if levels is None else levels[part],
        None if levels is None else jax.random.fold_in(key, number),
      )
    )
  assert len(batches) == updates
  return batches


def _by_samples(updates, chunks, rows):
  del rows
  share = chunks // updates
  return [(slice(i, i + share), slice(None)) for i in range(0, chunks, share)]


def _by_steps(updates, chunks, rows):
  del chunks
  share = rows // updates
  return [(slice(None), slice(i, i + share)) for i in range(0, rows, share)]


_SHARES = {"samples": _by_samples, "steps": _by_steps}


def _shares(config, chunks, rows):
  """(microbatches, steps) of each update."""
  return _SHARES[config.train.updates_by](config.train.updates_per_epoch, chunks, rows)


def _take_steps(transitions, rows):
  """The Transitions of some of the steps."""
  names = ("x", "x_next", "velocity", "log_prob", "sigma", "sigma_next")
  taken = {n: jax.tree.map(lambda a: a[rows], getattr(transitions, n)) for n in names}
  return dataclasses.replace(transitions, **taken)


def _row_weights(asked, rng, rows, batch):
  """[W, B]: 1, or with chunks what makes every chunk count the same, and 0 for those that are not drawn."""
  if not asked.chunks:
    return np.ones((rows, batch))
  weights = np.repeat(surrogate.chunk_weights(asked.chunks)[:, None], batch, axis=1)
  if asked.chunks_per_sample:
    number = np.tile(np.arange(len(asked.chunks)), (batch, 1))
    taken = rng.permuted(number, axis=1) < asked.chunks_per_sample  # [B, chunks]
    weights *= np.repeat(taken, asked.chunks, axis=1).T
  return weights


def _draw_levels(config, rollout, rng, chunks):
  """[C, W, S] of the forward process, or None."""
  if config.sampler.rollout != "ode":
    return None
  start, end = config.sampler.window
  draw = schedule.LEVEL_DRAWS[config.loss.level_draw]
  count, batch = config.loss.levels or end - start, config.train.microbatch
  drawn = [draw(rng, rollout.sigmas, (start, end), count, batch) for _ in range(chunks)]
  return np.stack(drawn).astype(np.float32)
