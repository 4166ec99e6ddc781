"""The update: what its gradient is, what it leaves out, what it measures, and that it starts on-policy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.cost import collectives, flops
from tpgrpo_jax.flow import sampler, schedule, steps
from tpgrpo_jax.training import batches as batches_lib
from tpgrpo_jax.training import build, rollout, state, step, sums
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

CHUNKS, WINDOW, BATCH = 3, 2, 4
SIGMAS = schedule.linear_sigmas(4)


def linear_velocity(params, x, sigma, condition):
  """A model of two weights, whose gradient needs no transformer."""
  level = sigma.reshape(-1, 1, 1, 1)
  return params["trainable"]["a"] * x + params["trainable"]["b"] * level * condition


def make_method(**changes):
  method = method_lib.Method(
    velocity_fn=linear_velocity,
    reference_velocity_fn=linear_velocity,
    step_fn=functools.partial(steps.cps_step, noise_level=0.7),
    log_prob_fn=steps.cps_log_prob,
    noise_levels=(),
    sigmas=SIGMAS,
    window=WINDOW,
    members=1,
    copies=1,
    neighbours=1,
    credit=credit.CREDIT["increments"],
    normalize=None,
    optimizer=optax.sgd(1.0),  # so that a step is the negative gradient
  )
  return dataclasses.replace(method, **changes)


def make_config(**loss_fields):
  return config_lib.Config(loss=config_lib.Loss(**{"clip_range": 0.5} | loss_fields))


WEIGHTS = {"a": jnp.asarray([0.8]), "b": jnp.asarray([-0.3])}


def sample(seed, weights=WEIGHTS, batch=BATCH):
  """(Transitions, condition) of one microbatch."""
  noise_key, condition_key, key = jax.random.split(jax.random.key(seed), 3)
  x_init = jax.random.normal(noise_key, (batch, 2, 3, 1))
  condition = jax.random.normal(condition_key, (batch, 2, 3, 1))
  method = make_method()
  trajectory = sampler.sample_trajectory(
    method.velocity_fn,
    method.step_fn,
    method.log_prob_fn,
    {"trainable": weights},
    key,
    x_init,
    condition,
    sigmas=SIGMAS,
    start=1,
    window=WINDOW,
  )
  return trajectory, condition


@pytest.fixture(scope="module")
def batch():
  trajectories, conditions = zip(*(sample(seed) for seed in range(CHUNKS)))
  advantage = jax.random.normal(jax.random.key(7), (CHUNKS, WINDOW, BATCH))
  weight = jnp.ones((CHUNKS, WINDOW, BATCH))
  return batches_lib.Batch(list(trajectories), list(conditions), advantage, weight)


def update(batch, *, weights=WEIGHTS, reference=WEIGHTS, config=None, method=None):
  """(state after, gradient, metrics) of one train_step from `weights`."""
  method, config = method or make_method(), config or make_config()
  before = state.init_state(weights, method.optimizer)
  train_step = step.make_train_step(config, method)
  reference = {"frozen": {}, "trainable": reference}
  after, metrics = train_step(before, {}, reference, batches_lib.stacked(config, batch))
  return after, jax.tree.map(lambda a, b: a - b, weights, after.trainable), metrics


def other_weights():
  return jax.tree.map(lambda w: w * 1.02, WEIGHTS)


def assert_close(found, wanted, rtol=1e-5):
  # Sums of at most 144 float32 terms, in another order.
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7), found, wanted)


def test_accumulated_gradient_is_that_of_the_mean_loss_over_all_samples(batch):
  off_policy = other_weights()

  def mean_loss(weights):
    method, losses = make_method(), []
    for trajectory, condition, advantage in zip(
      batch.transitions, batch.conditions, batch.advantage
    ):
      for k in range(WINDOW):
        x, sigma, sigma_next = trajectory.x[k], trajectory.sigma[k], trajectory.sigma_next[k]
        velocity = linear_velocity({"trainable": weights}, x, jnp.full(BATCH, sigma), condition)
        gaussian = method.step_fn(x, velocity, sigma, sigma_next)
        log_prob = steps.cps_log_prob(trajectory.x_next[k, :, 0], gaussian)
        ratio = jnp.exp(log_prob - trajectory.log_prob[k, :, 0])
        losses.append(jnp.maximum(-advantage[k] * ratio, -advantage[k] * jnp.clip(ratio, 0.5, 1.5)))
    return jnp.mean(jnp.stack(losses))

  _, gradient, metrics = update(batch, weights=off_policy)
  wanted, wanted_gradient = jax.value_and_grad(mean_loss)(off_policy)
  assert_close(gradient, wanted_gradient)
  assert_close(metrics["loss"], wanted)


def test_one_large_microbatch_has_the_gradient_of_many_small_ones(batch):
  join = lambda *leaves: jnp.concatenate(leaves, axis=1)
  first = batch.transitions[0]
  joined = jax.tree.map(lambda *a: join(*a) if a[0].ndim > 1 else a[0], *batch.transitions)
  joined = dataclasses.replace(
    joined, final=jnp.concatenate([t.final for t in batch.transitions]), sigma=first.sigma
  )
  whole = batches_lib.Batch(
    [joined],
    [jnp.concatenate(batch.conditions)],
    jnp.concatenate(list(batch.advantage), axis=1)[None],
    jnp.concatenate(list(batch.weight), axis=1)[None],
  )
  assert_close(update(whole)[1], update(batch)[1])


@pytest.mark.parametrize("size", [1, 2])
def test_an_update_of_smaller_microbatches_has_the_gradient_of_the_rollouts(batch, size):
  train = config_lib.Train(microbatch=BATCH, update_microbatch=size)
  config = dataclasses.replace(make_config(), train=train)
  assert batches_lib.stacked(config, batch).advantage.shape == (
    CHUNKS * BATCH // size,
    WINDOW,
    size,
  )
  weight = jax.random.uniform(jax.random.key(8), batch.weight.shape)
  batch = dataclasses.replace(batch, weight=weight)
  assert_close(update(batch, config=config)[1:], update(batch)[1:])


def test_samples_of_weight_zero_do_not_count(batch):
  kept = dataclasses.replace(
    batch,
    transitions=batch.transitions[:2],
    conditions=batch.conditions[:2],
    advantage=batch.advantage[:2],
    weight=batch.weight[:2],
  )
  ignored = dataclasses.replace(batch, weight=batch.weight.at[2].set(0.0))
  (_, gradient, metrics), (_, wanted, wanted_metrics) = update(ignored), update(kept)
  assert_close(gradient, wanted)
  assert_close(metrics["ratio/mean"], wanted_metrics["ratio/mean"])


def test_update_without_any_weight_changes_nothing(batch):
  after, _, metrics = update(dataclasses.replace(batch, weight=jnp.zeros_like(batch.weight)))
  jax.tree.map(np.testing.assert_array_equal, after.trainable, WEIGHTS)
  assert float(metrics["loss"]) == 0


def test_samples_without_advantage_at_every_step_get_weight_zero():
  config = make_config()
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, group_size=2))
  assign = step.make_credit_fn(config, make_method(normalize=lambda reward: reward))
  reward = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, -9.0]])
  credited, advantage, weight = assign(reward[None], jnp.ones(1), {})
  np.testing.assert_array_equal(weight, [0.0, 1.0, 1.0])
  np.testing.assert_array_equal(credited.reward[1], [0.0, 0.0, -9.0])
  assert float(advantage.min()) == -config.advantage.clip


def test_on_policy_metrics_say_so(batch):
  metrics = update(batch)[2]
  # This model's sums may be contracted in one program and not in the other: an ulp, not 0 as in
  # test_first_update_log_ratio_is_exactly_zero.
  assert float(metrics["ratio/max_abs_log"]) == pytest.approx(0.0, abs=1e-6)
  assert float(metrics["ratio/min"]) == pytest.approx(1.0, abs=1e-6)
  assert float(metrics["ratio/max"]) == pytest.approx(1.0, abs=1e-6)
  assert float(metrics["clip/above"]) == float(metrics["clip/below"]) == 0


def test_shares_clipped_above_and_below_add_up_off_policy(batch):
  metrics = update(batch, weights=other_weights(), config=make_config(clip_range=1e-7))[2]
  assert float(metrics["clip/above"]) > 0
  assert float(metrics["clip/below"]) > 0
  assert float(metrics["clip/above"] + metrics["clip/below"]) == pytest.approx(1.0, abs=0.01)


def test_kl_is_zero_at_the_reference_and_positive_away_from_it(batch):
  config = make_config(kl_coef=0.1)
  assert float(update(batch, config=config)[2]["kl"]) == pytest.approx(0.0, abs=1e-10)
  assert float(update(batch, config=config, weights=other_weights())[2]["kl"]) > 1e-6


def test_kl_term_pulls_towards_the_reference(batch):
  config = make_config(kl_coef=0.1)
  flat = dataclasses.replace(batch, advantage=jnp.zeros_like(batch.advantage))
  _, gradient, _ = update(flat, config=config, weights=other_weights())
  away = jax.tree.map(lambda a, b: a - b, other_weights(), WEIGHTS)
  assert sum(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.vdot(a, b)), gradient, away))) > 0


def test_reported_gradient_norm_is_that_of_the_gradient(batch):
  _, gradient, metrics = update(batch)
  assert_close(metrics["grad_norm"], optax.tree.norm(gradient))


@pytest.mark.parametrize("every, update_number, moves", [(1, 1, True), (3, 2, False), (3, 3, True)])
def test_ema_moves_by_its_decay_whenever_its_updates_are_full(every, update_number, moves):
  ema = config_lib.Ema(decay=0.75, every=every)
  optimizer = optax.sgd(0.0)
  before = dataclasses.replace(
    state.init_state({"w": jnp.asarray(8.0)}, optimizer),
    ema={"w": jnp.asarray(4.0)},
    update=jnp.int32(update_number - 1),
  )
  after = state.apply_gradients(before, {"w": jnp.asarray(1.0)}, optimizer, ema)
  assert float(after.ema["w"]) == (5.0 if moves else 4.0)
  assert int(after.update) == update_number


def test_learning_rate_warms_up_linearly_then_stays():
  config = config_lib.Optimizer(learning_rate=0.5, warmup_updates=2, weight_decay=0.0, eps=1e-30)
  optimizer = state.make_optimizer(config)
  current = state.init_state({"w": jnp.asarray(0.0)}, optimizer)
  places = [0.0]
  for _ in range(4):
    current = state.apply_gradients(current, {"w": jnp.asarray(1.0)}, optimizer, config_lib.Ema())
    places.append(float(current.trainable["w"]))
  # Under a constant gradient Adam steps by the learning rate, but for float32 bias corrections.
  np.testing.assert_allclose(-np.diff(places), [0.25, 0.5, 0.5, 0.5], rtol=1e-4)


def rates_of(schedule_name, updates, warmup):
  """The learning rate of every update of a run."""
  config = config_lib.Optimizer(
    learning_rate=0.5, schedule=schedule_name, final_scale=0.2, warmup_updates=warmup,
    weight_decay=0.0, eps=1e-30,
  )  # fmt: skip
  optimizer = state.make_optimizer(config, total_updates=updates)
  current = state.init_state({"w": jnp.asarray(0.0)}, optimizer)
  places = [0.0]
  for _ in range(updates):
    current = state.apply_gradients(current, {"w": jnp.asarray(1.0)}, optimizer, config_lib.Ema())
    places.append(float(current.trainable["w"]))
  return -np.diff(places)


@pytest.mark.parametrize("warmup, rising", [(0, []), (2, [0.25, 0.5])])
@pytest.mark.parametrize(
  "name, falling",
  [
    ("linear", [0.5, 0.4, 0.3, 0.2, 0.1]),
    ("cosine", optax.cosine_decay_schedule(0.5, 4, alpha=0.2)(jnp.arange(5))),
  ],
)
def test_learning_rate_reaches_its_final_scale_at_the_last_update(name, falling, warmup, rising):
  rates = rates_of(name, 5 + warmup, warmup)
  # Adam's float32 bias corrections, as above.
  np.testing.assert_allclose(rates, [*rising, *falling], rtol=1e-4)
  assert rates[-1] == pytest.approx(0.1, rel=1e-4)


def forward_batch(batch):
  """Of a forward process: what is noised afresh, at levels of its own."""
  levels = np.random.default_rng(3).uniform(0.2, 0.9, (CHUNKS, WINDOW, BATCH)).astype(np.float32)
  return dataclasses.replace(batch, levels=jnp.asarray(levels), key=jax.random.key(5))


def product_velocity(params, x, sigma, condition):
  """As `linear_velocity`, by one product, so that evaluations can be counted."""
  level = sigma.reshape(-1, 1, 1, 1)
  weights = params["trainable"]
  return weights["a"] * x + jnp.matmul(level * condition, weights["b"][:, None])


@pytest.mark.parametrize("kl_coef", [0.0, 1e-3])
@pytest.mark.parametrize("chunks, passes", [((), 1), ((1, 1), 2)])
def test_an_update_that_only_scores_does_what_is_counted(
  batch, monkeypatch, kl_coef, chunks, passes
):
  config = make_config(kl_coef=kl_coef, chunks=chunks)
  method = make_method(velocity_fn=product_velocity, reference_velocity_fn=product_velocity)
  batch = batches_lib.stacked(config, dataclasses.replace(batch, phase=np.int32(batches_lib.SCORE)))
  before = state.init_state(WEIGHTS, method.optimizer)
  args = (before, {}, {"frozen": {}, "trainable": WEIGHTS}, batch)
  monkeypatch.setattr(flops, "max", min, raising=False)  # of a cond the cheapest branch counts
  done = flops.count(step.make_rescoring_step(config, method), *args).total
  one_pass = CHUNKS * WINDOW * BATCH * 2 * 2 * 3  # multiplications and additions
  assert done == flops.count(step.make_scores(config, method), *args).total == passes * one_pass


FIRST = {"make": step.make_rescoring_step, "phase": batches_lib.FIRST}


@pytest.mark.parametrize(
  "axes, objective, program",
  [((4, 1, 1), "policy", {}), ((4, 1, 1), "policy", FIRST), ((4, 1, 1), "nft", {})],
)
def test_gradients_are_summed_over_the_data_once_an_update(axes, objective, program, batch):
  make, phase = program.get("make", step.make_train_step), program.get("phase")
  config = make_config(objective=objective, clip_range=0.5 if objective == "policy" else 0.0)
  if objective == "nft":
    batch = forward_batch(batch)
  batch = dataclasses.replace(batch, phase=phase)
  keeps_old = objective == "nft"
  mesh = mesh_lib.make_mesh(config_lib.Mesh(*axes), jax.devices()[:4])
  single = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])

  def compiled(mesh, batch):
    run, copied = make(config, method := make_method()), jax.NamedSharding(mesh, jax.P())
    before = state.init_state(other_weights(), method.optimizer, keeps_old=keeps_old)
    reference = {"frozen": {}, "trainable": WEIGHTS}
    lay = lambda a: jax.device_put(
      a,
      jax.NamedSharding(mesh, jax.P(None, mesh_lib.BATCH))
      if a.ndim > 1 and a.shape[1] == BATCH
      else copied,
    )
    laid = dataclasses.replace(batch, transitions=jax.tree.map(lay, batch.transitions))
    args = jax.device_put((before, {}, reference), copied)
    with jax.set_mesh(mesh):
      laid = batches_lib.stacked(config, laid)
      return run.lower(*args, laid).compile(), (*args, laid)

  run, args = compiled(mesh, batch)
  cut = lambda a: a[:-1]
  fewer = dataclasses.replace(
    batch,
    transitions=cut(batch.transitions),
    conditions=cut(batch.conditions),
    advantage=cut(batch.advantage),
    weight=cut(batch.weight),
    levels=None if batch.levels is None else cut(batch.levels),
  )
  exchanged = lambda program: collectives.read_traffic(program.as_text(), devices=4)
  sent, sent_for_fewer = exchanged(run), exchanged(compiled(mesh, fewer)[0])
  assert sent.runs["all-reduce"] == sent_for_fewer.runs["all-reduce"] > 0
  alone, args_alone = compiled(single, batch)
  (after, metrics), (wanted, wanted_metrics) = run(*args)[:2], alone(*args_alone)[:2]
  assert_close(jax.device_get(after.trainable), jax.device_get(wanted.trainable))
  assert_close(jax.device_get(metrics), jax.device_get(wanted_metrics))


def test_update_without_any_weight_leaves_a_moving_optimizer_as_it_is(batch):
  config = dataclasses.replace(make_config(), ema=config_lib.Ema(decay=0.5, every=1))
  train_step = step.make_train_step(config, method := make_method(optimizer=optax.adam(0.1)))
  reference = {"frozen": {}, "trainable": WEIGHTS}
  batch = batches_lib.stacked(config, batch)
  moving, _ = train_step(state.init_state(WEIGHTS, method.optimizer), {}, reference, batch)
  kept = lambda s: jax.device_get((s.trainable, s.opt_state, s.ema))
  before = kept(moving)
  assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(before[1][0].mu))
  nothing = dataclasses.replace(batch, weight=jnp.zeros_like(batch.weight))
  after, _ = train_step(moving, {}, reference, nothing)
  jax.tree.map(np.testing.assert_array_equal, kept(after), before)


# (flat, rate, most) of DiffusionNFT's two settings, and the d that they give by hand.
@pytest.mark.parametrize(
  "decay, updates, d",
  [
    ((0, 0.001, 0.5), 0, 0.0),
    ((0, 0.001, 0.5), 200, 0.2),
    ((0, 0.001, 0.5), 800, 0.5),
    ((75, 0.0075, 0.999), 60, 0.0),
    ((75, 0.0075, 0.999), 175, 0.75),
    ((75, 0.0075, 0.999), 300, 0.999),
  ],
)
def test_old_policy_moves_to_the_new_one_by_its_decay(decay, updates, d):
  before = dataclasses.replace(
    state.init_state({"w": jnp.asarray(3.0)}, optax.sgd(0.0), keeps_old=True),
    old={"w": jnp.asarray(7.0)},
    update=jnp.int32(updates),
  )
  after = state.move_old(before, decay)
  assert float(after.old["w"]) == pytest.approx(3.0 + 4.0 * d, rel=1e-6)
  assert float(after.trainable["w"]) == 3.0


def updates_of(optimizer, weights, count=5):
  """The weights after so many updates under gradients that are fixed."""
  current = state.init_state({"w": weights}, optimizer)
  for i in range(count):
    grads = {"w": jnp.cos(jnp.arange(4.0) + i)}
    current = state.apply_gradients(current, grads, optimizer, config_lib.Ema())
  return current.trainable["w"]


def test_optimizer_is_optax_adamw_behind_clipping():
  config = config_lib.Optimizer(weight_decay=0.5, max_grad_norm=0.1)
  adamw = optax.adamw(config.learning_rate, b1=config.b1, b2=config.b2, weight_decay=0.5)
  reference = optax.chain(optax.clip_by_global_norm(0.1), adamw)
  weights = jnp.asarray([3.0, -2.0, 0.0, 1.0])
  np.testing.assert_array_equal(
    updates_of(state.make_optimizer(config), weights), updates_of(reference, weights)
  )
  # Checkpoints of earlier versions are restored into the same tree.
  assert jax.tree.structure(state.make_optimizer(config).init(weights)) == jax.tree.structure(
    reference.init(weights)
  )


def test_decay_to_the_start_is_the_decay_of_the_way_from_it():
  config = config_lib.Optimizer(learning_rate=0.1, weight_decay=0.5)
  start = jnp.asarray([3.0, -2.0, 0.0, 1.0])
  to_start = state.make_optimizer(dataclasses.replace(config, decay_to="start"))
  way = updates_of(to_start, start) - start
  np.testing.assert_allclose(
    way, updates_of(state.make_optimizer(config), jnp.zeros(4)), rtol=1e-5, atol=1e-7
  )


def test_decay_to_the_start_forgets_what_gradients_no_longer_ask_for():
  config = config_lib.Optimizer(learning_rate=0.1, weight_decay=1.0, decay_to="start", b1=0.0)
  optimizer = state.make_optimizer(config)
  start = jnp.asarray([3.0])
  current = state.init_state({"w": start}, optimizer)
  far = dataclasses.replace(current, trainable={"w": start + 1.0})
  after = state.apply_gradients(far, {"w": jnp.zeros(1)}, optimizer, config_lib.Ema())
  np.testing.assert_allclose(after.trainable["w"], start + 0.9, rtol=1e-6)


def test_gradient_is_clipped_to_its_largest_norm():
  config = config_lib.Optimizer(max_grad_norm=1.0, weight_decay=0.0, eps=1.0, learning_rate=1.0)
  optimizer = state.make_optimizer(config)
  steps_taken = []
  for size in (1.0, 1000.0):
    current = state.init_state({"w": jnp.asarray(0.0)}, optimizer)
    current = state.apply_gradients(current, {"w": jnp.asarray(size)}, optimizer, config_lib.Ema())
    steps_taken.append(float(current.trainable["w"]))
  assert steps_taken[0] == pytest.approx(steps_taken[1], rel=1e-6)


def epoch_of(transitions, order):
  """A Rollout of these microbatches; what was scored is left out."""
  known = {
    "transitions": transitions,
    "conditions": [f"c{i}" for i in range(len(transitions))],
    "order": order,
    "sigmas": SIGMAS,
  }
  return rollout.Rollout(
    **{field.name: known.get(field.name) for field in dataclasses.fields(rollout.Rollout)}
  )


def test_split_updates_cuts_the_epoch_in_order():
  config = make_config()
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, updates_per_epoch=2))
  rolled = epoch_of(["t0", "t1", "t2", "t3"], np.arange(8))
  advantage = np.arange(2 * 8).reshape(2, 8)  # [W, B]; sample i is column i
  first, second = batches_lib.split_updates(config, rolled, advantage, np.arange(8), 0)
  assert (first.transitions, second.conditions) == (["t0", "t1"], ["c2", "c3"])
  np.testing.assert_array_equal(first.weight, [[[0, 1], [0, 1]], [[2, 3], [2, 3]]])
  np.testing.assert_array_equal(second.advantage, [[[4, 5], [12, 13]], [[6, 7], [14, 15]]])


def test_split_updates_takes_samples_in_the_order_of_the_microbatches():
  config = make_config()
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, updates_per_epoch=2))
  order = np.array([3, 0, 2, 1])
  batches = batches_lib.split_updates(
    config, epoch_of(["t0", "t1"], order), 10.0 * np.arange(4)[None], np.arange(4), 0
  )
  np.testing.assert_array_equal([b.advantage for b in batches], [[[[30, 0]]], [[[20, 10]]]])
  np.testing.assert_array_equal([b.weight for b in batches], [[[[3, 0]]], [[[2, 1]]]])


def test_split_updates_by_steps_gives_every_update_its_steps_of_all_samples(batch):
  config = make_config()
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, updates_per_epoch=WINDOW, updates_by="steps")
  )
  advantage = np.random.default_rng(0).normal(size=(WINDOW, CHUNKS * BATCH))
  rolled = epoch_of(batch.transitions, np.arange(CHUNKS * BATCH))
  parts = batches_lib.split_updates(config, rolled, advantage, np.ones(CHUNKS * BATCH), 0)
  for k, part in enumerate(parts):
    np.testing.assert_array_equal(np.concatenate(part.advantage, axis=1)[0], advantage[k])
    for found, whole in zip(part.transitions, batch.transitions, strict=True):
      for name in ("x", "x_next", "velocity", "log_prob", "sigma", "sigma_next"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name)[k : k + 1])
  assert len(parts) == WINDOW


@pytest.mark.parametrize("count", [0, 1, 2])
def test_chunks_count_alike_and_so_many_are_drawn_for_each_sample(count):
  config = make_config(chunks=(1, 3, 2), chunks_per_sample=count)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, updates_per_epoch=1))
  rolled = epoch_of(["t0"], np.arange(32))
  (batch,) = batches_lib.split_updates(config, rolled, np.ones((6, 32)), np.ones(32), 0)
  weight = batch.weight[0]  # [W, B]
  sums = np.stack([weight[:1].sum(0), weight[1:4].sum(0), weight[4:].sum(0)])
  assert {*np.unique(sums.round(6))} == ({2.0} if count == 0 else {0.0, 2.0})
  np.testing.assert_array_equal((sums > 0).sum(axis=0), count or 3)
  assert len(np.unique(sums, axis=1).T) == (1 if count == 0 else 3)  # every choice comes


def test_merged_metrics_average_sums_and_keep_extremes():
  names = ("loss", "kl", "ratio/mean", "clip/above", "clip/below", "grad_norm")
  row = lambda value, low, high, log: (
    dict.fromkeys(names, value)
    | {
      "ratio/min": low,
      "ratio/max": high,
      "ratio/max_abs_log": log,
    }
  )
  merged = sums.of_updates([row(1.0, 0.9, 1.0, 0.0), row(3.0, 1.0, 1.2, 0.3)])
  assert {merged[name] for name in names} == {2.0}
  assert (merged["ratio/min"], merged["ratio/max"], merged["ratio/max_abs_log"]) == (0.9, 1.2, 0.3)
  assert merged["ratio/first_update_max_abs_log"] == 0.0


def on_policy_config(dynamics, scale, rank, kl_coef, branches=1, **loss):
  return config_lib.Config(
    lora=config_lib.Lora(rank=rank, alpha=8.0),
    sampler=config_lib.Sampler(
      rollout="trajectory" if branches == 1 else "branch",
      branches=branches,
      num_steps=4,
      window=(0, 3),
      dynamics=dynamics,
      noise_level=0.3 if dynamics == "dance" else 0.7,
      guidance_scale=scale,
    ),
    # Completions play no part in this; those of members cannot be left out, and are made short.
    credit=config_lib.Credit("flow_grpo" if branches == 1 else "branch"),
    completion=config_lib.Completion(steps=1),
    train=config_lib.Train(prompts_per_epoch=4, group_size=16, microbatch=32, updates_per_epoch=1),
    loss=config_lib.Loss(kl_coef=kl_coef, **loss),
  )


def first_update_metrics(config, mesh):
  """The metrics of the first update of the shipped model on one epoch of noise."""
  model = build.build_model(config, mesh, ())
  method = method_lib.build_method(config, model)
  params, members = model.params(model.trainable), method.members
  assert members == config.sampler.branches
  with jax.set_mesh(mesh):
    sample_fn = rollout.make_rollout_fn(config, model, method)
    transitions, conditions = [], []
    place = method_lib.draw_place(config, 0, 0).astype(np.int32)
    plan = method_lib.build_plan(config, method, place)
    for chunk in range(2):
      anchors = 16 // members
      numbers = [np.repeat([0, 1], anchors) + 2 * chunk, np.tile(np.arange(anchors), 2)]
      group = np.stack(numbers, axis=1)
      texts = [("CAT3", "XY7", "HELP", "9RT")[i] for i in group[:, 0]]
      rows = texts[:: method.neighbours]
      placed = (group.astype(np.int32), method_lib.build_condition(config, model, rows))
      placed = jax.device_put(placed, mesh_lib.batch_sharding(mesh))
      key = rollout.epoch_key(0, 0)
      found, _ = sample_fn(params, key, chunk, *placed, place, plan)
      transitions.append(found)
      conditions.append(placed[1])
    advantage = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    batch = batches_lib.Batch(transitions, conditions, advantage, np.ones((2, 3, 32), np.float32))
    batch = batches_lib.stacked(config, batch)
    reference = {"frozen": model.frozen, "trainable": {} if config.lora.rank else model.trainable}
    before = state.init_state(model.trainable, method.optimizer)
    _, metrics = step.make_train_step(config, method)(before, model.frozen, reference, batch)
  return jax.device_get(metrics)


@pytest.mark.exact
@pytest.mark.parametrize(
  "dynamics, scale, rank, kl_coef",
  [
    ("cps", 3.0, 4, 0.1),
    pytest.param("cps", 1.0, 0, 0.0, marks=pytest.mark.slow),
    pytest.param("sde", 3.0, 0, 0.0, marks=pytest.mark.slow),
    pytest.param("dance", 1.0, 0, 0.1, marks=pytest.mark.slow),
    *(
      pytest.param(*case, marks=pytest.mark.exhaustive)
      for case in [
        ("cps", 3.0, 0, 0.0),
        ("cps", 1.0, 0, 0.1),
        ("cps", 1.0, 4, 0.0),
        ("sde", 1.0, 0, 0.0),
        ("sde", 1.0, 4, 0.1),
        ("dance", 1.0, 0, 0.0),
        ("dance", 3.0, 0, 0.0),
        ("dance", 3.0, 4, 0.0),
      ]
    ),
  ],
)
def test_first_update_log_ratio_is_exactly_zero(one_device, dynamics, scale, rank, kl_coef):
  """On the shipped model at the recipe's microbatch, float32, one CPU device: not small, 0."""
  metrics = first_update_metrics(on_policy_config(dynamics, scale, rank, kl_coef), one_device)
  assert float(metrics["ratio/max_abs_log"]) == 0.0
  assert float(metrics["grad_norm"]) > 0
  assert float(metrics["kl"]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.exact
@pytest.mark.slow
def test_first_update_log_ratio_of_steps_side_by_side_is_exactly_zero(one_device):
  config = on_policy_config("cps", 3.0, 4, 0.0)
  train = dataclasses.replace(config.train, steps_per_call=3)
  metrics = first_update_metrics(dataclasses.replace(config, train=train), one_device)
  assert float(metrics["ratio/max_abs_log"]) == 0.0 < float(metrics["grad_norm"])


NORMALIZED, DPPO = {"ratio": "normalized"}, {"trust_region": "dppo"}


@pytest.mark.exact
@pytest.mark.parametrize(
  "dynamics, branches, loss",
  [
    pytest.param("cps", 4, {}, marks=pytest.mark.slow),
    pytest.param("sde", 1, NORMALIZED | DPPO, marks=pytest.mark.slow),
    *(
      pytest.param(*case, marks=pytest.mark.exhaustive)
      for case in [
        ("cps", 1, NORMALIZED),
        ("cps", 1, DPPO),
        ("dance", 1, NORMALIZED | DPPO),
        ("sde", 4, {}),
        ("dance", 4, {}),
        ("cps", 4, NORMALIZED),
        ("cps", 16, DPPO),
        ("sde", 4, NORMALIZED | DPPO),
        ("sde", 1, {"chunks": (1, 2)}),
      ]
    ),
  ],
)
def test_first_update_log_ratio_of_every_composition_is_exactly_zero(
  one_device, dynamics, branches, loss
):
  config = on_policy_config(dynamics, 1.0, 0, 0.0, branches, **loss)
  metrics = first_update_metrics(config, one_device)
  assert float(metrics["ratio/max_abs_log"]) == 0.0
  assert float(metrics["grad_norm"]) > 0
