"""ODE completions of every intermediate state, packed into one scan.

The completion of the state after k steps needs T - start - k evaluations, of which the trajectory has
already made the first. What remains has lengths L, L-1, ..., 1 for the states of a window: paired as
L | L-1 + 1 | L-2 + 2 | ... they fill lanes of length L, all of them where L is odd (where it is even,
the last lane is half idle). All completions are then ONE scan of L steps
over a batch of lanes x B, each lane loading its next state when a segment ends. The packing is plain
NumPy data, computed before tracing, so a drawn window does not recompile.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.types import Plan

SOLVERS = ("euler", "dpmpp_2m")


def num_evaluations(*, num_steps: int, start: int, window: int, steps: int = 0) -> int:
  """Model evaluations a sample: its trajectory, and the completions of its `window` states.

  T + sum_k (n_k - 1), n_k = T - start - k, or `steps` if that is less; 55 for T = 10, W = 9.

  Args:
    num_steps: T.
    start: first stochastic step.
    window: W; 0 for no completions.
    steps: of a truncated completion; 0 is exact.
  """
  return num_steps + sum(n - 1 for n in _lengths(num_steps, start, window, steps))


def num_lane_evaluations(plan: Plan, *, lanes_per_chunk: int = 0) -> int:
  """Model evaluations a sample that `complete` makes: all slots of all lanes, idle ones too."""
  length, lanes = plan.load.shape
  size = lanes_per_chunk or max(lanes, 1)
  return length * -(-lanes // size) * size


def plan(
  sigmas: np.ndarray,
  *,
  start: int,
  window: int,
  steps: int = 0,
  solver: str = "euler",
  at_least: tuple[int, int] = (0, 0),
) -> Plan:
  """Packs the completions of states start ... start + window - 1 into lanes.

  A truncated completion of n steps takes n + 1 evenly chosen points of the sampler's own remaining
  grid, so that n = T - start - k is the exact one.

  Args:
    sigmas: [T + 1] the sampler's grid.
    start: first state.
    window: W, how many states.
    steps: of a truncated completion; 0 is exact.
    solver: "euler" or "dpmpp_2m".
    at_least: pads to so many (steps, lanes), so that all plans of a run have one shape.

  Raises:
    ValueError: an unknown solver.
  """
  if solver not in SOLVERS:
    raise ValueError(f"completion.solver={solver!r}: must be one of {', '.join(SOLVERS)}.")
  num_steps = len(sigmas) - 1
  counts = _lengths(num_steps, start, window, steps)
  grids = [
    np.asarray(sigmas)[np.round(np.linspace(start + k, num_steps, n + 1)).astype(int)]
    for k, n in enumerate(counts)
  ]
  size = max([at_least[0]] + [n - 1 for n in counts])
  lanes = _pack([n - 1 for n in counts], size)
  shape = (size, max(at_least[1], len(lanes)))
  load, store = np.full(shape, -1, np.int32), np.full(shape, window, np.int32)
  sigma, sigma_next = np.ones(shape, np.float32), np.ones(shape, np.float32)
  extrapolation = np.zeros(shape, np.float32)
  for lane, states in enumerate(lanes):
    row = 0
    for k in states:
      n = counts[k] - 1
      rows = slice(row, row + n)
      load[row, lane], store[row + n - 1, lane] = k, k
      sigma[rows, lane], sigma_next[rows, lane] = grids[k][1:-1], grids[k][2:]
      if solver == "dpmpp_2m":
        extrapolation[rows, lane] = _multistep(grids[k])
      row += n
  first = np.stack([[g[0] for g in grids], [g[1] for g in grids]]).astype(np.float32)
  return Plan(first, load, store, sigma, sigma_next, extrapolation)


def complete(
  velocity_fn: types.VelocityFn,
  params: types.Params,
  trajectory: types.Trajectory,
  condition,
  plan: Plan,
  *,
  lanes_per_chunk: int = 0,
) -> jax.Array:
  """Completes every state of the trajectory's window with the ODE.

  Args:
    velocity_fn: the model.
    params: of velocity_fn.
    trajectory: its x and velocity are used.
    condition: of velocity_fn, leading axis B (or 1).
    plan: of this trajectory's grid and window.
    lanes_per_chunk: lanes computed at once when memory is short; 0 is all.

  Returns:
    [W, B, h, w, c] the completed latents of x[0] ... x[W-1]. The trajectory's own `final` is the
    completion of its last state.
  """
  sigma, sigma_next = plan.first[:, :, None, None, None, None]
  begun = trajectory.x + trajectory.velocity * (sigma_next - sigma)
  # What a multistep solver remembers of the first step: its data prediction.
  data = trajectory.x - trajectory.velocity * sigma
  tables = (plan.load, plan.store, plan.sigma, plan.sigma_next, plan.extrapolation)
  if not tables[0].size:
    return begun
  lanes = tables[0].shape[1]
  size = lanes_per_chunk or lanes
  idle = -lanes % size
  fills = (-1, begun.shape[0], 1.0, 1.0, 0.0)
  tables = [
    jnp.pad(jnp.asarray(t), ((0, 0), (0, idle)), constant_values=fill)
    .reshape(t.shape[0], -1, size)
    .swapaxes(0, 1)
    for t, fill in zip(tables, fills)
  ]

  def chunk(done, tables):
    return _scan_lanes(velocity_fn, params, condition, begun, data, done, tables), None

  return jax.lax.scan(chunk, begun, tuple(tables))[0]


def _scan_lanes(velocity_fn, params, condition, begun, data, done, tables):
  """Runs one chunk of lanes; `done` [W, B, ...] receives what they complete."""
  size = tables[0].shape[1]
  batch = begun.shape[1]
  # What all samples share (leading axis 1) stays as it is.
  widen = lambda c: jnp.repeat(c, size, axis=0) if len(c) == batch else c
  repeated = jax.tree.map(widen, condition)
  # Lanes lie inside the batch axis ([B, lanes] flattened), so that its layout on a mesh stays.
  per_sample = lambda row: jnp.tile(row, batch)
  wide = lambda row: per_sample(row).reshape(-1, *(1,) * (begun.ndim - 2))

  def step(carry, row):
    x, previous, done = carry
    load, store, sigma, sigma_next, extrapolation = row
    x = _reload(x, begun, load, size)
    previous = _reload(previous, data, load, size)
    velocity = velocity_fn(params, x, per_sample(sigma), repeated)
    dt = wide(sigma_next - sigma)
    prediction = x - wide(sigma) * velocity
    correction = wide(extrapolation / sigma) * (prediction - previous)
    x = x + dt * (velocity - correction)
    ends = x.reshape(batch, size, *x.shape[1:]).swapaxes(0, 1)
    return (x, prediction, done.at[store].set(ends, mode="drop")), None

  blank = jnp.zeros((batch * size, *begun.shape[2:]), begun.dtype)
  return jax.lax.scan(step, (blank, blank, done), tables)[0][2]


def _reload(x, states, load, size):
  """Lanes with load >= 0 take that state; the others keep their own."""
  fresh = states[jnp.maximum(load, 0)].swapaxes(0, 1).reshape(x.shape)
  taken = jnp.tile(load >= 0, states.shape[1]).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(taken, fresh, x)


def _lengths(num_steps, start, window, steps):
  """Solver steps of each state's completion."""
  remaining = [num_steps - start - k for k in range(window)]
  return [min(steps, n) if steps else n for n in remaining]


def _pack(lengths, size):
  """Best-fit decreasing; exact for L, L-1, ..., 1. Returns the states of each lane."""
  lanes: list[list[int]] = []
  room: list[int] = []
  for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
    if not lengths[k]:
      continue  # complete after its first step
    fits = [i for i, r in enumerate(room) if r >= lengths[k]]
    if not fits:
      lanes.append([])
      room.append(size)
      fits = [len(lanes) - 1]
    best = min(fits, key=lambda i: room[i])
    lanes[best].append(k)
    room[best] -= lengths[k]
  return lanes


def _multistep(grid):
  """m = h_i / (2 h_(i-1)) for the steps after the first, lambda = log((1 - sigma) / sigma).

  First order, m = 0, after sigma = 1 (h infinite) and in the step to sigma = 0, as diffusers'
  DPMSolverMultistepScheduler has it (arXiv 2211.01095).
  """
  with np.errstate(divide="ignore"):
    h = np.diff(np.log1p(-grid) - np.log(grid))
  finite = np.isfinite(h[1:]) & np.isfinite(h[:-1])
  return np.where(finite, h[1:] / np.where(finite, 2 * h[:-1], 1.0), 0.0)
