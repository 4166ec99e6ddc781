"""DiffusionNFT and AWM against NumPy in float64, and on a policy whose best parameter is known."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.objective import forward_process

SHAPE = (4, 3, 2, 2)
SIGMA = np.array([1.0, 0.7, 0.3, 0.05])
ADVANTAGE = np.array([1.5, -0.7, 8.0, -9.0])  # the last two lie past the limit of 5


def inputs(seed=0):
  """velocity, old velocity, data and noise, float64."""
  rng = np.random.default_rng(seed)
  velocity, moved, data, noise = rng.normal(size=(4, *SHAPE))
  return velocity, velocity + 0.3 * moved, data, noise


def single(*arrays):
  return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def noised_in_numpy(data, noise):
  return np.stack([(1 - s) * d + s * e for s, d, e in zip(SIGMA, data, noise)])


def nft_in_numpy(velocity, old, x, data, beta, limit=5.0):
  """One sample after the other, as the released code has it."""
  losses = []
  for b, (advantage, sigma) in enumerate(zip(ADVANTAGE, SIGMA)):
    r = min(max(advantage / limit / 2 + 0.5, 0), 1)
    parts = {}
    for side in (1, -1):
      mixed = old[b] + side * beta * (velocity[b] - old[b])
      off = x[b] - sigma * mixed - data[b]
      parts[side] = np.mean(off**2) / max(np.mean(np.abs(off)), 1e-5)
    losses.append(limit * (r * parts[1] / beta + (1 - r) * parts[-1] / beta))
  return np.array(losses)


def log_prob_in_numpy(velocity, data, noise):
  values = []
  for v, d, e, sigma in zip(velocity, data, noise, SIGMA):
    mismatch = np.mean((v - (e - d)) ** 2)
    values.append(-sigma * ((mismatch + 1e-10) ** 0.25 - (1e-10) ** 0.25) / 0.25)
  return np.array(values)


def test_noised_has_its_worked_values():
  data, noise = jnp.full((2, 3), 2.0), jnp.full((2, 3), -1.0)
  x = forward_process.noised(data, noise, jnp.array([0.0, 0.25]))
  np.testing.assert_allclose(x[:, 0], [2.0, 1.25])
  np.testing.assert_allclose(forward_process.noised(data, noise, jnp.float32(1.0)), noise)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("limit", [5.0, 2.0])
def test_nft_is_its_formula_in_float64(beta, limit):
  velocity, old, data, noise = inputs()
  x = noised_in_numpy(data, noise)
  loss = forward_process.nft(
    *single(velocity, old, x, data, SIGMA, ADVANTAGE), beta=beta, advantage_limit=limit
  )
  expected = nft_in_numpy(velocity, old, x, data, beta, limit)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_nfts_on_policy_gradient_is_the_clipped_advantage_times_that_of_the_error(beta):
  # A grad mean (x0 - data)^2 / w, in closed form: 2 (x0 - data) (-sigma) / D / mean |x0 - data|.
  velocity, _, data, noise = inputs()
  x = noised_in_numpy(data, noise)
  new, fixed, *rest = single(velocity, velocity, x, data, SIGMA, ADVANTAGE)
  slope = jax.grad(lambda v: forward_process.nft(v, fixed, *rest, beta=beta).sum())(new)
  for b in range(len(SIGMA)):
    off = x[b] - SIGMA[b] * velocity[b] - data[b]
    clipped = np.clip(ADVANTAGE[b], -5, 5)
    expected = -clipped * 2 * off * SIGMA[b] / off.size / np.mean(np.abs(off))
    # A difference of two halves of size A_max, each rounded to 1e-7 of itself.
    np.testing.assert_allclose(slope[b], expected, rtol=1e-4, atol=1e-6)


def test_nfts_weights_take_no_gradient():
  # With weights of the point itself, the loss is quadratic in v: a central difference is exact.
  velocity, old, data, noise = inputs()
  x, beta = noised_in_numpy(data, noise), 0.5
  step = 0.5 * np.random.default_rng(5).normal(size=SHAPE)
  arrays = single(old, x, data, SIGMA, ADVANTAGE)
  slope = jax.grad(lambda v: forward_process.nft(v, *arrays, beta=beta).sum())(*single(velocity))
  levels = SIGMA.reshape(-1, 1, 1, 1)

  def error(side, v):
    return x - levels * (old + side * beta * (v - old)) - data

  good = np.clip(ADVANTAGE / 10 + 0.5, 0, 1)
  expected = 0.0
  for side, share in ((1, good), (-1, 1 - good)):
    weight = np.abs(error(side, velocity)).mean((1, 2, 3))
    up, down = (np.square(error(side, velocity + h)).mean((1, 2, 3)) for h in (step, -step))
    expected += np.sum(share * 5 / beta * (up - down) / 2 / weight)
  np.testing.assert_allclose(np.sum(slope * step), expected, rtol=1e-4)


def test_nft_takes_no_gradient_of_the_old_velocity():
  velocity, old, data, noise = inputs()
  new, fixed, *rest = single(velocity, old, noised_in_numpy(data, noise), data, SIGMA, ADVANTAGE)
  slope = jax.grad(lambda o: forward_process.nft(new, o, *rest, beta=0.5).sum())(fixed)
  assert not np.any(slope)


def test_nft_is_finite_where_the_data_are_met_exactly():
  data = jnp.ones(SHAPE)
  still = jnp.zeros(SHAPE)
  loss = lambda v: forward_process.nft(
    v, still, data, data, jnp.float32(0.5), jnp.ones(4), beta=1.0
  ).sum()
  value, slope = jax.value_and_grad(loss)(still)
  assert value == 0 and not np.any(slope)


def test_matching_log_prob_is_its_formula_in_float64():
  velocity, _, data, noise = inputs()
  values = forward_process.matching_log_prob(*single(velocity, data, noise, SIGMA))
  np.testing.assert_allclose(values, log_prob_in_numpy(velocity, data, noise), rtol=1e-5)


@settings(max_examples=15)
@given(st.floats(-4, 1))
def test_matching_log_prob_is_right_from_tiny_to_large_mismatches(exponent):
  velocity = np.full(SHAPE, 10.0**exponent)
  values = forward_process.matching_log_prob(*single(velocity, 0 * velocity, 0 * velocity, SIGMA))
  expected = log_prob_in_numpy(velocity, 0 * velocity, 0 * velocity)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_matching_log_prob_is_zero_and_flat_at_a_perfect_match():
  _, _, data, noise = single(*inputs())
  total = lambda v: forward_process.matching_log_prob(v, data, noise, jnp.float32(0.5)).sum()
  value, slope = jax.value_and_grad(total)(noise - data)
  assert value == 0 and not np.any(slope)


def test_awm_is_minus_the_scaled_advantage_in_value():
  velocity, _, data, noise = inputs()
  loss = forward_process.awm(*single(velocity, data, noise, SIGMA, ADVANTAGE))
  np.testing.assert_allclose(loss, [-0.3, 0.14, -1.0, 1.0], rtol=1e-6)


def test_awms_gradient_is_minus_the_scaled_advantage_times_that_of_the_log_prob():
  velocity, _, data, noise = inputs()
  new, *rest = single(velocity, data, noise, SIGMA, ADVANTAGE)
  slope = jax.grad(lambda v: forward_process.awm(v, *rest).sum())(new)
  direction, h = np.random.default_rng(5).normal(size=SHAPE), 1e-5
  up, down = (log_prob_in_numpy(velocity + s * h * direction, data, noise) for s in (1, -1))
  expected = -np.clip(ADVANTAGE / 5, -1, 1) * (up - down) / (2 * h)
  np.testing.assert_allclose(np.sum(slope * direction, axis=(1, 2, 3)), expected, rtol=1e-4)


def test_velocity_penalty_is_the_mean_square_and_pulls_the_first_alone():
  velocity, other = single(*inputs()[:2])
  expected = np.mean((np.float64(velocity) - np.float64(other)) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(forward_process.velocity_penalty(velocity, other), expected, rtol=1e-5)
  total = lambda v, o: forward_process.velocity_penalty(v, o).sum()
  pull, none = jax.grad(total, argnums=(0, 1))(velocity, other)
  np.testing.assert_allclose(pull, 2 * (velocity - other) / 12, rtol=1e-5, atol=1e-7)
  assert not np.any(none)


# A policy N(m, S^2 I) whose velocity is known in closed form and affine in its one parameter m. It
# stands for a model that can move its samples but not change their spread; what is tested is that
# the losses tilt such a family to the reward, and stop where they should. At m = target, reward and
# weights are even in x0 - target (and the noise), the gradient is odd: its mean is exactly 0.
S, D, K = 0.5, 4, 64
TARGET = jnp.array([1.0, -0.5, 0.0, 0.3])


def policy_velocity(m, x, sigma):
  """E[noise - data | x] for data ~ N(m, S^2 I), by Gaussian conditioning."""
  sigma = sigma[:, None]
  variance = ((1 - sigma) * S) ** 2 + sigma**2
  return -m + (sigma - (1 - sigma) * S**2) / variance * (x - (1 - sigma) * m)


def nft_loss(m, old, x, data, noise, sigma, advantage):
  del noise
  velocity, old_velocity = policy_velocity(m, x, sigma), policy_velocity(old, x, sigma)
  return forward_process.nft(velocity, old_velocity, x, data, sigma, advantage, beta=0.5)


def awm_loss(m, old, x, data, noise, sigma, advantage):
  del old
  return forward_process.awm(policy_velocity(m, x, sigma), data, noise, sigma, advantage)


# loss, updates on one rollout, step size
LOSSES = {"nft": (nft_loss, 2, 0.15), "awm": (awm_loss, 1, 0.5)}


@functools.partial(jax.jit, static_argnums=(1, 2))
def trained(keys, name, reward):
  """Means after every epoch of every run, [runs, epochs, D]; each starts at 0."""
  loss, updates, rate = LOSSES[name]

  def update(m, key, old, data, advantage):
    noise_key, level_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (K, D))
    sigma = jax.random.uniform(level_key, (K,), minval=0.1, maxval=1.0)
    x = forward_process.noised(data, noise, sigma)
    mean = lambda m: loss(m, old, x, data, noise, sigma, advantage).mean()
    return m - rate * jax.grad(mean)(m)

  def epoch(old, key):
    data_key, *update_keys = jax.random.split(key, 1 + updates)
    data = old + S * jax.random.normal(data_key, (K, D))  # the policy, sampled exactly
    rewards = reward(data)
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    m = old
    for update_key in update_keys:
      m = update(m, update_key, old, data, advantage)
    return m, m

  run = lambda key: jax.lax.scan(epoch, jnp.zeros(D), jax.random.split(key, 400))[1]
  return jax.vmap(run)(keys)


def near_target(data):
  return -jnp.sum(jnp.square(data - TARGET), axis=-1)


def along_target(data):
  return data @ TARGET


RUNS = 32


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_settles_where_a_quadratic_reward_is_best(name):
  path = np.asarray(trained(jax.random.split(jax.random.key(0), RUNS), name, near_target))
  settled = path[:, 200:].mean(1)
  # Unbiased, by symmetry: 32 runs agree with the target to 5 standard errors of their mean ...
  error = settled.std(0, ddof=1) / RUNS**0.5
  assert np.all(np.abs(settled.mean(0) - TARGET) < 5 * error)
  # ... which are small against the way of 1 from the start and the policy's own spread of .5.
  assert np.all(error < 0.005)


@pytest.mark.parametrize("name", LOSSES)
def test_the_policy_moves_straight_along_a_linear_reward(name):
  path = np.asarray(trained(jax.random.split(jax.random.key(1), RUNS), name, along_target))
  moved = path[:, -1].mean(0)
  direction = np.asarray(TARGET / jnp.linalg.norm(TARGET))
  assert moved @ direction > 2  # it does not stop: there is no best
  assert moved @ direction / np.linalg.norm(moved) > 0.99


@pytest.mark.parametrize("name", LOSSES)
def test_a_reward_that_is_the_same_for_all_moves_nothing(name):
  path = trained(jax.random.split(jax.random.key(2), 2), name, lambda data: jnp.ones(K))
  np.testing.assert_allclose(path, 0, atol=1e-4)  # roundings of 400 epochs
