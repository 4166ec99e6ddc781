"""Trust regions against float64 and plain loops, step weights, chunks, and the KL of two Gaussians."""

import functools

from hypothesis import assume, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import schedule, steps
from tpgrpo_jax.objective import ratio, surrogate
from tpgrpo_jax.types import Gaussian

CLIP = 0.2
number = st.floats(-2, 2, width=32)
properties = settings(max_examples=50)


@functools.partial(jax.jit, static_argnames=("name", "limit"))
def _evaluated(name, log_ratio, advantage, divergence, limit):
  region = surrogate.TRUST_REGIONS[name].function
  value, slope = jax.value_and_grad(
    lambda l: region(l, advantage, divergence, limit=limit).loss.sum()
  )(log_ratio)
  return value, slope, region(log_ratio, advantage, divergence, limit=limit).active


def evaluated(name, log_ratio, advantage, divergence=0.0, limit=CLIP):
  """(loss, slope in the log-ratio, active) of one sample."""
  numbers = (jnp.array([a], jnp.float32) for a in (log_ratio, advantage, divergence))
  value, slope, active = _evaluated(name, *numbers, limit)
  return float(value), float(slope[0]), bool(active[0])


def ppo(log_ratio, advantage, limit):
  """The paper's formula, in float64."""
  r = np.exp(np.float64(log_ratio))
  return max(-advantage * r, -advantage * np.clip(r, 1 - limit, 1 + limit))


@properties
@given(st.floats(-1, 1, width=32), number)
def test_clip_is_ppo_in_float64_away_from_ties(log_ratio, advantage):
  assume(min(abs(log_ratio - np.log1p(c)) for c in (CLIP, -CLIP)) > 1e-5)
  value, slope, active = evaluated("clip", log_ratio, advantage)
  np.testing.assert_allclose(value, ppo(log_ratio, advantage, CLIP), rtol=1e-6, atol=1e-37)
  h = 1e-6  # a central difference: error of h^2, and 1e-16 / h
  reference = (ppo(log_ratio + h, advantage, CLIP) - ppo(log_ratio - h, advantage, CLIP)) / (2 * h)
  np.testing.assert_allclose(slope, reference, rtol=1e-6, atol=1e-9)
  assert active == (slope != 0) or abs(advantage) < 1e-30


# Each pair lies on the two sides of log1p(+-c), and closer than float32 can hold ratios apart.
@pytest.mark.parametrize(
  "limit, inside, outside",
  [
    (1.5e-5, 1.4995e-5, 1.5005e-5),
    (1e-5, 0.9998e-5, 1.0002e-5),
    (4e-6, 3.998e-6, 4.01e-6),
    (2e-6, 1.99e-6, 2.01e-6),
    (2e-6, -1.998e-6, -2.01e-6),
    (1e-8, 0.9e-8, 1.1e-8),
  ],
)
def test_clip_tells_apart_what_float32_ratios_cannot(limit, inside, outside):
  first, second = np.exp(np.array([inside, outside])).astype(np.float32)
  assert first == second
  sign = np.sign(inside)
  _, slope, active = evaluated("clip", inside, sign, limit=limit)
  np.testing.assert_allclose(slope, -sign * first, rtol=2e-7)
  assert active
  assert evaluated("clip", outside, sign, limit=limit)[1:] == (0, False)


@pytest.mark.parametrize("limit", [0.2, 1e-4, 1e-5, 2e-6])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_boundary_itself_has_its_whole_gradient(limit, sign):
  boundary = float(jnp.log1p(sign * limit))
  value, slope, active = evaluated("clip", boundary, sign, limit=limit)
  np.testing.assert_allclose((value, slope), -sign * (1 + sign * limit), rtol=1e-6)
  assert active


@pytest.mark.parametrize("limit", [0.2, 1e-5, 2e-6])
@pytest.mark.parametrize("name", surrogate.TRUST_REGIONS)
@properties
@given(advantage=number)
def test_on_policy_slope_is_minus_the_advantage(name, limit, advantage):
  # XLA flushes subnormal numbers to 0, which is what atol allows for.
  value, slope, active = evaluated(name, 0.0, advantage, limit=limit)
  np.testing.assert_allclose((value, slope), -advantage, rtol=1e-6, atol=1e-37)
  assert active


@pytest.mark.parametrize("name", surrogate.TRUST_REGIONS)
@properties
@given(log_ratio=st.floats(-2, 2, width=32))
def test_a_sample_without_advantage_has_neither_loss_nor_slope(name, log_ratio):
  assert evaluated(name, log_ratio, 0.0, divergence=1.0) == (0, 0, True)


@pytest.mark.parametrize("name", surrogate.TRUST_REGIONS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_log_ratio_that_is_not_a_number_shows_in_the_loss(name, advantage):
  assert np.isnan(evaluated(name, np.nan, advantage, divergence=1.0)[0])


@properties
@given(number, number)
def test_clipping_never_makes_the_loss_smaller(log_ratio, advantage):
  plain = -np.float64(advantage) * np.exp(np.float64(log_ratio))
  assert evaluated("clip", log_ratio, advantage)[0] >= plain - 1e-5


@pytest.mark.parametrize("name", surrogate.TRUST_REGIONS)
def test_loss_is_one_number_a_sample(name):
  log_ratio, advantage, divergence = jax.random.normal(jax.random.key(0), (3, 4, 5))
  region = functools.partial(surrogate.TRUST_REGIONS[name].function, limit=CLIP)
  together = region(log_ratio, advantage, divergence)
  alone = jax.vmap(jax.vmap(region))(log_ratio, advantage, divergence)
  np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-6)
  np.testing.assert_array_equal(together.active, alone.active)


LIMIT = 2.0**-16  # a divergence can be exactly this in float32
STATES = [
  (l, a, d)
  for l in (-0.3, -1e-9, 0.0, 1e-9, 0.3)
  for a in (-1.5, -1e-30, 0.0, 1e-30, 1.5)
  for d in (0.0, LIMIT / 2, LIMIT, 2 * LIMIT)
]


def dppo_loop():
  """Loss and active of every state, decided one by one."""
  for log_ratio, advantage, divergence in STATES:
    going_up = log_ratio > 0 and advantage > 0
    going_down = log_ratio < 0 and advantage < 0
    dropped = divergence >= LIMIT and (going_up or going_down)
    yield 0.0 if dropped else -advantage * np.exp(log_ratio), not dropped


def test_dppo_drops_what_a_plain_loop_drops():
  log_ratio, advantage, divergence = jnp.array(STATES, jnp.float32).T
  terms = surrogate.dppo(log_ratio, advantage, divergence, limit=LIMIT)
  loss, active = zip(*dppo_loop())
  np.testing.assert_array_equal(terms.active, active)
  np.testing.assert_allclose(terms.loss, loss, rtol=1e-6)


def test_dppo_keeps_the_whole_slope_or_none():
  log_ratio, advantage, divergence = jnp.array(STATES, jnp.float32).T
  total = lambda l: surrogate.dppo(l, advantage, divergence, limit=LIMIT).loss.sum()
  loss, _ = zip(*dppo_loop())  # d(-A exp l) / dl is the loss itself
  np.testing.assert_allclose(jax.grad(total)(log_ratio), loss, rtol=1e-6)


def test_a_dropped_term_has_no_slope_where_its_ratio_overflows():
  assert evaluated("dppo", 200.0, 1.0, divergence=1.0) == (0, 0, False)


def test_dppo_takes_no_gradient_of_the_divergence():
  one = jnp.ones(1)
  slope = jax.grad(lambda d: surrogate.dppo(0.1 * one, one, d, limit=0.5).loss.sum())(one)
  assert slope == 0


def test_clip_needs_no_divergence():
  assert not surrogate.TRUST_REGIONS["clip"].needs_divergence
  assert surrogate.clip(jnp.zeros(1), jnp.ones(1), None, limit=CLIP).loss == -1
  assert surrogate.TRUST_REGIONS["dppo"].needs_divergence


SD3 = schedule.sd3_sigmas(10)[:10]  # the window (0, 9): W = 9 steps
DT = np.diff(SD3)
WORKED = {
  "sde": functools.partial(steps.sde_step, noise_level=0.7, sigma_max=SD3[1]),
  "cps": functools.partial(steps.cps_step, noise_level=0.7),
  "dance": functools.partial(steps.dance_step, noise_level=0.3),
}


def on_sd3s_grid(name):
  """std [W], and d mean / d velocity [W] by autodiff."""
  sigma, sigma_next = jnp.asarray(SD3[:-1], jnp.float32), jnp.asarray(SD3[1:], jnp.float32)
  of = lambda v: WORKED[name](jnp.ones((9, 1)), v, sigma, sigma_next)
  slope = jax.grad(lambda v: of(v).mean.sum())(jnp.zeros((9, 1)))
  return np.broadcast_to(of(jnp.zeros((9, 1))).std, (9, 1))[:, 0], slope[:, 0]


def test_std_weights_are_tempflows_on_sd3s_grid():
  weights = surrogate.step_weights("std", on_sd3s_grid("sde")[0])
  expected = [1.58, 1.67, 1.21, 1.00, 0.88, 0.79, 0.72, 0.64, 0.51]
  np.testing.assert_allclose(weights, expected, atol=0.005)


def test_std_weights_divide_by_tempflows_constant():
  # 2.25 in the released code for these steps.
  std = on_sd3s_grid("sde")[0]
  np.testing.assert_allclose(surrogate.step_weights("std", std) / std, 2.25, atol=0.005)


def test_std_weights_have_mean_one():
  weights = surrogate.step_weights("std", on_sd3s_grid("cps")[0])
  np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-6)


def test_inverse_dt_weights_span_guards_range_on_sd3s_grid():
  weights = surrogate.step_weights("inverse_dt", np.ones(9), dt=DT)
  np.testing.assert_allclose((weights[0], weights[-1]), (25.1, 3.7), atol=0.05)


@pytest.mark.parametrize("name", WORKED)
def test_inverse_sensitivity_gives_every_step_the_same_gradient_in_the_velocity(name):
  # On policy, RatioNorm's gradient in the velocity is then +-noise / D at every step (here D = 1).
  std, sensitivity = on_sd3s_grid(name)
  weights = surrogate.step_weights("inverse_sensitivity", std, sensitivity=sensitivity)
  sigma, sigma_next = jnp.asarray(SD3[:-1], jnp.float32), jnp.asarray(SD3[1:], jnp.float32)
  step = lambda v: WORKED[name](jnp.ones((9, 1)), v, sigma, sigma_next)
  old = step(jnp.zeros((9, 1)))
  noise = jnp.linspace(0.5, 1.5, 9)[:, None]
  total = lambda v: (weights * ratio.normalized(old.mean + old.std * noise, step(v), old)).sum()
  slope = jax.grad(total)(jnp.zeros((9, 1)))
  np.testing.assert_allclose(np.abs(slope), noise, rtol=1e-4)  # a std of .008 beside means of 1


def test_no_weights_are_ones():
  np.testing.assert_array_equal(surrogate.step_weights("none", DT**2), np.ones(9))


def test_weights_can_be_traced():
  traced = jax.jit(lambda std, dt: surrogate.step_weights("inverse_dt", std, dt=dt))
  np.testing.assert_allclose(traced(jnp.ones(9), jnp.asarray(DT)), 1 / np.abs(DT), rtol=1e-6)


def test_an_unknown_weight_is_named_with_the_nearest():
  with pytest.raises(ValueError, match="step_weight='inverse_td'.*Did you mean 'inverse_dt'"):
    surrogate.step_weights("inverse_td", np.ones(2))


@pytest.mark.parametrize(
  "kind, missing", [("inverse_dt", "dt"), ("inverse_sensitivity", "sensitivity")]
)
def test_a_weight_without_its_argument_says_what_is_missing(kind, missing):
  with pytest.raises(ValueError, match=f"'{kind}': needs {missing} "):
    surrogate.step_weights(kind, np.ones(2))


def test_signed_weight_touches_negative_advantages_alone():
  weights = surrogate.signed_weight(jnp.array([[-2.0, 0.0], [1e-6, -1e-6]]), 0.5)
  np.testing.assert_array_equal(weights, [[0.5, 1.0], [1.0, 0.5]])


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
GCPO = (2, 3, 4, 7)


@settings(max_examples=15)
@given(lengths)
def test_chunks_hold_the_means_of_a_plain_loop(chunks):
  log_ratio = np.random.default_rng(0).normal(size=(sum(chunks), 3)).astype(np.float32)
  expected, start = np.zeros(log_ratio.shape), 0
  for length in chunks:
    for k in range(start, start + length):
      for b in range(3):
        total = sum(float(log_ratio[j, b]) for j in range(start, start + length))
        expected[k, b] = total / length
    start += length
  chunked = surrogate.chunk_log_ratio(jnp.asarray(log_ratio), chunks)
  np.testing.assert_allclose(chunked, expected, rtol=1e-5, atol=1e-6)


def test_chunks_of_one_step_change_nothing():
  log_ratio = jax.random.normal(jax.random.key(0), (4, 3))
  np.testing.assert_array_equal(surrogate.chunk_log_ratio(log_ratio, (1,) * 4), log_ratio)
  np.testing.assert_array_equal(surrogate.chunk_weights((1,) * 4), np.ones(4))


def test_weighted_mean_over_steps_is_the_mean_over_chunks():
  log_ratio = np.random.default_rng(1).normal(size=16)
  chunked = surrogate.chunk_log_ratio(jnp.asarray(log_ratio, jnp.float32), GCPO)
  over_steps = np.mean(surrogate.chunk_weights(GCPO) * np.exp(chunked))
  ends = np.cumsum(GCPO)
  of_chunks = [np.exp(log_ratio[end - n : end].mean()) for n, end in zip(GCPO, ends)]
  np.testing.assert_allclose(over_steps, np.mean(of_chunks), rtol=1e-6)


@settings(max_examples=15)
@given(lengths)
def test_chunk_weights_have_mean_one(chunks):
  np.testing.assert_allclose(surrogate.chunk_weights(chunks).mean(), 1, rtol=1e-12)


@pytest.mark.parametrize("chunks", [(2, 3), (2, 5), (6, 1, -1), (6, 0), ()])
def test_chunks_that_do_not_fit_the_steps_are_refused(chunks):
  with pytest.raises(ValueError, match="chunks="):
    surrogate.chunk_log_ratio(jnp.zeros((6, 2)), chunks)


def gaussians(seed=0):
  mean, reference = jax.random.normal(jax.random.key(seed), (2, 3, 2, 2, 1))
  std = jnp.array([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
  return Gaussian(mean, std), Gaussian(reference, std)


def test_kl_has_its_worked_value():
  # 1 and 0 standard deviations apart in two dims: (1/2 + 0) / 2.
  mean = jnp.array([[[[0.5], [0.0]]]])
  kl = surrogate.gaussian_kl(Gaussian(mean, jnp.float32(0.5)), Gaussian(0 * mean, jnp.float32(0.5)))
  np.testing.assert_allclose(kl, [0.25], rtol=1e-6)


def test_kl_is_the_mean_log_ratio_of_draws():
  one, other = gaussians()
  noise = jax.random.normal(jax.random.key(1), (20000, *one.mean.shape))
  x = one.mean + one.std * noise
  square = lambda g: jnp.square((x - g.mean) / g.std).mean((2, 3, 4))
  log_ratio = 0.5 * (square(other) - square(one))
  error = 5 * log_ratio.std(0) / 20000**0.5
  assert np.all(np.abs(log_ratio.mean(0) - surrogate.gaussian_kl(one, other)) < error)


def test_kl_to_itself_is_zero_and_flat():
  one, _ = gaussians()
  total = lambda mean: surrogate.gaussian_kl(Gaussian(mean, one.std), one).sum()
  value, slope = jax.value_and_grad(total)(one.mean)
  assert value == 0 and not np.any(slope)


def test_kl_is_symmetric_and_positive():
  one, other = gaussians()
  kl = surrogate.gaussian_kl(one, other)
  np.testing.assert_array_equal(kl, surrogate.gaussian_kl(other, one))
  assert kl.shape == (3,) and np.all(kl > 0)


def test_kl_ignores_a_common_scale():
  one, other = gaussians()
  twice = lambda g: jax.tree.map(lambda a: 2 * a, g)
  np.testing.assert_array_equal(
    surrogate.gaussian_kl(twice(one), twice(other)), surrogate.gaussian_kl(one, other)
  )
