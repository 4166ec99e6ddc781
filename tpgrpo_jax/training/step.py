"""The update: credit to advantages, then one optimizer step over microbatches of (state, step) pairs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.flow import steps
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.training import batches, build, losses, sums
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib


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
      chunked = _chunk_log_ratios(config, method, params, pairs, data, lambda pair, new: pair)
      pairs = pairs | {"chunk_log_ratio": chunked[0]}

    def share_of_mean(trainable, pair):
      at = params | {"trainable": trainable}
      loss, metrics = pair_loss(at, reference, old, *_looked_up(pair, data))
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

  def train_step(state, frozen, reference, batch: batches.Batch):
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
    (params, reference), chunk_scores = weights, None
    if config.loss.chunks:
      found = _chunk_log_ratios(config, method, params, pairs, data, losses.old_score)
      pairs, chunk_scores = pairs | {"chunk_log_ratio": found[0]}, found[1]

    def share_of_mean(trainable, pair):
      pair, condition = _looked_up(pair, data)
      at = params | {"trainable": trainable}
      scores_only = phase == batches.SCORE
      loss, metrics, score = pair_loss(at, reference, pair, condition, scores_only)
      off = jnp.abs(scorer.compare(pair, score, pair))
      metrics["ratio/rollout_max_abs_log"] = jnp.where(phase == batches.LATER, 0.0, off)
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
      grads = jax.lax.cond(phase == batches.SCORE, lambda: grads, add)
      return (grads, sums.of_two(metrics, found)), score

    start = sums.none(lambda pair: of_group(params["trainable"], pair)[1][0], pairs)
    (grads, metrics), scores = jax.lax.scan(accumulate, (_zeros(params), start), pairs)
    scores = sums.one_by_one(config, scores)
    return mesh_lib.total(grads), sums.of_parts(metrics), chunk_scores or scores

  def rescoring_step(state, frozen, reference, batch: batches.Batch):
    pairs, data = _pairs(config, method, batch)
    weight_sum = jnp.sum(batch.weight)
    weights = {"frozen": frozen, "trainable": state.trainable}, reference
    pairs["is_first"] = jnp.broadcast_to(batch.phase == batches.FIRST, pairs["chunk"].shape)
    divided = (False, *_per_sample(pairs, data), False, False)
    sum_up = mesh_lib.by_data(accumulated, divided=divided, gives=(False, False, True))
    grads, metrics, scores = sum_up(weights, pairs, data, weight_sum, batch.phase)
    after = _learn(config, method, state, grads, metrics, weight_sum)
    after = jax.tree.map(lambda a, b: jnp.where(batch.phase == batches.SCORE, a, b), state, after)
    by_chunk = lambda a: a.reshape(*batch.advantage.shape[:2], *a.shape[1:])
    return after, metrics, jax.tree.map(by_chunk, scores)

  return build.jit(config, rescoring_step, donate_argnums=0)


def _zeros(params):
  """What the gradients of a scan start from."""
  return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params["trainable"])


def _per_sample(pairs, data):
  """Which of the leaves have rows of samples, behind their leading axis: see `mesh.by_data`."""
  is_row = lambda a: a.ndim > 1 and a.shape[1] > 1
  return jax.tree.map(is_row, pairs), jax.tree.map(is_row, data)


def make_scores(config: config_lib.Config, method: method_lib.Method):
  """Returns (state, frozen, reference, Batch) -> what the SCORE phase computes, to count its operations."""
  scorer = losses.make_scorer(config, method)

  def scores(state, frozen, reference, batch: batches.Batch):
    pairs, data = _pairs(config, method, batch)
    params = {"frozen": frozen, "trainable": state.trainable}

    def score(pair):
      pair, condition = _looked_up(pair, data)
      level = jnp.full(pair["x"].shape[:1], pair["sigma"])
      return scorer.score(pair, method.velocity_fn(params, pair["x"], level, condition))

    passes = 2 if config.loss.chunks else 1  # a log-ratio of each chunk comes first
    return [jax.lax.map(score, pairs) for _ in range(passes)]

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


def _chunk_log_ratios(config, method, params, pairs, data, find_old):
  """([C W, S, M] the log-ratio of each step's chunk, scores of all pairs), by a pass without gradients."""
  scorer = losses.make_scorer(config, method)

  def log_ratio(pair):
    pair, condition = _looked_up(pair, data)
    level = jnp.full(pair["x"].shape[:1], pair["sigma"])
    new = scorer.score(pair, method.velocity_fn(params, pair["x"], level, condition))
    return scorer.compare(pair, new, find_old(pair, new)), new

  found, scores = jax.lax.map(log_ratio, pairs)
  per_step = found.reshape(-1, method.window, *found.shape[1:]).swapaxes(0, 1)
  chunked = surrogate.chunk_log_ratio(per_step, config.loss.chunks)
  return chunked.swapaxes(0, 1).reshape(found.shape), scores


def _pairs(config, method, batch):
  """Arrays of leading axis C W over (microbatch, step), and what `_looked_up` takes from by number."""
  transitions, (chunks, rows) = batch.transitions, batch.advantage.shape[:2]
  states = transitions.final.shape[1]
  per_member = lambda a: a.reshape(chunks, rows, states, -1)
  pairs = {"advantage": per_member(batch.advantage), "weight": per_member(batch.weight)}
  if batch.levels is None:
    names = ["log_prob", "sigma", "sigma_next"]
    names += ["velocity"] * losses.reads_old_velocity(config)
    pairs |= {name: getattr(transitions, name) for name in names}
    pairs["step_weight"] = jax.vmap(functools.partial(_step_weights, config, method))(
      transitions.sigma, transitions.sigma_next
    )
  else:
    keys = jax.random.split(batch.key, (chunks, rows))
    pairs |= {"sigma": batch.levels, "key": keys}
  flat = functools.partial(jax.tree.map, lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]))
  pairs = flat(pairs)
  row = jnp.arange(chunks)[:, None] * transitions.states.shape[1] + jnp.arange(rows)
  pairs |= {"chunk": jnp.repeat(jnp.arange(chunks), rows), "row": row.ravel()}
  latents = {n: flat(getattr(transitions, n)) for n in ("states", "members")}
  return pairs, {"condition": batch.conditions, "final": transitions.final, **latents}


def _looked_up(pair, data):
  """(the pair with its latents, in float32 at the least, and its condition)."""
  chunk, row, members = pair["chunk"], pair["row"], data["members"]
  wide = lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32))
  found = {"data": data["final"][chunk]}
  if len(data["states"]):
    x_next = data["states"][row + 1][:, None] if members is None else members[row]
    found |= {"x": wide(data["states"][row]), "x_next": wide(x_next)}
  return pair | found, jax.tree.map(lambda a: a[chunk if len(a) > 1 else 0], data["condition"])


def _step_weights(config, method, sigma, sigma_next):
  """[W] factors of the policy losses of one microbatch's steps."""
  zero = jnp.zeros((1, 1))
  std = jax.vmap(lambda s, n: method.step_fn(zero, zero, s, n).std.reshape(()))(sigma, sigma_next)
  slope = jax.vmap(functools.partial(steps.sensitivity, method.step_fn))(sigma, sigma_next)
  return surrogate.step_weights(
    config.loss.step_weight, std, dt=sigma_next - sigma, sensitivity=slope
  )
