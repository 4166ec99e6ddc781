"""Values of states, and the shares that they give the steps."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.credit import value

W, B = 5, 4


def sixteenths(shape, least=-24, most=24):
  return hnp.arrays(np.int32, shape, elements=st.integers(least, most)).map(
    lambda a: jnp.asarray(a / 16, jnp.float32)
  )


REWARDS = sixteenths((W, B))
GAMMAS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # sums of sixteenths by these are exact
values = jax.jit(value.values, static_argnames="gamma")
shares = jax.jit(value.shares)
vgpo = jax.jit(value.vgpo, static_argnames="gamma")
properties = settings(max_examples=25, deadline=None)


@properties
@given(REWARDS, GAMMAS)
def test_value_is_the_discounted_sum_term_by_term(reward, gamma):
  expected = np.zeros((W, B))
  for b in range(B):
    for k in range(W):
      for j in range(k, W):
        expected[k, b] += gamma ** (j - k) * float(reward[j, b])
  np.testing.assert_array_equal(values(reward, gamma=gamma), np.float32(expected))


def test_value_has_its_worked_values():
  reward = jnp.array([1.0, 0.0, 4.0])[:, None]
  np.testing.assert_array_equal(value.values(reward, gamma=0.5)[:, 0], [2.0, 2.0, 4.0])


@properties
@given(REWARDS)
def test_without_a_future_the_value_is_the_reward(reward):
  np.testing.assert_array_equal(values(reward, gamma=0.0), reward)


@properties
@given(sixteenths((W, B), least=1))
def test_shares_of_positive_values_have_mean_one(q):
  np.testing.assert_allclose(shares(q).mean(0), 1, rtol=1e-6)


@properties
@given(sixteenths((W, B), least=1))
def test_shares_are_in_proportion_to_the_values(q):
  np.testing.assert_allclose(shares(q)[1:] * q[:-1], shares(q)[:-1] * q[1:], rtol=1e-5)


@properties
@given(REWARDS, st.sampled_from([-4.0, -0.5, 2.0]))
def test_shares_ignore_scale_and_sign_of_the_reward(q, factor):
  np.testing.assert_array_equal(shares(q * factor), shares(q))


@pytest.mark.parametrize(
  "q",
  [
    pytest.param([0, 0, 0, 0], id="nothing"),
    pytest.param([-1, 1, 2, -2], id="exact"),
    pytest.param([0.1, 0.2, -0.3, 0], id="up-to-rounding"),
  ],
)
def test_shares_are_one_where_the_mean_value_is_zero(q):
  np.testing.assert_array_equal(value.shares(jnp.array(q, jnp.float32)[:, None]), np.ones((4, 1)))


@properties
@given(sixteenths((W + 1, B)), GAMMAS)
def test_vgpo_is_finite_whatever_the_rewards(reward, gamma):
  credit = vgpo(reward, gamma=gamma)
  assert np.isfinite(credit.reward).all() and np.isfinite(credit.share).all()


def test_vgpo_does_not_read_the_first_states_image():
  credit = value.vgpo(jnp.ones((W + 1, B)).at[0].set(jnp.nan))
  assert np.isfinite(credit.reward).all() and np.isfinite(credit.share).all()


@properties
@given(sixteenths((W + 1, B), least=1), GAMMAS)
def test_vgpo_pays_the_value_of_the_image_after_each_step(reward, gamma):
  credit = vgpo(reward, gamma=gamma)
  np.testing.assert_array_equal(credit.reward[-1], reward[W])
  np.testing.assert_array_equal(credit.reward[:-1] - gamma * credit.reward[1:], reward[1:W])


@properties
@given(sixteenths((W + 1, B), least=1), GAMMAS)
def test_vgpo_shares_are_those_of_its_values(reward, gamma):
  q = np.asarray(vgpo(reward, gamma=gamma).reward, np.float64)
  expected = [[q[k, b] / (sum(q[:, b]) / W) for b in range(B)] for k in range(W)]
  np.testing.assert_allclose(vgpo(reward, gamma=gamma).share, expected, rtol=1e-6)


def test_equal_rewards_favour_the_steps_with_more_to_come():
  share = value.vgpo(jnp.ones((W + 1, B)), gamma=1.0).share
  np.testing.assert_allclose(share[:, 0], np.array([5, 4, 3, 2, 1]) / 3, rtol=1e-6)
