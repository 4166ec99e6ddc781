"""Packed completions against a loop over states in float64 NumPy, and against diffusers."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import completion, sampler, schedule, steps
from tpgrpo_jax.types import Transitions

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dpmpp_2m.npz"
B, SHAPE, E = 3, (2, 2, 1), 5
RNG = np.random.default_rng(0)
PARAMS = {
  "x": RNG.normal(size=(4, 16)),
  "sigma": RNG.normal(size=16),
  "condition": RNG.normal(size=(E, 16)),
  "out": RNG.normal(size=(16, 4)) / 4,
}
CONDITION = RNG.normal(size=(B, E))


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


def naive_velocity(x, sigma):
  return velocity(PARAMS, x, np.full(len(x), sigma), CONDITION)


def naive_euler(x, grid, before=None):
  del before  # one step remembers nothing
  for sigma, sigma_next in zip(grid[:-1], grid[1:]):
    x = x + naive_velocity(x, sigma) * (sigma_next - sigma)
  return x


def naive_dpmpp_2m_history(x, grid, before=None):
  """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095, with alpha = 1 - sigma.

  First order in the last step, after sigma = 1, and in the first step unless `before` holds the (x, sigma)
  of the evaluation before.
  """
  log_snr = lambda sigma: math.log((1 - sigma) / sigma)
  previous = previous_h = None
  if before is not None:
    past, level = before
    previous = past - level * naive_velocity(past, level)
    previous_h = math.inf if level == 1 else log_snr(grid[0]) - log_snr(level)
  for sigma, sigma_next in zip(grid[:-1], grid[1:]):
    data = x - sigma * naive_velocity(x, sigma)
    if sigma_next == 0:
      return data
    h = math.inf if sigma == 1 else log_snr(sigma_next) - log_snr(sigma)
    guess = data
    if previous is not None and previous_h < math.inf:
      r = previous_h / h
      guess = (1 + 1 / (2 * r)) * data - 1 / (2 * r) * previous
    x = sigma_next / sigma * x - (1 - sigma_next) * (math.exp(-h) - 1) * guess
    previous, previous_h = data, h
  raise ValueError("the grid does not end at 0")


def naive_dpmpp_2m(x, grid, before=None):
  del before  # its first step remembers nothing
  return naive_dpmpp_2m_history(x, grid)


NAIVE = {
  "euler": naive_euler,
  "dpmpp_2m": naive_dpmpp_2m,
  "dpmpp_2m_history": naive_dpmpp_2m_history,
}


def naive_grid(sigmas, first, num):
  """`num` steps (0: all) from sigmas[first] to 0 over points of the grid."""
  last = len(sigmas) - 1
  num = min(num, last - first) if num else last - first
  return [float(sigmas[round(first + i * (last - first) / num)]) for i in range(num + 1)]


def transitions_of(x, velocity, sigma):
  """The Transitions that hold these; other fields are not read."""
  blank = jnp.zeros(0)
  return Transitions(x, blank, velocity, blank, jnp.asarray(sigma, jnp.float32), blank, blank)


def states(sigmas, start, window, seed=0):
  """Float64 states x [W, B, ...] and the Transitions that hold them."""
  x = np.random.default_rng(seed).normal(size=(window, B, *SHAPE))
  v = np.stack([naive_velocity(x[k], sigmas[start + k]) for k in range(window)])
  return x, transitions_of(*float32((x, v)), sigmas[start : start + window])


def naive_completions(x, sigmas, start, grids, solver):
  """Of every state in turn, each on its grid."""
  before = lambda k: (x[k - 1], float(sigmas[start + k - 1])) if k else None
  return np.stack([NAIVE[solver](x[k], grid, before(k)) for k, grid in enumerate(grids)])


def complete(trajectory, plan, **options):
  return completion.complete(
    velocity_fn, float32(PARAMS), trajectory, float32(CONDITION), plan, **options
  )


def assert_packed_equals_naive(num_steps, start, window, num, solver, plan_options=None, **options):
  sigmas = schedule.sd3_sigmas(num_steps)
  x, trajectory = states(sigmas, start, window)
  plan = completion.plan(
    sigmas, start=start, window=window, steps=num, solver=solver, **(plan_options or {})
  )
  packed = complete(trajectory, plan, **options)
  grids = [naive_grid(sigmas, start + k, num) for k in range(window)]
  naive = naive_completions(x, sigmas, start, grids, solver)
  np.testing.assert_allclose(packed, naive, atol=1e-5)


# (T, start, W): the whole grid, odd and even longest lanes, a window in the middle, one that ends with
# the last step, and one whose only completion is the step that the trajectory has made already.
WINDOWS = [(10, 0, 9), (9, 0, 8), (7, 2, 4), (5, 1, 4), (8, 0, 3), (4, 3, 1)]


@pytest.mark.parametrize("solver", completion.SOLVERS)
@pytest.mark.parametrize("num_steps, start, window", WINDOWS)
def test_packed_completions_equal_naive_loop(num_steps, start, window, solver):
  assert_packed_equals_naive(num_steps, start, window, 0, solver)


@pytest.mark.parametrize("solver", completion.SOLVERS)
@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("num_steps, start, window", [(10, 0, 9), (7, 2, 4)])
def test_truncated_packed_completions_equal_naive_loop(num_steps, start, window, num, solver):
  assert_packed_equals_naive(num_steps, start, window, num, solver)


@pytest.mark.parametrize("lanes_per_chunk", [1, 2, 8])
def test_chunked_completions_equal_naive_loop(lanes_per_chunk):
  assert_packed_equals_naive(10, 0, 9, 0, "dpmpp_2m", lanes_per_chunk=lanes_per_chunk)


@pytest.mark.parametrize("at_least", [(12, 0), (14, 6), (2, 2)])
def test_padded_completions_equal_naive_loop(at_least):
  options = {"at_least": at_least}
  assert_packed_equals_naive(7, 2, 4, 0, "dpmpp_2m", options, lanes_per_chunk=2)


def test_one_step_completion_is_the_data_prediction():
  sigmas = schedule.sd3_sigmas(6)
  _, trajectory = states(sigmas, 0, 5)
  done = complete(trajectory, completion.plan(sigmas, start=0, window=5, steps=1))
  levels = jnp.asarray(sigmas[:5], jnp.float32)[:, None, None, None, None]
  np.testing.assert_allclose(done, trajectory.x - levels * trajectory.velocity, atol=1e-6)


def test_drawn_windows_share_one_compilation():
  sigmas = schedule.sd3_sigmas(8)
  plans = [completion.plan(sigmas, start=s, window=3) for s in range(4)]
  at_least = tuple(int(n) for n in np.max([p.load.shape for p in plans], axis=0))
  traces = []

  @jax.jit
  def traced(trajectory, plan):
    traces.append(plan)
    return complete(trajectory, plan)

  for start in range(4):
    x, trajectory = states(sigmas, start, 3, seed=start)
    plan = completion.plan(sigmas, start=start, window=3, at_least=at_least)
    naive = [naive_euler(x[k], naive_grid(sigmas, start + k, 0)) for k in range(3)]
    np.testing.assert_allclose(traced(trajectory, plan), np.stack(naive), atol=1e-5)
  assert len(traces) == 1


@pytest.mark.parametrize("num_steps, start, window", WINDOWS)
@pytest.mark.parametrize("num", [0, 2, 3])
def test_plan_loads_and_stores_every_unfinished_state_once(num_steps, start, window, num):
  plan = completion.plan(schedule.sd3_sigmas(num_steps), start=start, window=window, steps=num)
  unfinished = [
    k for k in range(window) if len(naive_grid(range(num_steps + 1), start + k, num)) > 2
  ]
  assert sorted(plan.load[plan.load >= 0]) == sorted(plan.store[plan.store < window]) == unfinished


@pytest.mark.parametrize("num_steps", range(3, 14))
def test_full_windows_pack_into_the_fewest_lanes(num_steps):
  plan = completion.plan(schedule.linear_sigmas(num_steps), start=0, window=num_steps - 1)
  size, lanes = plan.load.shape
  work = num_steps * (num_steps - 1) // 2
  assert size == num_steps - 1
  assert lanes == math.ceil(work / size)
  # Equal for odd lengths; of an even one the middle segment is left alone in its lane.
  assert size * lanes - work == (0 if size % 2 else size // 2)


@pytest.mark.parametrize(
  "options, expected",
  [
    ({"num_steps": 10, "start": 0, "window": 9}, 55),
    ({"num_steps": 10, "start": 0, "window": 9, "steps": 1}, 10),
    ({"num_steps": 10, "start": 0, "window": 9, "steps": 2}, 19),
    ({"num_steps": 10, "start": 0, "window": 9, "steps": 10}, 55),
    ({"num_steps": 10, "start": 0, "window": 0}, 10),
    ({"num_steps": 6, "start": 0, "window": 5}, 21),
    ({"num_steps": 10, "start": 6, "window": 2}, 10 + 3 + 2),
  ],
)
def test_num_evaluations_has_its_worked_values(options, expected):
  assert completion.num_evaluations(**options) == expected


@pytest.mark.parametrize(
  "num_steps, num", [(6, 0), *(pytest.param(10, n, marks=pytest.mark.slow) for n in (0, 2))]
)
def test_num_evaluations_is_what_the_model_is_asked(num_steps, num):
  rows = []

  def counting(params, x, sigma, condition):
    jax.debug.callback(lambda: rows.append(len(x)))
    return velocity_fn(params, x, sigma, condition)

  sigmas, window = schedule.sd3_sigmas(num_steps), num_steps - 1
  plan = completion.plan(sigmas, start=0, window=window, steps=num)

  @jax.jit
  def rollout(key):
    step = lambda *inputs: steps.cps_step(*inputs, noise_level=0.7)
    x_init = jax.random.normal(key, (B, *SHAPE))
    params, condition = float32((PARAMS, CONDITION))
    trajectory = sampler.sample_trajectory(
        counting, step, steps.cps_log_prob, params, key, x_init, condition,
        sigmas=sigmas, start=0, window=window,
    )  # fmt: skip
    return completion.complete(counting, params, trajectory, condition, plan)

  jax.block_until_ready(rollout(jax.random.key(0)))
  jax.effects_barrier()
  expected = completion.num_evaluations(num_steps=num_steps, start=0, window=window, steps=num)
  assert sum(rows) == B * expected


def assert_equals_diffusers(golden):
  fn = lambda params, x, sigma, condition: golden_velocity(x, sigma[:, None, None, None])
  golden_velocity = lambda x, sigma: jnp.sin(2.0 * x + sigma) + 0.5 * x * sigma
  x = jnp.asarray(golden["x"])
  for name in ("linear", "uneven"):
    sigmas = golden[f"{name}_sigmas"]
    levels = jnp.asarray(sigmas[:-1], jnp.float32).reshape(-1, 1, 1, 1, 1)
    trajectory = transitions_of(x, golden_velocity(x, levels), sigmas[:-1])
    plan = completion.plan(sigmas, start=0, window=len(x), solver="dpmpp_2m")
    done = completion.complete(fn, (), trajectory, jnp.zeros((x.shape[1], 1)), plan)
    # Both in float32, eight steps of a flow that stretches differences a few times.
    np.testing.assert_allclose(done, golden[f"{name}_completed"], atol=2e-5, err_msg=name)


def test_dpmpp_2m_is_that_of_diffusers():
  assert_equals_diffusers(np.load(GOLDEN))


@pytest.mark.parity
def test_dpmpp_2m_is_that_of_the_installed_diffusers():
  pytest.importorskip("diffusers")
  script = {"__name__": "golden"}
  exec(str(np.load(GOLDEN)["script"]), script)
  assert_equals_diffusers(script["make"]())


# Data ~ N(0, S^2): the flow stretches x by sqrt(variance(sigma_next) / variance(sigma)).
S = 1.0


def gaussian_flow(params, x, sigma, condition):
  sigma = sigma.reshape(-1, 1, 1, 1)
  return (sigma - (1 - sigma) * S**2) / ((1 - sigma) ** 2 * S**2 + sigma**2) * x


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpmpp_2m", 2)])
def test_solver_has_its_order_on_an_exact_flow(solver, order):
  errors = []
  for num_steps in (64, 128):
    sigmas = np.linspace(0.9, 0.0, num_steps + 1)
    x = jnp.ones((1, 1, 1, 1, 1))
    v = gaussian_flow((), x[0], jnp.float32([0.9]), None)[None]
    trajectory = transitions_of(x, v, sigmas[:1])
    plan = completion.plan(sigmas, start=0, window=1, solver=solver)
    done = completion.complete(gaussian_flow, (), trajectory, jnp.zeros((1, 1)), plan)
    exact = S / math.sqrt((0.1 * S) ** 2 + 0.9**2)
    errors.append(abs(float(done.squeeze()) - exact))
  # The last steps of an even grid are not small in log-SNR: T^-2 comes with a logarithm of T.
  np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.3)


def test_unknown_solver_is_refused():
  with pytest.raises(ValueError, match="completion.solver='heun'.*euler, dpmpp_2m"):
    completion.plan(schedule.linear_sigmas(4), start=0, window=2, solver="heun")


# T = 16. The state that follows step k of G2RPO's anchor is number k + 1; these are the levels at which its
# public code evaluates the model, enumerated by hand; the image is x - sigma v at the last of them.
@pytest.mark.parametrize(
  "k, stride, evaluated",
  [
    (0, 1, range(1, 16)),
    (7, 1, range(8, 16)),
    (0, 2, [1, 2, 4, 6, 8, 10, 12, 14]),
    (1, 2, [2, 3, 5, 7, 9, 11, 13]),
    (6, 2, [7, 8, 10, 12, 14]),
    (7, 2, [8, 9, 11, 13]),
    (0, 3, [1, 2, 5, 8, 11]),
  ],
)
def test_strided_grid_is_that_of_g2rpo(k, stride, evaluated):
  sigmas = schedule.shift_sigmas(schedule.linear_sigmas(16), 3.0)
  grid = completion.stride_grid(sigmas, start=k + 1, stride=stride)
  np.testing.assert_array_equal(grid, [*sigmas[list(evaluated)], 0.0])


def test_strided_completions_take_as_many_evaluations_as_g2rpos():
  counts = [
    [len(completion.stride_grid(np.arange(17.0), start=k + 1, stride=g)) - 1 for k in range(8)]
    for g in (1, 2, 3)
  ]
  assert counts == [
    [15, 14, 13, 12, 11, 10, 9, 8],
    [8, 7, 7, 6, 6, 5, 5, 4],
    [5, 5, 5, 4, 4, 4, 3, 3],
  ]


@pytest.mark.parametrize("start", range(8))
def test_stride_of_one_is_the_whole_rest_of_the_grid(start):
  sigmas = schedule.sd3_sigmas(8)
  grid = completion.stride_grid(sigmas, start=start, stride=1)
  np.testing.assert_array_equal(grid, sigmas[start:])


@pytest.mark.parametrize("solver", completion.SOLVERS)
@pytest.mark.parametrize("strides", [(1, 2), (3, 1, 2)])
def test_strided_packed_completions_equal_naive_loop(strides, solver):
  """Those of each stride follow those of the one before."""
  num_steps, start, window = 9, 1, 5
  sigmas = schedule.sd3_sigmas(num_steps)
  x, trajectory = states(sigmas, start, window)
  plan = completion.plan(sigmas, start=start, window=window, strides=strides, solver=solver)
  packed = complete(trajectory, plan).reshape(len(strides), window, B, *SHAPE)
  for stride, found in zip(strides, packed, strict=True):
    # Points of the grid by number: the state's own, the next, and every so many-th, without the last.
    rest = [list(range(start + k + 1, num_steps + 1, stride))[:-1] for k in range(window)]
    grids = [[*sigmas[[start + k, *rest[k]]], 0.0] for k in range(window)]
    naive = naive_completions(x, sigmas, start, grids, solver)
    np.testing.assert_allclose(found, naive, atol=1e-5)  # as above


def test_a_remembered_evaluation_changes_the_completions_that_have_one():
  sigmas = schedule.sd3_sigmas(8)
  _, trajectory = states(sigmas, 2, 4)
  plans = [completion.plan(sigmas, start=2, window=4, solver=s) for s in completion.SOLVERS[1:]]
  forgetful, remembering = (complete(trajectory, plan) for plan in plans)
  changed = np.abs(forgetful - remembering).reshape(4, -1).max(1)
  assert (changed > 1e-3).tolist() == [False, True, True, True]
