"""The trajectory scan: which steps are noisy, what is kept of them, and how they are scored."""

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
  last = trajectory.x_next[-1, :, 0]
  after = ode(last, first=start + W) if start + W < T else last
  np.testing.assert_allclose(trajectory.final, after, rtol=2e-6, atol=1e-6)


def test_every_step_of_the_window_is_noisy():
  trajectory = sample(KEY, 2)
  euler = (
    trajectory.x
    + trajectory.velocity * (trajectory.sigma_next - trajectory.sigma)[:, None, None, None, None]
  )
  assert np.all(np.abs(trajectory.x_next[:, :, 0] - euler).max((2, 3, 4)) > 1e-3)


@functools.partial(jax.jit, static_argnames=("dynamics", "noise_level"))
def sample_stochastic(keys, x_init, condition, dynamics, noise_level):
  step_fn = functools.partial(DYNAMICS[dynamics][0], noise_level=noise_level)
  return sampler.sample_stochastic(
    velocity_fn, step_fn, keys, PARAMS, x_init, condition, sigmas=SIGMAS
  )


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_stochastic_sampling_without_noise_is_the_ode(dynamics):
  keys = jax.random.split(jax.random.key(0), B)
  found = sample_stochastic(keys, X_INIT, CONDITION, dynamics, 1e-8)
  np.testing.assert_allclose(found, ode(X_INIT), atol=1e-5)


def test_stochastic_sample_is_a_function_of_its_own_key():
  keys = jax.random.split(jax.random.key(0), B)
  whole = sample_stochastic(keys, X_INIT, CONDITION, "cps", 0.7)
  part = sample_stochastic(keys[1:3], X_INIT[1:3], CONDITION[1:3], "cps", 0.7)
  np.testing.assert_allclose(part, whole[1:3], rtol=1e-5, atol=1e-6)
  again = sample_stochastic(keys.at[1].set(keys[0]), X_INIT, CONDITION, "cps", 0.7)
  np.testing.assert_array_equal(np.delete(again, 1, axis=0), np.delete(whole, 1, axis=0))
  assert (again[1] != whole[1]).any()


def test_stochastic_sampling_ends_in_the_law_of_the_data():
  """Of data ~ N(m, s^2) the flow is known; the sample's mean and spread are the data's."""
  mean, spread, count = 2.0, 0.5, 4000

  def exact(params, x, sigma, condition):
    s = sigma.reshape(-1, 1, 1, 1)
    posterior = mean + (1 - s) * spread**2 * (x - (1 - s) * mean) / (
      (1 - s) ** 2 * spread**2 + s**2
    )
    return (x - posterior) / s

  keys = jax.random.split(jax.random.key(0), count)
  x_init = jax.random.normal(jax.random.key(1), (count, 1, 1, 1))
  step_fn = functools.partial(steps.dance_step, noise_level=0.7)
  sigmas = np.linspace(1, 0, 101)
  found = sampler.sample_stochastic(exact, step_fn, keys, {}, x_init, None, sigmas=sigmas)
  assert float(found.mean()) == pytest.approx(mean, abs=4 * spread / count**0.5)
  assert float(found.std()) == pytest.approx(spread, rel=0.1)


def test_states_of_the_window_follow_each_other():
  trajectory = sample(KEY, 2)
  np.testing.assert_array_equal(trajectory.x[1:], trajectory.x_next[:-1, :, 0])


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
    def one(_, pair):  # a scan over the steps, as the train step has it
      (x, x_next, sigma, sigma_next), old = pair

      def loss(params):
        velocity = model(params, x, jnp.full(x.shape[:1], sigma), None)
        new = sampler.score(step, log_prob, x, x_next, velocity, sigma, sigma_next)
        return jnp.sum(jnp.exp(new - old)), new - old

      return None, jax.value_and_grad(loss, has_aux=True)(params)

    t = trajectory
    return jax.lax.scan(one, None, ((t.x, t.x_next, t.sigma, t.sigma_next), t.log_prob))[1]

  trajectory = rollout(kernel, jnp.asarray(SIGMAS, jnp.float32))
  (_, log_ratio), gradient = update(kernel, trajectory)
  np.testing.assert_array_equal(log_ratio, np.zeros((W, shape[0], 1)))
  assert np.all(np.abs(gradient).max((1, 2)) > 0)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_gradient_of_the_score_is_that_of_the_log_prob(dynamics):
  step, log_prob = DYNAMICS[dynamics]
  step = functools.partial(step, noise_level=0.7)
  x, velocity = X_INIT, X_INIT[::-1]
  x_next, sigma, sigma_next = 0.5 * X_INIT, jnp.float32(0.6), jnp.float32(0.4)
  members = x_next[:, None]
  scored = lambda v: sampler.score(step, log_prob, x, members, v, sigma, sigma_next).sum()
  direct = lambda v: log_prob(x_next, step(x, v, sigma, sigma_next)).sum()
  gradient = jax.jit(jax.grad(direct))(velocity)
  np.testing.assert_allclose(jax.jit(jax.grad(scored))(velocity), gradient, rtol=1e-5, atol=1e-6)


LEVELS = (
  jnp.array([0.9, 0.6, 0.5, 0.3]),
  jnp.array([0.7, 0.4, 0.45, 0.2]),
)  # of each of the B states


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_score_at_a_level_for_each_state_equals_one_state_at_a_time(dynamics):
  step, log_prob = DYNAMICS[dynamics]
  bound = functools.partial(sampler.score, functools.partial(step, noise_level=0.7), log_prob)
  x_next = jax.random.normal(jax.random.key(3), (B, 3, *SHAPE))
  states, pairs = (X_INIT, x_next, X_INIT[::-1]), list(zip(*LEVELS))
  together = bound(*states, *LEVELS)
  alone = [bound(*(a[b : b + 1] for a in states), *pairs[b]) for b in range(B)]
  # Two programs, of log-probs up to about 40: a few ulps.
  np.testing.assert_allclose(together, np.concatenate(alone), rtol=2e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_score_of_members_equals_one_member_at_a_time(dynamics):
  step, log_prob = DYNAMICS[dynamics]
  bound = functools.partial(sampler.score, functools.partial(step, noise_level=0.7), log_prob)
  x_next = jax.random.normal(jax.random.key(3), (B, 5, *SHAPE))
  rest = (X_INIT[::-1], jnp.float32(0.6), jnp.float32(0.4))
  alone = [bound(X_INIT, x_next[:, m : m + 1], *rest) for m in range(5)]
  np.testing.assert_allclose(bound(X_INIT, x_next, *rest), np.concatenate(alone, 1), rtol=2e-6)


def test_score_is_nan_where_a_level_does_not_fall():
  step = functools.partial(steps.sde_step, noise_level=0.7, sigma_max=0.9)
  sigma, sigma_next = LEVELS[0], LEVELS[1].at[2].set(LEVELS[0][2])
  states = (X_INIT, X_INIT[:, None], X_INIT)
  assert np.isnan(sampler.score(step, steps.gaussian_log_prob, *states, sigma, sigma_next)).all()


COPIES = 2
SHARED = jnp.repeat(X_INIT[:2], COPIES, axis=0)
SHARED_CONDITION = jnp.repeat(CONDITION[:2], COPIES)


@functools.partial(jax.jit, static_argnames=("copies", "model", "dtype"))
def sample_shared(start, copies, model=velocity_fn, condition=SHARED_CONDITION, dtype="float32"):
  step = functools.partial(steps.cps_step, noise_level=0.7)
  return sampler.sample_trajectory(
      model, step, steps.cps_log_prob, PARAMS, KEY, SHARED, condition,
      sigmas=SIGMAS, start=start, window=W, copies=copies, dtype=dtype,
  )  # fmt: skip


@pytest.mark.parametrize("start", [0, 2, 3])
@pytest.mark.parametrize("copies", [COPIES, B])
def test_trajectories_do_not_depend_on_what_copies_share(start, copies):
  condition = jnp.repeat(SHARED_CONDITION[:1], B) if copies == B else SHARED_CONDITION
  x = jnp.repeat(SHARED[:1], B, axis=0) if copies == B else SHARED

  @functools.partial(jax.jit, static_argnums=0)
  def run(copies, start):
    step = functools.partial(steps.cps_step, noise_level=0.7)
    return sampler.sample_trajectory(
        velocity_fn, step, steps.cps_log_prob, PARAMS, KEY, x, condition,
        sigmas=SIGMAS, start=start, window=W, copies=copies,
    )  # fmt: skip

  # A matrix product of fewer rows may be summed in another order: a few ulps over T steps.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
  jax.tree.map(close, run(copies, start), run(1, start))


@pytest.mark.parametrize("start", [0, 2, 3])
def test_copies_are_evaluated_once_until_the_window_begins(start):
  rows = []

  def counting(params, x, sigma, condition):
    jax.debug.callback(lambda: rows.append(len(x)))
    return velocity_fn(params, x, sigma, condition)

  jax.block_until_ready(sample_shared(jnp.int32(start), COPIES, counting))
  jax.effects_barrier()
  assert sorted(rows) == sorted([B // COPIES] * start + [B] * (T - start))


def test_what_all_copies_share_of_a_condition_stays_whole():
  one = lambda params, x, sigma, condition: velocity_fn(params, x, sigma, condition[0])
  found = sample_shared(2, COPIES, one, condition=jnp.full((1,), 0.5))
  wanted = sample_shared(2, COPIES, condition=jnp.full(B, 0.5))
  np.testing.assert_allclose(found.final, wanted.final, rtol=1e-5, atol=2e-6)  # as above


@pytest.fixture(scope="module")
def rounded():
  return sample_shared(2, 1, dtype="bfloat16")


def test_rounded_latents_are_those_that_their_dtype_can_hold(rounded):
  for latents in (rounded.x, rounded.x_next, rounded.final):
    assert latents.dtype == jnp.float32
    np.testing.assert_array_equal(latents, latents.astype(jnp.bfloat16).astype(jnp.float32))


def test_rounded_states_follow_each_other(rounded):
  np.testing.assert_array_equal(rounded.x[1:], rounded.x_next[:-1, :, 0])


def test_log_prob_scores_the_rounded_states(rounded):
  step = functools.partial(steps.cps_step, noise_level=0.7)
  for k in range(W):
    gaussian = step(rounded.x[k], rounded.velocity[k], rounded.sigma[k], rounded.sigma_next[k])
    wanted = steps.cps_log_prob(rounded.x_next[k, :, 0], gaussian)
    # Of float32; a state that were not rounded would be off by 4e-3 of its size.
    np.testing.assert_allclose(rounded.log_prob[k, :, 0], wanted, rtol=1e-5)


def test_velocity_of_rounded_states_is_the_models_output_there(rounded):
  for k in range(W):
    levels = jnp.full(B, rounded.sigma[k])
    wanted = velocity_fn(PARAMS, rounded.x[k], levels, SHARED_CONDITION)
    np.testing.assert_allclose(rounded.velocity[k], wanted, atol=1e-6)


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
