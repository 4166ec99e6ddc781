"""An update on branches: one evaluation a state, and the gradient of one evaluation a member."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.flow import branching, sampler, schedule, steps
from tpgrpo_jax.training import batches, losses, state, step
from tpgrpo_jax.training import method as method_lib

CHUNKS, WINDOW, STATES, MEMBERS, SHAPE = 2, 3, 2, 4, (2, 3, 1)
SIGMAS = schedule.linear_sigmas(5)
WEIGHTS = {"a": jnp.asarray([0.8]), "b": jnp.asarray([-0.3])}
OFF_POLICY = jax.tree.map(lambda w: w * 1.05, WEIGHTS)
STEPS = {
  "cps": (functools.partial(steps.cps_step, noise_level=0.7), steps.cps_log_prob),
  "sde": (
    functools.partial(steps.sde_step, noise_level=0.7, sigma_max=0.8),
    steps.gaussian_log_prob,
  ),
}


def linear_velocity(params, x, sigma, condition):
  """A model of two weights, whose gradient needs no transformer."""
  level = sigma.reshape(-1, 1, 1, 1)
  return params["trainable"]["a"] * x + params["trainable"]["b"] * level * condition


# An optimizer that leaves the weights alone and keeps the gradient.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, old, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def make_method(dynamics="cps", velocity_fn=linear_velocity, window=WINDOW):
  step_fn, log_prob_fn = STEPS[dynamics]
  return method_lib.Method(
    velocity_fn=velocity_fn,
    reference_velocity_fn=velocity_fn,
    step_fn=step_fn,
    log_prob_fn=log_prob_fn,
    noise_levels=(),
    sigmas=SIGMAS,
    window=window,
    members=1,  # the update reads it off its transitions
    copies=1,
    neighbours=1,
    credit=credit.CREDIT["branch"],
    normalize=None,
    optimizer=KEEP,
  )


def make_config(**loss):
  return config_lib.Config(loss=config_lib.Loss(**{"clip_range": 0.01} | loss))


@functools.cache
def branch_batch(dynamics="cps"):
  method, transitions, conditions = make_method(dynamics), [], []
  for seed in range(CHUNKS):
    noise_key, condition_key, key = jax.random.split(jax.random.key(seed), 3)
    condition = jax.random.normal(condition_key, (STATES, *SHAPE))
    transitions.append(
      branching.sample_branches(
        method.velocity_fn,
        method.step_fn,
        method.log_prob_fn,
        {"trainable": WEIGHTS},
        key,
        jax.random.normal(noise_key, (STATES, *SHAPE)),
        condition,
        sigmas=SIGMAS,
        branched=jnp.asarray([0, 1, 3]),
        members=MEMBERS,
      )
    )
    conditions.append(condition)
  rng = np.random.default_rng(7)
  shape = (CHUNKS, WINDOW, STATES * MEMBERS)
  advantage = rng.normal(size=shape).astype(np.float32)
  weight = (rng.random(shape) < 0.8).astype(np.float32)
  return batches.Batch(transitions, conditions, advantage, weight)


def divided(batch, parts):
  """Every state stands in its microbatch `parts` times, with a part of its members each time."""

  def one(t):
    repeat = lambda a, axis: jnp.repeat(a, parts, axis=axis)
    cut = lambda a: a.reshape(WINDOW, STATES * parts, MEMBERS // parts, *a.shape[3:])
    return dataclasses.replace(
      t,
      states=repeat(t.states, 1),
      members=cut(t.members),
      velocity=repeat(t.velocity, 1),
      log_prob=cut(t.log_prob),
      final=repeat(t.final, 0),
    )

  return dataclasses.replace(
    batch,
    transitions=[one(t) for t in batch.transitions],
    conditions=[jnp.repeat(c, parts, axis=0) for c in batch.conditions],
  )


def gradient_of(batch, config, method, weights=OFF_POLICY):
  before = state.init_state(weights, method.optimizer)
  reference = {"frozen": {}, "trainable": WEIGHTS}
  after, metrics = step.make_train_step(config, method)(
    before, {}, reference, batches.stacked(config, batch)
  )
  return jax.device_get((after.opt_state, metrics))


def assert_close(found, wanted, rtol):
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  assert scale > 1e-4
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol * scale)
  jax.tree.map(close, found, wanted)


COMPOSITIONS = [
  *itertools.product(
    ("log_prob", "normalized"),
    ("clip", "dppo"),
    ("none", "std", "inverse_dt", "inverse_sensitivity"),
    ("cps", "sde"),
  )
]
# One of each of the pairs (ratio, trust region), and every step weight.
FAST = [
  ("log_prob", "clip", "std", "cps"),
  ("normalized", "clip", "inverse_dt", "sde"),
  ("log_prob", "dppo", "none", "sde"),
  ("normalized", "dppo", "inverse_sensitivity", "cps"),
]


def tier(case):
  """The first one always, those of FAST in CI's second tier, the others beside CI."""
  return [] if case == FAST[0] else pytest.mark.slow if case in FAST else pytest.mark.exhaustive


compositions = pytest.mark.parametrize(
  "ratio, region, step_weight, dynamics",
  [pytest.param(*c, marks=tier(c)) for c in COMPOSITIONS],
)


def composition(ratio, region, step_weight):
  # Off-policy some terms are clipped and some are not, whichever the ratio.
  return make_config(
    ratio=ratio, trust_region=region, step_weight=step_weight, kl_coef=0.05, negative_weight=0.5,
    clip_range={"clip": 1e-3, "dppo": 1e-5}[region],
  )  # fmt: skip


@compositions
def test_gradient_is_that_of_one_evaluation_a_member(ratio, region, step_weight, dynamics):
  batch, method = branch_batch(dynamics), make_method(dynamics)
  config = composition(ratio, region, step_weight)
  found, metrics = gradient_of(batch, config, method)
  wanted, wanted_metrics = gradient_of(divided(batch, MEMBERS), config, method)
  assert_close(found, wanted, rtol=1e-6)
  assert 0 < metrics["clip/inactive"] < 1
  for name, value in metrics.items():
    assert value == pytest.approx(wanted_metrics[name], rel=1e-5, abs=1e-6), name


@compositions
def test_gradient_of_a_pair_is_that_of_one_evaluation_a_member_in_float64(
  ratio, region, step_weight, dynamics
):
  """Without the float32 in which an update accumulates."""
  config, batch = composition(ratio, region, step_weight), branch_batch(dynamics)
  with jax.enable_x64(True):
    method = make_method(dynamics)
    pair_loss = losses.make_policy_loss(config, method)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), OFF_POLICY)
    reference = {"trainable": jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), WEIGHTS)}
    gradients = []
    for each in (batch, divided(batch, MEMBERS)):
      pairs, data = step._pairs(config, method, batches.stacked(config, each))
      pairs = {k: jnp.asarray(v, jnp.float64) if v.ndim > 1 else v for k, v in pairs.items()}
      data = jax.tree.map(lambda a: a.astype(jnp.float64), data)

      def loss(weights, pairs=pairs, data=data):
        total = 0.0
        for n in range(WINDOW):  # the first microbatch
          pair, condition = step._looked_up({k: v[n] for k, v in pairs.items()}, data)
          found, _ = pair_loss({"trainable": weights}, reference, {}, pair, condition)
          total += jnp.sum(pair["weight"] * found)
        return total

      gradients.append(jax.device_get(jax.jit(jax.grad(loss))(weights)))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float64")}
    assert_close(*gradients, rtol=1e-12)


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_does_not_depend_on_how_members_are_divided_over_lanes(parts):
  config, method = make_config(), make_method()
  whole, _ = gradient_of(branch_batch(), config, method)
  found, _ = gradient_of(divided(branch_batch(), parts), config, method)
  assert_close(found, whole, rtol=1e-6)


def test_model_is_evaluated_once_a_state_whatever_the_members():
  seen = []

  def counting(params, x, sigma, condition):
    seen.append(x.shape)
    return linear_velocity(params, x, sigma, condition)

  gradient_of(branch_batch(), make_config(), make_method(velocity_fn=counting))
  assert {*seen} == {(STATES, *SHAPE)}


def test_members_of_weight_zero_do_not_count():
  batch = branch_batch()
  changed = np.where(batch.weight > 0, batch.advantage, 100.0)
  found, _ = gradient_of(
    dataclasses.replace(batch, advantage=changed), make_config(), make_method()
  )
  assert_close(found, gradient_of(batch, make_config(), make_method())[0], rtol=1e-7)


def test_on_policy_log_ratio_of_every_member_is_small():
  for ratio in ("log_prob", "normalized"):
    config = make_config(ratio=ratio)
    _, metrics = gradient_of(branch_batch(), config, make_method(), weights=WEIGHTS)
    # This model's sums may be contracted in one program and not in the other.
    assert metrics["ratio/max_abs_log"] == pytest.approx(0.0, abs=1e-6)


def chunk_batch():
  """Trajectories, whose advantage is the same at all steps."""
  method, transitions, conditions = make_method(), [], []
  for seed in range(CHUNKS):
    noise_key, condition_key, key = jax.random.split(jax.random.key(seed), 3)
    condition = jax.random.normal(condition_key, (4, *SHAPE))
    x_init = jax.random.normal(noise_key, (4, *SHAPE))
    transitions.append(
      sampler.sample_trajectory(
        method.velocity_fn, method.step_fn, method.log_prob_fn, {"trainable": WEIGHTS}, key,
        x_init, condition, sigmas=SIGMAS, start=1, window=WINDOW,
      )
    )  # fmt: skip
    conditions.append(condition)
  advantage = np.random.default_rng(1).normal(size=(CHUNKS, 1, 4)).astype(np.float32)
  advantage = np.repeat(advantage, WINDOW, axis=1)
  # By hand, for chunks of 1 and 2 steps: W / (chunks x length) of each step.
  weight = np.tile(np.float32([1.5, 0.75, 0.75])[None, :, None], (CHUNKS, 1, 4))
  return batches.Batch(transitions, conditions, advantage, weight)


def test_gradient_of_chunks_is_that_of_a_loss_of_each_chunk():
  batch, method, limit = chunk_batch(), make_method(), 2e-3

  def mean_loss(weights):
    terms = []
    for t, condition, advantage in zip(batch.transitions, batch.conditions, batch.advantage):
      log_ratios = []
      for k in range(WINDOW):
        level = jnp.full(4, t.sigma[k])
        velocity = linear_velocity({"trainable": weights}, t.x[k], level, condition)
        gaussian = method.step_fn(t.x[k], velocity, t.sigma[k], t.sigma_next[k])
        new = method.log_prob_fn(t.x_next[k, :, 0], gaussian)
        log_ratios.append(new - t.log_prob[k, :, 0])
      for own in ([0], [1, 2]):
        ratio = jnp.exp(sum(log_ratios[k] for k in own) / len(own))
        inside = jnp.clip(ratio, 1 - limit, 1 + limit)
        terms.append(jnp.maximum(-advantage[0] * ratio, -advantage[0] * inside))
    return jnp.mean(jnp.stack(terms))

  config = make_config(chunks=(1, 2), clip_range=limit)
  found, metrics = gradient_of(batch, config, method)
  assert 0 < metrics["clip/inactive"] < 1
  # Log-ratios are differences of numbers near 1, so ratios are known to an ulp or two of 1.
  assert_close(found, jax.device_get(jax.grad(mean_loss)(OFF_POLICY)), rtol=1e-5)
