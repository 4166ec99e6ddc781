"""The denoising trajectory: one lax.scan over the steps of the grid."""

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.flow import steps


def sample_trajectory(
  velocity_fn: types.VelocityFn,
  step_fn: types.StepFn,
  log_prob_fn: types.LogProbFn,
  params: types.Params,
  key: jax.Array,
  x_init: jax.Array,
  condition,
  *,
  sigmas: np.ndarray | jax.Array,
  start: jax.Array | int,
  window: int,
  copies: int = 1,
  dtype: str = "float32",
) -> types.Transitions:
  """Denoises x_init along `sigmas`; the steps start ... start + window - 1 are stochastic.

  Step k uses the key fold_in(key, k). The other steps are Euler ODE steps.

  Args:
    velocity_fn: the model.
    step_fn: the stochastic step, with its noise level bound.
    log_prob_fn: scores a draw of step_fn.
    params: of velocity_fn.
    key: of this batch.
    x_init: [B, h, w, c] noise, at sigmas[0].
    condition: of velocity_fn, leading axis B or a divisor of it.
    sigmas: [T + 1], decreasing to 0.
    start: first stochastic step; may be traced, so that a drawn window compiles once.
    window: W, how many; static.
    copies: of neighbours in the batch that begin with one noise and one prompt, so many: until the window
      begins they are evaluated once.
    dtype: that latents are kept in: every state is rounded to it before the next step and before it is
      scored, so that what is stored is what was sampled.

  Returns:
    The Transitions of the window, M = 1, and the final latent.
  """
  num_steps = len(sigmas) - 1
  levels = jnp.asarray(sigmas, jnp.float32)
  index = jnp.arange(num_steps)
  is_stochastic = (index >= start) & (index < start + window)
  keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(index)
  shared_fn = _once_for_copies(velocity_fn, copies)

  def step(carry, inputs):
    x, states, velocities = carry
    k, sigma, sigma_next, stochastic, step_key = inputs
    velocity = shared_fn(k < start, params, x, jnp.full(x.shape[:1], sigma), condition)
    noisy = step_fn(x, velocity, sigma, sigma_next)
    still = steps.ode_step(x, velocity, sigma, sigma_next)
    gaussian = jax.tree.map(lambda a, b: jnp.where(stochastic, a, b), noisy, still)
    x_next = rounded(steps.draw(step_key, gaussian), dtype)
    states = _with_row(states, k + 1 - start, x_next)
    return (x_next, states, _with_row(velocities, k - start, velocity)), None

  # Of all steps the window's are kept. Each row is written; what it is before has the layout of x.
  x = rounded(x_init, dtype)
  rows = lambda count: jnp.broadcast_to(x, (count, *x.shape))
  inputs = (index, levels[:-1], levels[1:], is_stochastic, keys)
  (final, states, velocity), _ = jax.lax.scan(step, (x, rows(window + 1), rows(window)), inputs)
  in_window = lambda a: jax.lax.dynamic_slice_in_dim(a, start, window)
  sigma, sigma_next = in_window(levels[:-1]), in_window(levels[1:])

  def scored(k):
    at = (states[k], states[k + 1][:, None], velocity[k], sigma[k], sigma_next[k])
    return score(step_fn, log_prob_fn, *at)

  log_prob = jax.lax.map(scored, jnp.arange(window))
  return types.Transitions(states, None, velocity, log_prob, sigma, sigma_next, final)


def _with_row(buffer, row, value):
  """The buffer with the value in this row, if it has one of this number."""
  at = jnp.clip(row, 0, len(buffer) - 1)
  kept = jnp.where(row == at, value, buffer[at])
  return jax.lax.dynamic_update_index_in_dim(buffer, kept, at, 0)


def _once_for_copies(velocity_fn, copies):
  """velocity_fn that is told whether neighbours are still copies of each other, `copies` of them."""
  if copies == 1:
    return lambda are_copies, *inputs: velocity_fn(*inputs)

  def shared(params, x, sigma, condition):
    # Of what all copies share already, as many rows as are left of x are enough.
    first = lambda a: a.reshape(-1, max(1, len(a) * copies // len(x)), *a.shape[1:])[:, 0]
    velocity = velocity_fn(params, *jax.tree.map(first, (x, sigma, condition)))
    return jnp.repeat(velocity, copies, axis=0)

  return lambda are_copies, *inputs: jax.lax.cond(are_copies, shared, velocity_fn, *inputs)


def rounded(x: jax.Array, dtype: str) -> jax.Array:
  """x in float32, with the values that `dtype` can hold."""
  # reduce_precision, since XLA may drop a cast there and back.
  info = jnp.finfo(dtype)
  return x if dtype == "float32" else jax.lax.reduce_precision(x, info.nexp, info.nmant)


def score_all(
  step_fn: types.StepFn,
  log_prob_fn: types.LogProbFn,
  x: jax.Array,
  x_next: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
) -> jax.Array:
  """`score` of each of W steps, [W, S, M]: from what is stored and apart from the draw, as in the update."""
  scored = lambda inputs: score(step_fn, log_prob_fn, *inputs)
  return jax.lax.map(scored, (x, x_next, velocity, sigma, sigma_next))


def score(
  step_fn: types.StepFn,
  log_prob_fn: types.LogProbFn,
  x: jax.Array,
  x_next: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
) -> jax.Array:
  """The log_prob [S, M] of x_next under the step from x, for rollout and update alike.

  Args:
    step_fn: the stochastic step.
    log_prob_fn: scores a draw of it.
    x: [S, ...].
    x_next: [S, M, ...] the members that left each state.
    velocity: [S, ...] at x: one evaluation of the model, whatever M is.
    sigma: scalar or [S].
    sigma_next: likewise.
  """

  def scored(x, x_next, velocity, sigma, sigma_next):
    gaussian = jax.lax.optimization_barrier(step_fn(x, velocity, sigma, sigma_next))
    return each_member(log_prob_fn)(x_next, gaussian)

  return isolated(scored)(x, x_next, velocity, sigma, sigma_next)


def each_member(function):
  """(x_next [S, ...], *rest) -> [S] as a function of x_next [S, M, ...] -> [S, M]."""
  return lambda x_next, *rest: jax.vmap(lambda x: function(x, *rest), in_axes=1, out_axes=1)(x_next)


def isolated(function):
  """`function` of (..., sigma, sigma_next) as a computation of its own, NaN where no noise is left.

  It is the branch of a conditional, and its backward pass starts again from the inputs: fused with the
  model before it or shared with the backward pass, XLA would round it differently than in the rollout,
  and the on-policy log-ratio would not be exactly 0. (`optimization_barrier` alone is not enough: XLA
  drops it on CPU before the last fusion.)

  Args:
    function: of arrays, the last two being levels; returns arrays.
  """

  def forward(*inputs):
    shapes = jax.eval_shape(function, *inputs)
    nan = lambda *_: jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
    return jax.lax.cond(jnp.all(inputs[-2] > inputs[-1]), function, nan, *inputs)

  island = jax.custom_vjp(forward)
  island.defvjp(
    lambda *inputs: (island(*inputs), inputs),
    lambda inputs, cotangent: jax.vjp(forward, *jax.lax.optimization_barrier(inputs))[1](cotangent),
  )
  return island


def sample_ode(
  velocity_fn: types.VelocityFn,
  params: types.Params,
  x_init: jax.Array,
  condition,
  *,
  sigmas: np.ndarray | jax.Array,
) -> jax.Array:
  """Denoises x_init [B, h, w, c] with Euler ODE steps along `sigmas` [T + 1]."""

  def step(x, pair):
    sigma, sigma_next = pair
    velocity = velocity_fn(params, x, jnp.full(x.shape[:1], sigma), condition)
    return steps.ode_step(x, velocity, sigma, sigma_next).mean, None

  levels = jnp.asarray(sigmas, jnp.float32)
  return jax.lax.scan(step, x_init, (levels[:-1], levels[1:]))[0]


def sample_stochastic(
  velocity_fn: types.VelocityFn,
  step_fn: types.StepFn,
  keys: jax.Array,
  params: types.Params,
  x_init: jax.Array,
  condition,
  *,
  sigmas: np.ndarray | jax.Array,
) -> jax.Array:
  """Denoises x_init [B, h, w, c] with stochastic steps, and an ODE step at the end, where images are made.

  Args:
    velocity_fn: the model.
    step_fn: the stochastic step, with its noise level bound.
    keys: [B], of each sample; step k uses fold_in(key, k), so that a sample does not depend on its batch.
    params: of velocity_fn.
    x_init: noise, at sigmas[0].
    condition: of velocity_fn, leading axis B.
    sigmas: [T + 1], decreasing to 0.
  """

  def step(x, inputs):
    k, sigma, sigma_next = inputs
    velocity = velocity_fn(params, x, jnp.full(x.shape[:1], sigma), condition)
    gaussian = step_fn(x, velocity, sigma, sigma_next)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, k), x.shape[1:]))(keys)
    return gaussian.mean + gaussian.std * noise, None

  levels = jnp.asarray(sigmas, jnp.float32)
  inputs = (jnp.arange(len(sigmas) - 2), levels[:-2], levels[1:-1])
  x = jax.lax.scan(step, x_init, inputs)[0]
  return sample_ode(velocity_fn, params, x, condition, sigmas=levels[-2:])


def initial_noise(
  key: jax.Array, latent_shape: tuple[int, ...], group: jax.Array, *, same_latent: bool
) -> jax.Array:
  """x at sigma = 1 for the samples of a batch.

  Args:
    key: of the epoch.
    latent_shape: (h, w, c).
    group: [B, 2] int: (prompt number, sample number within the prompt's group) in the epoch; the
      noise is a function of these alone, not of how the epoch is cut into batches.
    same_latent: the samples of one prompt start from the same noise.

  Returns:
    [B, h, w, c] standard normal.
  """

  def one(pair):
    prompt, sample = pair
    sample = jnp.where(same_latent, 0, sample)
    sample_key = jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
    return jax.random.normal(sample_key, latent_shape)

  return jax.vmap(one)(group)
