"""ODE completions of intermediate states, packed into one scan.

The completion of the state after k steps of a trajectory needs T - start - k evaluations, of which the
trajectory has already made the first. What remains has lengths L, L-1, ..., 1 for the states of a window:
paired as L | L-1 + 1 | L-2 + 2 | ... they fill lanes of length L, all of them where L is odd (where it is
even, the last lane is half idle). All completions are then ONE scan of L steps over a batch of lanes x B,
each lane loading its next state when a segment ends. The packing is plain NumPy data, computed before
tracing, so a drawn window does not recompile. The members of flow.branching go the same way; of their
states no velocity is known.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.types import Plan

SOLVERS = ("euler", "dpmpp_2m", "dpmpp_2m_history")


class Segment(NamedTuple):
  """One completion that is to be packed.

  Attributes:
    state: number of the state that it begins from.
    levels: [n + 1] noise levels from that state's own down to 0.
    before: level of the evaluation before, whose data prediction the solver remembers; 0 for none.
  """

  state: int
  levels: np.ndarray
  before: float = 0.0


def num_evaluations(*, num_steps: int, start: int, window: int, steps: int = 0) -> int:
  """Model evaluations a sample: its trajectory, and the completions of its `window` states.

  T + sum_k (n_k - 1), n_k = T - start - k, or `steps` if that is less; 55 for T = 10, W = 9.

  Args:
    num_steps: T.
    start: first stochastic step.
    window: W; 0 for no completions.
    steps: of a truncated completion; 0 is exact.
  """
  remaining = [num_steps - start - k for k in range(window)]
  return num_steps + sum((min(steps, n) if steps else n) - 1 for n in remaining)


def num_lane_evaluations(plan: Plan, *, lanes_per_chunk: int = 0) -> int:
  """Model evaluations a sample that `run` makes: idle slots too, but for those that a padded plan skips."""
  length, lanes = plan.load.shape
  size = chunk_size(lanes, lanes_per_chunk)
  if not len(plan.busy):
    return length * -(-lanes // size) * size
  busy, firsts = np.asarray(plan.busy), range(0, lanes, size)
  return size * sum(int(busy[:, i : i + size].any(axis=1).sum()) for i in firsts)


def chunk_size(lanes: int, most: int) -> int:
  """Lanes of a chunk, in as few even chunks as hold at most `most` each; 0 is all in one."""
  chunks = -(-lanes // (most or max(lanes, 1)))
  return -(-lanes // chunks) if chunks else 1


def stride_grid(sigmas: np.ndarray, *, start: int, stride: int) -> np.ndarray:
  """The levels of a strided completion of the state at sigmas[start] (G2RPO, arXiv 2510.01982).

  sigmas[start], sigmas[start + 1 :: stride] without its last entry, and 0: the step to start + 1 is always
  taken, and the image is x - sigma v at the last level that is evaluated. Stride 1 is the whole rest.

  Args:
    sigmas: [T + 1] the sampler's grid.
    start: index of the state, below T.
    stride: 1 or more.

  Returns:
    [n + 1], n the evaluations.
  """
  rest = np.asarray(sigmas)[start + 1 :: stride]
  return np.concatenate([sigmas[start : start + 1], rest[:-1], [0.0]])


def remaining_grids(
  sigmas: np.ndarray, start: int, *, steps: int = 0, strides: Sequence[int] = ()
) -> list[np.ndarray]:
  """The grids on which the state at sigmas[start] is completed: one, or one for each stride.

  A truncated completion of n steps takes n + 1 evenly chosen points of the sampler's own remaining grid.

  Args:
    sigmas: [T + 1] the sampler's grid.
    start: index of the state.
    steps: of a truncated completion; 0 is exact.
    strides: of `stride_grid`; () for none.
  """
  if strides:
    return [stride_grid(sigmas, start=start, stride=stride) for stride in strides]
  remaining = len(sigmas) - 1 - start
  count = min(steps, remaining) if steps else remaining
  return [
    np.asarray(sigmas)[np.round(np.linspace(start, start + remaining, count + 1)).astype(int)]
  ]


def plan(
  sigmas: np.ndarray,
  *,
  start: int,
  window: int,
  steps: int = 0,
  strides: Sequence[int] = (),
  solver: str = "euler",
  at_least: tuple[int, int] = (0, 0),
) -> Plan:
  """Packs the completions of a trajectory's states start ... start + window - 1 into lanes.

  Args:
    sigmas: [T + 1] the sampler's grid.
    start: first state.
    window: W, how many states.
    steps: as of `remaining_grids`.
    strides: likewise; the segments of one stride follow those of the one before.
    solver: "euler", "dpmpp_2m" (DPM-Solver++(2M)), or "dpmpp_2m_history", whose first step remembers the
      trajectory's evaluation before.
    at_least: pads to so many (steps, lanes), so that all plans of a run have one shape; steps in which all
      lanes are idle are not evaluated.

  Raises:
    ValueError: an unknown solver.
  """
  _check_solver(solver)
  grids = [remaining_grids(sigmas, start + k, steps=steps, strides=strides) for k in range(window)]
  rows = [(k, grid) for at_stride in zip(*grids) for k, grid in enumerate(at_stride)]
  segments = [Segment(k, grid[1:], grid[0]) for k, grid in rows]
  packed = pack(segments, solver=solver, at_least=at_least)
  first = np.stack([[g[0] for _, g in rows], [g[1] for _, g in rows]]).astype(np.float32)
  extrapolation = np.zeros(len(rows), np.float32)
  if solver == "dpmpp_2m_history":
    levels = [np.concatenate([sigmas[start + k - 1 : start + k], g[:2]]) for k, g in rows]
    extrapolation[:] = [
      _multistep(g)[0] if len(g) == 3 and k else 0.0 for (k, _), g in zip(rows, levels)
    ]
  return packed._replace(first=first, first_extrapolation=extrapolation)


def pack(
  segments: Sequence[Segment], *, solver: str = "euler", at_least: tuple[int, int] = (0, 0)
) -> Plan:
  """Packs segments into lanes; their results come in the segments' order.

  Args:
    segments: what is to be completed.
    solver: as of `plan`.
    at_least: likewise.
  """
  _check_solver(solver)
  lengths = [len(segment.levels) - 1 for segment in segments]
  size = max(lengths)
  lanes = _pack(lengths, size)
  shape = (max(at_least[0], size), max(at_least[1], len(lanes)))
  load, store = np.full(shape, -1, np.int32), np.full(shape, len(segments), np.int32)
  sigma, sigma_next = np.ones(shape, np.float32), np.ones(shape, np.float32)
  extrapolation = np.zeros(shape, np.float32)
  for lane, numbers in enumerate(lanes):
    row = 0
    for i in numbers:
      levels, n = segments[i].levels, lengths[i]
      rows = slice(row, row + n)
      load[row, lane], store[row + n - 1, lane] = i, i
      sigma[rows, lane], sigma_next[rows, lane] = levels[:-1], levels[1:]
      if solver != "euler":
        extrapolation[rows, lane] = _multistep(
          np.concatenate([[segments[i].before or 1.0], levels])
        )
      row += n
  state = np.asarray([segment.state for segment in segments], np.int32)
  busy = sigma != sigma_next if any(at_least) else ()
  return Plan(state, load, store, sigma, sigma_next, extrapolation, busy=busy)


def complete(
  velocity_fn: types.VelocityFn,
  params: types.Params,
  trajectory: types.Transitions,
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
    condition: of velocity_fn, leading axis B or a divisor of it.
    plan: of this trajectory's grid and window.
    lanes_per_chunk: lanes computed at once when memory is short; 0 is all.

  Returns:
    [segments, B, h, w, c] the completed latents of x[0] ... x[W-1], for each stride in turn. The
    trajectory's own `final` is the completion of its last state.
  """
  assert trajectory.velocity is not None
  wide = lambda levels: jnp.asarray(levels)[:, None, None, None, None]
  sigma, sigma_next = map(wide, plan.first)
  # What a multistep solver remembers of a step: its data prediction.
  predictions = trajectory.x - trajectory.velocity * wide(trajectory.sigma)
  before = jnp.concatenate([predictions[:1], predictions[:-1]])
  x, velocity, data = (a[plan.state] for a in (trajectory.x, trajectory.velocity, predictions))
  correction = wide(plan.first_extrapolation) / sigma * (data - before[plan.state])
  begun = x + (velocity - correction) * (sigma_next - sigma)
  return run(velocity_fn, params, begun, data, condition, plan, lanes_per_chunk=lanes_per_chunk)


def run(
  velocity_fn: types.VelocityFn,
  params: types.Params,
  begun: jax.Array,
  data: jax.Array,
  condition,
  plan: Plan,
  *,
  lanes_per_chunk: int = 0,
) -> jax.Array:
  """Takes every segment of the plan to its end.

  Args:
    velocity_fn: the model.
    params: of velocity_fn.
    begun: [segments, B, h, w, c] the latents at the segments' first levels.
    data: [segments, B, h, w, c] the data predictions of the evaluations before, where a solver uses them.
    condition: of velocity_fn, leading axis B or a divisor of it: it serves all lanes of a sample.
    plan: of these segments.
    lanes_per_chunk: at most so many lanes are computed at once when memory is short; 0 is all.

  Returns:
    [segments, B, h, w, c].
  """
  tables = (plan.load, plan.store, plan.sigma, plan.sigma_next, plan.extrapolation)
  if not tables[0].size:
    return begun
  length, lanes = plan.load.shape
  size = chunk_size(lanes, lanes_per_chunk)
  idle = -lanes % size
  fills = (-1, begun.shape[0], 1.0, 1.0, 0.0)
  if len(plan.busy):
    tables, fills = (*tables, plan.busy), (*fills, False)
  tables = [
    jnp.pad(jnp.asarray(t), ((0, 0), (0, idle)), constant_values=fill)
    .reshape(length, -1, size)
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
  # Lanes lie inside the batch axis ([B, lanes] flattened), so that its layout on a mesh stays.
  per_sample = lambda row: jnp.tile(row, batch)
  wide = lambda row: per_sample(row).reshape(-1, *(1,) * (begun.ndim - 2))

  def step(carry, row):
    x, previous, done = carry
    load, store, sigma, sigma_next, extrapolation, *busy = row
    x = _reload(x, begun, load, size)
    previous = _reload(previous, data, load, size)
    at = (params, x, per_sample(sigma), condition)
    if busy:
      still = lambda params, x, sigma, condition: jnp.zeros_like(x)
      velocity = jax.lax.cond(jnp.any(busy[0]), velocity_fn, still, *at)
    else:
      velocity = velocity_fn(*at)
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


def _check_solver(solver):
  if solver not in SOLVERS:
    raise ValueError(f"completion.solver={solver!r}: must be one of {', '.join(SOLVERS)}.")


def _pack(lengths, size):
  """Best-fit decreasing; exact for L, L-1, ..., 1. Returns the segments of each lane."""
  lanes: list[list[int]] = []
  room: list[int] = []
  for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
    if not lengths[k]:
      continue  # complete already
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
