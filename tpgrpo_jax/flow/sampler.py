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
) -> types.Trajectory:
  """Denoises x_init along `sigmas`; the steps start ... start + window - 1 are stochastic.

  Step k uses the key fold_in(key, k). The other steps are Euler ODE steps.

  Args:
    velocity_fn: the model.
    step_fn: the stochastic step, with its noise level bound.
    log_prob_fn: scores a draw of step_fn.
    params: of velocity_fn.
    key: of this batch.
    x_init: [B, h, w, c] noise, at sigmas[0].
    condition: of velocity_fn, leading axis B.
    sigmas: [T + 1], decreasing to 0.
    start: first stochastic step; may be traced, so that a drawn window compiles once.
    window: W, how many; static.

  Returns:
    The Trajectory of the window, and the final latent.
  """
  num_steps = len(sigmas) - 1
  levels = jnp.asarray(sigmas, jnp.float32)
  index = jnp.arange(num_steps)
  is_stochastic = (index >= start) & (index < start + window)
  keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(index)

  def step(x, inputs):
    sigma, sigma_next, stochastic, step_key = inputs
    velocity = velocity_fn(params, x, jnp.full(x.shape[:1], sigma), condition)
    noisy = step_fn(x, velocity, sigma, sigma_next)
    still = steps.ode_step(x, velocity, sigma, sigma_next)
    gaussian = jax.tree.map(lambda a, b: jnp.where(stochastic, a, b), noisy, still)
    x_next = steps.draw(step_key, gaussian)
    return x_next, (x, x_next, velocity)

  inputs = (levels[:-1], levels[1:], is_stochastic, keys)
  final, stacked = jax.lax.scan(step, x_init, inputs)
  in_window = lambda a: jax.lax.dynamic_slice_in_dim(a, start, window)
  x, x_next, velocity = map(in_window, stacked)
  sigma, sigma_next = in_window(levels[:-1]), in_window(levels[1:])
  # Scored apart from the draw, from what is stored: the very computation of the update.
  scored = lambda inputs: score(step_fn, log_prob_fn, *inputs)
  log_prob = jax.lax.map(scored, (x, x_next, velocity, sigma, sigma_next))
  return types.Trajectory(x, x_next, velocity, log_prob, sigma, sigma_next, final)


def score(
  step_fn: types.StepFn,
  log_prob_fn: types.LogProbFn,
  x: jax.Array,
  x_next: jax.Array,
  velocity: jax.Array,
  sigma: jax.Array,
  sigma_next: jax.Array,
) -> jax.Array:
  """The log_prob [B] of x_next under the step from x, for rollout and update alike.

  It is a computation of its own, the branch of a conditional, and its backward pass starts again from
  the inputs: fused with the model before it or shared with the backward pass, XLA would round it
  differently than in the rollout, and the on-policy log-ratio would not be exactly 0.
  (`optimization_barrier` alone is not enough: XLA drops it on CPU before the last fusion.)

  Args:
    step_fn: the stochastic step.
    log_prob_fn: scores a draw of it.
    x: [B, ...].
    x_next: [B, ...].
    velocity: [B, ...] at x.
    sigma: scalar.
    sigma_next: scalar.
  """
  barrier = jax.lax.optimization_barrier

  def scored(x, x_next, velocity, sigma, sigma_next):
    return log_prob_fn(x_next, barrier(step_fn(x, velocity, sigma, sigma_next)))

  def forward(*inputs):
    nan = lambda x, *_: jnp.full(x.shape[:1], jnp.nan)
    sigma, sigma_next = inputs[3:]
    return jax.lax.cond(sigma > sigma_next, scored, nan, *inputs)

  island = jax.custom_vjp(forward)
  island.defvjp(
    lambda *inputs: (island(*inputs), inputs),
    lambda inputs, cotangent: jax.vjp(forward, *barrier(inputs))[1](cotangent),
  )
  return island(x, x_next, velocity, sigma, sigma_next)


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
