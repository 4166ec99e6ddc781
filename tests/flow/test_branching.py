"""Members that leave one anchor: whose draws they are, and what a naive loop makes of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import branching, completion, sampler, schedule, steps

T, S, M, SHAPE, E = 6, 4, 6, (2, 2, 1), 5
SIGMAS = schedule.sd3_sigmas(T)
RNG = np.random.default_rng(0)
PARAMS = {
  "x": RNG.normal(size=(4, 16)),
  "sigma": RNG.normal(size=16),
  "condition": RNG.normal(size=(E, 16)),
  "out": RNG.normal(size=(16, 4)) / 4,
}
CONDITION = RNG.normal(size=(S, E))
X_INIT = RNG.normal(size=(S, *SHAPE))
KEY = jax.random.key(3)
STEP = functools.partial(steps.cps_step, noise_level=0.7)


def velocity(params, x, sigma, condition, tanh=np.tanh):
  """A random network: nonlinear in x, different for every level and sample."""
  condition = condition.repeat(len(x) // len(condition), axis=0)  # neighbours share a row
  hidden = x.reshape(len(x), -1) @ params["x"] + condition @ params["condition"]
  hidden = tanh(hidden + sigma[:, None] * params["sigma"])
  return (hidden @ params["out"]).reshape(x.shape)


def velocity_fn(params, x, sigma, condition):
  return velocity(params, x, sigma, condition, tanh=jnp.tanh)


def float32(tree):
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@functools.partial(jax.jit, static_argnames=("members", "antithetic", "step", "dtype"))
def _sample(x_init, condition, branched, sigmas, members, antithetic, step, dtype):
  return branching.sample_branches(
      velocity_fn, step, steps.cps_log_prob, float32(PARAMS), KEY, x_init, condition,
      sigmas=sigmas, branched=branched, members=members, antithetic=antithetic, dtype=dtype,
  )  # fmt: skip


def sample(
  branched=(1, 2, 4), *, members=M, copies=1, antithetic=False, step=STEP, dtype="float32"
):
  """Each anchor stands in the batch `copies` times, one after the other."""
  repeated = [jnp.repeat(a, copies, axis=0) for a in float32((X_INIT, CONDITION))]
  sigmas, branched = jnp.asarray(SIGMAS, jnp.float32), jnp.asarray(branched, jnp.int32)
  return _sample(*repeated, branched, sigmas, members, antithetic, step, dtype)


@functools.partial(jax.jit, static_argnames="last")
def ode(last):
  return sampler.sample_ode(
    velocity_fn, *float32((PARAMS, X_INIT, CONDITION)), sigmas=SIGMAS[: last + 1]
  )


@pytest.fixture(scope="module")
def branches():
  return sample()


def test_anchors_are_the_ode(branches):
  # Two programs: XLA may contract x + v dt to an FMA in one of them. A few ulps over T steps.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
  close(branches.final, ode(T))
  for state, k in zip(branches.x, (1, 2, 4)):
    close(state, ode(k))


def test_anchors_do_not_depend_on_what_leaves_them(branches):
  other = sample((0, 3, 4), members=3)
  np.testing.assert_array_equal(other.final, branches.final)
  np.testing.assert_array_equal(other.x[2], branches.x[2])


def test_levels_are_those_of_the_branched_steps(branches):
  np.testing.assert_array_equal(branches.sigma, SIGMAS[[1, 2, 4]].astype(np.float32))
  np.testing.assert_array_equal(branches.sigma_next, SIGMAS[[2, 3, 5]].astype(np.float32))


def test_velocity_is_the_models_output_at_the_anchors_states(branches):
  params, condition = float32((PARAMS, CONDITION))
  for k in range(3):
    wanted = velocity_fn(params, branches.x[k], jnp.full(S, branches.sigma[k]), condition)
    np.testing.assert_allclose(branches.velocity[k], wanted, atol=1e-6)


def test_every_member_leaves_its_state_by_its_own_noise(branches):
  noise = standard_noise(branches, STEP)
  assert len(np.unique(noise[..., 0, 0, 0])) == 3 * S * M
  # 288 draws: the mean is known to 1 / 17, the standard deviation to 1 / 24; 4 of those.
  np.testing.assert_allclose((noise.mean(), noise.std()), (0, 1), atol=4 / 17)


def standard_noise(transitions, step):
  """(x_next - mean) / std of every member, [W, S, M, ...]."""
  gaussians = [
    step(*at)
    for at in zip(transitions.x, transitions.velocity, transitions.sigma, transitions.sigma_next)
  ]
  each = [(x - g.mean[:, None]) / g.std for x, g in zip(transitions.x_next, gaussians)]
  return np.stack(each)


def test_log_prob_is_that_of_each_members_step(branches):
  for k in range(3):
    gaussian = STEP(branches.x[k], branches.velocity[k], branches.sigma[k], branches.sigma_next[k])
    wanted = [steps.cps_log_prob(branches.x_next[k, :, m], gaussian) for m in range(M)]
    # The last std is .008: a difference of float32 states of size 1 is known to 1e-5 of it, twice.
    np.testing.assert_allclose(branches.log_prob[k], np.stack(wanted, axis=1), rtol=1e-4)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("copies", [2, 3, 6])
def test_members_do_not_depend_on_how_they_are_divided_over_copies_of_their_anchor(
  copies, antithetic
):
  whole = sample(antithetic=antithetic)
  parts = sample(members=M // copies, copies=copies, antithetic=antithetic)
  assert parts.x_next.shape[1:3] == (S * copies, M // copies)
  # A matrix product of more rows may be summed in another order: a few ulps over T steps.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
  close(parts.x_next.reshape(whole.x_next.shape), whole.x_next)
  close(parts.log_prob.reshape(whole.log_prob.shape), whole.log_prob)


def test_antithetic_neighbours_take_opposite_noise():
  transitions = sample(antithetic=True)
  noise = standard_noise(transitions, STEP)
  # Noise found again from float32 states of size 1, and the last std is .008.
  np.testing.assert_allclose(noise[:, :, ::2], -noise[:, :, 1::2], atol=1e-4)
  assert len(np.unique(np.abs(noise[:, :, ::2, 0, 0, 0]))) == 3 * S * M // 2


def test_antithetic_pairs_cancel_in_the_mean_of_the_members():
  transitions = sample(antithetic=True)
  for k in range(3):
    at = (
      transitions.x[k],
      transitions.velocity[k],
      transitions.sigma[k],
      transitions.sigma_next[k],
    )
    np.testing.assert_allclose(transitions.x_next[k].mean(axis=1), STEP(*at).mean, atol=1e-6)


@pytest.mark.slow
@pytest.mark.exact  # of other shapes XLA makes another program, which at level 0 rounds otherwise
@pytest.mark.parametrize("some", [(1,), (2, 4), (1, 4)])
def test_some_of_the_steps_have_the_same_members_as_all(branches, some):
  rows = np.array([(1, 2, 4).index(k) for k in some])
  found = sample(some)
  for name in ("x", "x_next", "velocity", "log_prob", "sigma", "sigma_next"):
    np.testing.assert_array_equal(getattr(found, name), getattr(branches, name)[rows], name)


def test_a_step_for_each_state_leaves_by_each_states_own_std():
  """Where levels differ between states the std has a batch axis."""

  def step(x, velocity, sigma, sigma_next):
    return STEP(x, velocity, jnp.full(len(x), sigma), jnp.full(len(x), sigma_next))

  np.testing.assert_allclose(sample(step=step).x_next, sample().x_next, rtol=1e-6, atol=1e-6)


def test_drawn_steps_share_one_compilation():
  traces = []

  @jax.jit
  def traced(branched, plan):
    traces.append(branched)
    params, x_init, condition = float32((PARAMS, X_INIT, CONDITION))
    transitions = branching.sample_branches(
        velocity_fn, STEP, steps.cps_log_prob, params, KEY, x_init, condition,
        sigmas=SIGMAS, branched=branched, members=2,
    )  # fmt: skip
    return branching.complete(velocity_fn, params, transitions, condition, plan)

  found = []
  for branched in ((0, 1), (0, 4), (3, 4)):
    plan = branching.plan(SIGMAS, branched, at_least=(5, 2))
    found.append(np.asarray(traced(jnp.asarray(branched), plan)))
  assert len(traces) == 1
  np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-6)  # both left at step 0
  np.testing.assert_allclose(found[1][1], found[2][1], atol=1e-6)  # both left at step 4


def test_rounded_members_are_what_their_dtype_can_hold_and_are_scored_as_they_are():
  rounded = sample(dtype="bfloat16")
  for latents in (rounded.x, rounded.x_next, rounded.final):
    np.testing.assert_array_equal(latents, latents.astype(jnp.bfloat16).astype(jnp.float32))
  gaussian = STEP(rounded.x[0], rounded.velocity[0], rounded.sigma[0], rounded.sigma_next[0])
  wanted = steps.cps_log_prob(rounded.x_next[0, :, 2], gaussian)
  # Of float32; a state that were not rounded would be off by 4e-3 of its size.
  np.testing.assert_allclose(rounded.log_prob[0, :, 2], wanted, rtol=1e-5)


def naive_velocity(x, sigma):
  """Of the S M members, float64."""
  condition = np.repeat(CONDITION, len(x) // S, axis=0)
  return velocity(PARAMS, x, np.full(len(x), sigma), condition)


def naive_completion(x, grid, solver):
  """Euler, or DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2, alpha = 1 - sigma).

  The latter is first order in its first step and its last.
  """
  log_snr = lambda sigma: math.log((1 - sigma) / sigma)
  previous = previous_h = None
  for sigma, sigma_next in zip(grid[:-1], grid[1:]):
    v = naive_velocity(x, sigma)
    if solver == "euler" or sigma_next == 0:
      x = x + v * (sigma_next - sigma)
      continue
    data, h = x - sigma * v, log_snr(sigma_next) - log_snr(sigma)
    guess = data
    if previous is not None:
      guess = data + h / (2 * previous_h) * (data - previous)
    x = sigma_next / sigma * x - (1 - sigma_next) * (math.exp(-h) - 1) * guess
    previous, previous_h = data, h
  return x


def numbers(k, options):
  """Points of the grid on which the members that left at step k go on, for each stride."""
  first = k + 1
  if first == T:
    return [[]] * len(options.get("strides", [1]))
  if strides := options.get("strides"):
    return [[first, *range(first + 1, T + 1, stride)][:-1] + [T] for stride in strides]
  count = min(options.get("steps") or T, T - first)
  return [[round(first + i * (T - first) / count) for i in range(count + 1)]]


ALL = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
  "branched, options, solver, lanes_per_chunk",
  [
    (ALL, {}, "euler", 0),
    (ALL, {}, "dpmpp_2m", 2),
    (ALL, {"steps": 2}, "euler", 2),
    (ALL, {"strides": (1, 2)}, "dpmpp_2m", 0),
    ((1, 4), {"steps": 1}, "euler", 0),
    ((1, 4), {"steps": 3}, "dpmpp_2m", 0),
    ((2, 5), {"strides": (2,)}, "euler", 0),
    ((2, 5), {"strides": (2, 1)}, "euler", 0),
  ],
)
def test_packed_completions_of_members_equal_naive_loop(branched, options, solver, lanes_per_chunk):
  # dance has noise in the last step, after which there is nothing left to complete.
  step = functools.partial(steps.dance_step, noise_level=0.3)
  transitions = sample(branched, members=3, step=step)
  plan = branching.plan(SIGMAS, branched, solver=solver, **options)
  packed = branching.complete(
    velocity_fn, float32(PARAMS), transitions, float32(CONDITION), plan,
    lanes_per_chunk=lanes_per_chunk,
  )  # fmt: skip
  strides = range(len(options.get("strides", [1])))
  naive = [
    naive_completion(
      np.asarray(transitions.x_next[i], np.float64).reshape(-1, *SHAPE),
      SIGMAS[numbers(k, options)[stride]],
      solver,
    )
    for stride in strides
    for i, k in enumerate(branched)
  ]
  np.testing.assert_allclose(packed, np.stack(naive), atol=1e-5)


def test_members_of_the_last_step_are_finished():
  step = functools.partial(steps.dance_step, noise_level=0.3)
  transitions = sample((5,), step=step)
  plan = branching.plan(SIGMAS, (5,))
  done = branching.complete(velocity_fn, float32(PARAMS), transitions, float32(CONDITION), plan)
  np.testing.assert_array_equal(done, transitions.x_next.reshape(1, S * M, *SHAPE))


def test_what_all_samples_share_of_a_condition_stays_whole():
  shared = float32(CONDITION[:1])
  transitions = sample()
  plan = branching.plan(SIGMAS, (1, 2, 4))
  run = lambda condition: branching.complete(
    velocity_fn, float32(PARAMS), transitions, condition, plan
  )
  np.testing.assert_allclose(run(shared), run(jnp.repeat(shared, S, axis=0)), atol=1e-6)


@pytest.mark.parametrize(
  "options, expected",
  [
    ({"num_steps": 10, "window": 9, "branches": 24}, 45 + 10 / 24),
    ({"num_steps": 10, "window": 9, "branches": 24, "steps": 1}, 9 + 10 / 24),
    ({"num_steps": 10, "window": 9, "branches": 24, "steps": 2}, 8 * 2 + 1 + 10 / 24),
    ({"num_steps": 10, "window": 9, "branches": 5, "steps": 100}, 45 + 2),
    ({"num_steps": 10, "start": 5, "window": 3, "branches": 10}, 4 + 3 + 2 + 1),
    ({"num_steps": 16, "window": 8, "branches": 16}, sum(range(8, 16)) + 1),
    ({"num_steps": 4, "start": 3, "window": 1, "branches": 4}, 1),
  ],
)
def test_num_evaluations_has_its_worked_values(options, expected):
  assert branching.num_evaluations(**{"start": 0} | options) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_num_evaluations_is_what_the_model_is_asked(num):
  rows = []

  def counting(params, x, sigma, condition):
    jax.debug.callback(lambda: rows.append(len(x)))
    return velocity_fn(params, x, sigma, condition)

  # T = 6: the members' five completions have the lengths 5 ... 1, which fill their lanes.
  branched = tuple(range(5))
  plan = branching.plan(SIGMAS, branched, steps=num)

  @jax.jit
  def rollout(x_init):
    params, condition = float32((PARAMS, CONDITION))
    transitions = branching.sample_branches(
        counting, STEP, steps.cps_log_prob, params, KEY, x_init, condition,
        sigmas=SIGMAS, branched=jnp.asarray(branched), members=M,
    )  # fmt: skip
    return branching.complete(counting, params, transitions, condition, plan)

  jax.block_until_ready(rollout(float32(X_INIT)))
  jax.effects_barrier()
  count = branching.num_evaluations(num_steps=T, start=0, window=5, branches=M, steps=num)
  idle = completion.num_lane_evaluations(plan) + T / M - count
  assert idle == (1 if num == 2 else 0)  # 2 + 2 + 2 + 2 + 1 in lanes of 2
  assert sum(rows) == pytest.approx(S * M * (count + idle))
