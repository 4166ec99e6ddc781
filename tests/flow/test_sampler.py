"""The trajectory scan: which steps are noisy, what is kept of them, and how they are scored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import sampler, schedule, steps
from tpgrpo_jax.models import layers

T, W, B, SHAPE = 6, 3, 4, (2, 2, 1)
SIGMAS = schedule.sd3_sigmas(T)
PARAMS = jax.random.normal(jax.random.key(10), (4, 4))
CONDITION = jnp.linspace(-1.0, 1.0, B)
X_INIT = jax.random.normal(jax.random.key(11), (B, *SHAPE))
DYNAMICS = {
  "sde": (functools.partial(steps.sde_step, sigma_max=float(SIGMAS[1])), steps.gaussian_log_prob),
  "cps": (steps.cps_step, steps.cps_log_prob),
  "dance": (steps.dance_step, steps.gaussian_log_prob),
}


def velocity_fn(params, x, sigma, condition):
  """Nonlinear in x and different for every sample."""
  flat = x.reshape(len(x), -1)
  return jnp.tanh(flat @ params + (sigma + condition)[:, None]).reshape(x.shape)


def sample(key, start, *, dynamics="sde", noise_level=0.7):
  # All arrays are arguments, as in training: XLA folds constants with another rounding.
  sigmas = jnp.asarray(SIGMAS, jnp.float32)
  return _sample(key, start, PARAMS, X_INIT, CONDITION, sigmas, dynamics, noise_level)


@functools.partial(jax.jit, static_argnames=("dynamics", "noise_level"))
def _sample(key, start, params, x_init, condition, sigmas, dynamics, noise_level):
  step, log_prob = DYNAMICS[dynamics]
  step = functools.partial(step, noise_level=noise_level)
  return sampler.sample_trajectory(
    velocity_fn,
    step,
    log_prob,
    params,
    key,
    x_init,
    condition,
    sigmas=sigmas,
    start=start,
    window=W,
  )


@functools.partial(jax.jit, static_argnames=("first", "last"))
def ode(x, *, first=0, last=T):
  return sampler.sample_ode(velocity_fn, PARAMS, x, CONDITION, sigmas=SIGMAS[first : last + 1])


KEY = jax.random.key(0)


def test_sampler_traces_once():
  traces = []

  @jax.jit
  def traced(start):
    traces.append(start)
    step = functools.partial(steps.cps_step, noise_level=0.7)
    return sampler.sample_trajectory(
        velocity_fn, step, steps.cps_log_prob, PARAMS, KEY, X_INIT, CONDITION,
        sigmas=SIGMAS, start=start, window=W,
    ).final  # fmt: skip

  finals = [np.asarray(traced(jnp.int32(start))) for start in range(3)]
  assert len(traces) == 1
  assert len({f.tobytes() for f in finals}) == 3


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_zero_noise_trajectory_is_the_ode(dynamics):
  final = sample(KEY, 1, dynamics=dynamics, noise_level=0.0).final
  # Two programs: XLA may contract x + v dt to an FMA in one of them. A few ulps over T steps.
  np.testing.assert_allclose(final, ode(X_INIT), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_steps_before_the_window_are_ode_steps(start):
  before = ode(X_INIT, last=start) if start else X_INIT
  np.testing.assert_allclose(sample(KEY, start).x[0], before, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_steps_after_the_window_are_ode_steps(start):
  trajectory = sample(KEY, start)
  after = ode(trajectory.x_next[-1], first=start + W) if start + W < T else trajectory.x_next[-1]
  np.testing.assert_allclose(trajectory.final, after, rtol=2e-6, atol=1e-6)


def test_every_step_of_the_window_is_noisy():
  trajectory = sample(KEY, 2)
  euler = (
    trajectory.x
    + trajectory.velocity * (trajectory.sigma_next - trajectory.sigma)[:, None, None, None, None]
  )
  assert np.all(np.abs(trajectory.x_next - euler).max((2, 3, 4)) > 1e-3)


def test_states_of_the_window_follow_each_other():
  trajectory = sample(KEY, 2)
  np.testing.assert_array_equal(trajectory.x[1:], trajectory.x_next[:-1])


def test_levels_of_the_window_are_those_of_the_grid():
  trajectory = sample(KEY, 2)
  np.testing.assert_array_equal(trajectory.sigma, SIGMAS[2:5].astype(np.float32))
  np.testing.assert_array_equal(trajectory.sigma_next, SIGMAS[3:6].astype(np.float32))


def test_velocity_is_the_models_output_at_x():
  trajectory = sample(KEY, 2)
  for k in range(W):
    levels = jnp.full(B, trajectory.sigma[k])
    expected = velocity_fn(PARAMS, trajectory.x[k], levels, CONDITION)
    np.testing.assert_allclose(trajectory.velocity[k], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 8, 8, 3), (16, 16, 48, 1), (64, 16, 48, 1)])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_log_ratio_of_an_update_is_exactly_zero_on_policy(dynamics, shape):
  """The update evaluates the model again; the sizes are some at which XLA fused model and score."""
  step, log_prob = DYNAMICS[dynamics]
  step = functools.partial(step, noise_level=0.7)
  x_init, kernel = jax.random.normal(KEY, shape), 0.1 * jax.random.normal(KEY, (shape[2],) * 2)

  def model(params, x, sigma, condition):
    del condition
    columns = layers.linear(x.swapaxes(2, 3), params, jnp.full(x.shape[2], 0.1))
    return columns.swapaxes(2, 3) * sigma[:, None, None, None]

  @jax.jit
  def rollout(params, sigmas):
    return sampler.sample_trajectory(
      model, step, log_prob, params, KEY, x_init, None, sigmas=sigmas, start=1, window=W
    )

  @jax.jit
  def update(params, trajectory):
    def one(_, t):  # a scan over the steps, as the train step has it
      def loss(params):
        velocity = model(params, t.x, jnp.full(t.x.shape[:1], t.sigma), None)
        new = sampler.score(step, log_prob, t.x, t.x_next, velocity, t.sigma, t.sigma_next)
        return jnp.sum(jnp.exp(new - t.log_prob)), new - t.log_prob

      return None, jax.value_and_grad(loss, has_aux=True)(params)

    return jax.lax.scan(one, None, dataclasses.replace(trajectory, final=jnp.zeros(W)))[1]

  trajectory = rollout(kernel, jnp.asarray(SIGMAS, jnp.float32))
  (_, log_ratio), gradient = update(kernel, trajectory)
  np.testing.assert_array_equal(log_ratio, np.zeros((W, shape[0])))
  assert np.all(np.abs(gradient).max((1, 2)) > 0)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_gradient_of_the_score_is_that_of_the_log_prob(dynamics):
  step, log_prob = DYNAMICS[dynamics]
  step = functools.partial(step, noise_level=0.7)
  x, velocity = X_INIT, X_INIT[::-1]
  x_next, sigma, sigma_next = 0.5 * X_INIT, jnp.float32(0.6), jnp.float32(0.4)
  scored = lambda v: sampler.score(step, log_prob, x, x_next, v, sigma, sigma_next).sum()
  direct = lambda v: log_prob(x_next, step(x, v, sigma, sigma_next)).sum()
  gradient = jax.jit(jax.grad(direct))(velocity)
  np.testing.assert_allclose(jax.jit(jax.grad(scored))(velocity), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_log_prob_without_noise_is_nan(dynamics):
  assert np.isnan(sample(KEY, 1, dynamics=dynamics, noise_level=0.0).log_prob).all()


def test_one_key_gives_one_trajectory():
  one, other, third = sample(KEY, 1), sample(KEY, 1), sample(jax.random.key(1), 1)
  np.testing.assert_array_equal(one.final, other.final)
  assert np.abs(one.final - third.final).min() > 0


GROUPS = jnp.array([[p, k] for p in range(3) for k in range(4)])


@functools.partial(jax.jit, static_argnames="same_latent")
def draw_noise(group, same_latent):
  return sampler.initial_noise(KEY, (8, 8, 3), group, same_latent=same_latent)


def noise(group, *, same_latent=False):
  return np.asarray(draw_noise(group, same_latent))


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("same_latent", [False, True])
def test_initial_noise_does_not_depend_on_how_the_epoch_is_cut(cut, same_latent):
  whole = noise(GROUPS, same_latent=same_latent)
  parts = [noise(group, same_latent=same_latent) for group in (GROUPS[:cut], GROUPS[cut:])]
  np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_same_latent_gives_a_group_one_noise():
  x = noise(GROUPS, same_latent=True).reshape(3, 4, -1)
  np.testing.assert_array_equal(x, np.broadcast_to(x[:, :1], x.shape))
  assert len(np.unique(x[:, 0, 0])) == 3


def test_initial_noise_differs_between_samples():
  assert len(np.unique(noise(GROUPS)[:, 0, 0, 0])) == len(GROUPS)


def test_initial_noise_is_standard_normal():
  x = noise(GROUPS)
  # 2,304 draws: the mean is known to 1 / 48, the standard deviation to 1 / 68; 4 of those.
  np.testing.assert_allclose((x.mean(), x.std()), (0, 1), atol=4 / 48)
