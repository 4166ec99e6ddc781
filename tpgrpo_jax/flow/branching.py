"""Shared-state branching: one ODE anchor, and members that leave its states by one stochastic step each.

One anchor x[0..T] is sampled by the ODE for each (prompt, noise). At a step k, M members each take ONE
stochastic step from the anchor's own x[k] and are completed by the ODE: nothing else tells them apart, so
a member's reward is credit for step k alone (TempFlow-GRPO, arXiv 2508.04324; G2RPO, arXiv 2510.01982).
All members of a state share its velocity, so an update evaluates the model once a state, and not once a
member: 1 / M of a trajectory method's price.

A batch of S anchors with M members is S M samples. Where devices are many and anchors few, an anchor may
stand in the batch several times, with a part of its members each time: the draws belong to the samples,
not to the anchors, so that nothing changes but who computes what.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.flow import completion, sampler, steps


def num_evaluations(
  *, num_steps: int, start: int, window: int, branches: int, steps: int = 0
) -> float:
  """Model evaluations a sample: its share of the anchor, and its completions at the window's steps.

  T / M + sum_k n_k, n_k = T - start - k - 1, or `steps` if that is less: 45 + 10 / 24 for T = 10, W = 9,
  M = 24.

  Args:
    num_steps: T.
    start: first step that is branched.
    window: W, how many.
    branches: M.
    steps: of a truncated completion; 0 is exact.
  """
  remaining = [num_steps - start - k - 1 for k in range(window)]
  return num_steps / branches + sum(min(steps, n) if steps else n for n in remaining)


def plan(
  sigmas: np.ndarray,
  branched: Sequence[int],
  *,
  steps: int = 0,
  strides: Sequence[int] = (),
  solver: str = "euler",
  at_least: tuple[int, int] = (0, 0),
) -> types.Plan:
  """Packs the completions of the members that left the anchor at the steps `branched`.

  Args:
    sigmas: [T + 1] the sampler's grid.
    branched: the steps, ascending.
    steps: of truncated completions, as of `completion.remaining_grids`.
    strides: likewise; the segments of one stride follow those of the one before.
    solver: as of `completion.plan`; the anchor's evaluations are not remembered.
    at_least: likewise.
  """
  options = dict(steps=steps, strides=strides)
  grids = [_grids_after(sigmas, k, **options) for k in branched]
  segments = [
    completion.Segment(state, grid)
    for at_stride in zip(*grids)
    for state, grid in enumerate(at_stride)
  ]
  return completion.pack(segments, solver=solver, at_least=at_least)


def _grids_after(sigmas, k, *, steps, strides):
  """The grids of what follows the step k; after the last step the image is finished."""
  if k + 1 == len(sigmas) - 1:
    return [np.zeros(1)] * max(1, len(strides))
  return completion.remaining_grids(sigmas, k + 1, steps=steps, strides=strides)


def draw_members(
  key: jax.Array, gaussian: types.Gaussian, members: int, *, antithetic: bool
) -> jax.Array:
  """x_next [S, M, ...] = mean + std noise, M members of each state.

  The noise is drawn for the S M samples in their order, so it does not depend on how they are divided into
  states. Antithetic neighbours take noise and its negative: the pair cancels in the group's mean.

  Args:
    key: of this step, used once.
    gaussian: mean [S, ...].
    members: M.
    antithetic: for an even number of samples.
  """
  states, *latent = gaussian.mean.shape
  count = states * members
  if antithetic:
    half = jax.random.normal(key, (count // 2, 1, *latent))
    noise = jnp.concatenate([half, -half], axis=1)
  else:
    noise = jax.random.normal(key, (count, *latent))
  noise = noise.reshape(states, members, *latent)
  # A std for each state has a batch axis, and needs one for the members.
  std = gaussian.std[:, None] if jnp.ndim(gaussian.std) else gaussian.std
  return gaussian.mean[:, None] + std * noise


def sample_branches(
  velocity_fn: types.VelocityFn,
  step_fn: types.StepFn,
  log_prob_fn: types.LogProbFn,
  params: types.Params,
  key: jax.Array,
  x_init: jax.Array,
  condition,
  *,
  sigmas: np.ndarray | jax.Array,
  branched: jax.Array,
  members: int,
  antithetic: bool = False,
  dtype: str = "float32",
) -> types.Transitions:
  """Samples S anchors, and the members that leave them at the steps `branched`.

  Step k draws with the key fold_in(key, k).

  Args:
    velocity_fn: the model.
    step_fn: the stochastic step, with its noise level bound.
    log_prob_fn: scores a draw of step_fn.
    params: of velocity_fn.
    key: of this batch.
    x_init: [S, h, w, c] noise, at sigmas[0].
    condition: of velocity_fn, leading axis S or a divisor of it.
    sigmas: [T + 1], decreasing to 0.
    branched: [W] int, ascending; may be traced, so that drawn steps compile once.
    members: M.
    antithetic: as of `draw_members`.
    dtype: that latents are kept in, as of `sampler.sample_trajectory`.

  Returns:
    The Transitions of the steps; `final` is the anchors' own.
  """
  levels = jnp.asarray(sigmas, jnp.float32)
  kept = lambda x: sampler.rounded(x, dtype)

  def step(x, pair):
    sigma, sigma_next = pair
    velocity = velocity_fn(params, x, jnp.full(x.shape[:1], sigma), condition)
    return kept(steps.ode_step(x, velocity, sigma, sigma_next).mean), (x, velocity)

  final, stacked = jax.lax.scan(step, kept(x_init), (levels[:-1], levels[1:]))
  x, velocity = (a[branched] for a in stacked)
  sigma, sigma_next = levels[branched], levels[branched + 1]
  keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(branched)

  def leave(inputs):
    x, velocity, sigma, sigma_next, step_key = inputs
    gaussian = step_fn(x, velocity, sigma, sigma_next)
    return kept(draw_members(step_key, gaussian, members, antithetic=antithetic))

  x_next = jax.lax.map(leave, (x, velocity, sigma, sigma_next, keys))
  log_prob = sampler.score_all(step_fn, log_prob_fn, x, x_next, velocity, sigma, sigma_next)
  return types.Transitions(x, x_next, velocity, log_prob, sigma, sigma_next, final)


def complete(
  velocity_fn: types.VelocityFn,
  params: types.Params,
  transitions: types.Transitions,
  condition,
  plan: types.Plan,
  *,
  lanes_per_chunk: int = 0,
) -> jax.Array:
  """Completes every member with the ODE.

  Args:
    velocity_fn: the model.
    params: of velocity_fn.
    transitions: of `sample_branches`.
    condition: of velocity_fn, leading axis S or a divisor of it.
    plan: of these steps.
    lanes_per_chunk: as of `completion.complete`.

  Returns:
    [segments, S M, h, w, c].
  """
  _, states, members = transitions.x_next.shape[:3]
  flat = transitions.x_next.reshape(-1, states * members, *transitions.x_next.shape[3:])
  begun = flat[jnp.asarray(plan.state)]
  run = completion.run
  return run(
    velocity_fn,
    params,
    begun,
    jnp.zeros_like(begun),
    condition,
    plan,
    lanes_per_chunk=lanes_per_chunk,
  )
