"""Group normalisation of step rewards."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.config import fields
from tpgrpo_jax.credit import advantages

W, P, K = 3, 2, 4
REWARDS = hnp.arrays(np.int32, (W, P * K), elements=st.integers(-32, 32)).map(
  lambda a: jnp.asarray(a / 16, jnp.float32)
)
NORMALIZE = {
  name: jax.jit(f, static_argnames=("group_size", "eps"))
  for name, f in advantages.ADVANTAGES.items()
}
properties = settings(max_examples=25, deadline=None)
every_kind = pytest.mark.parametrize("normalize", NORMALIZE.values(), ids=NORMALIZE)


def grouped(a):
  return np.asarray(a).reshape(W, P, K)


def test_group_advantage_has_its_worked_value():
  # Means 1 and 10, population deviations 1 and 3.
  reward = jnp.array([0.0, 2.0, 7.0, 13.0])
  expected = [-0.5, 0.5, -3 / 4, 3 / 4]
  np.testing.assert_allclose(advantages.normalize_group(reward, 2, eps=1.0), expected, rtol=1e-6)


def test_joint_advantage_has_its_worked_value():
  # One prompt, two steps: 0, 2, 4, 6 have mean 3 and variance 5.
  reward = jnp.array([[0.0, 2.0], [4.0, 6.0]])
  expected = np.array([[-3, -1], [1, 3]]) / 5**0.5
  np.testing.assert_allclose(
    advantages.normalize_group_joint(reward, 2, eps=0.0), expected, rtol=1e-6
  )


def test_global_std_advantage_has_its_worked_value():
  # Own means 1 and 5; all four have mean 3 and variance (9 + 1 + 1 + 9) / 4 = 5.
  reward = jnp.array([0.0, 2.0, 4.0, 6.0])
  np.testing.assert_allclose(
    advantages.normalize_global_std(reward, 2, eps=0.0),
    np.array([-1, 1, -1, 1]) / 5**0.5,
    rtol=1e-6,
  )


def test_eps_is_that_of_flow_grpo():
  advantage = advantages.normalize_group(jnp.array([0.0, 2e-4]), 2)
  np.testing.assert_allclose(advantage, [-0.5, 0.5], rtol=1e-5)


@every_kind
@properties
@given(reward=REWARDS, shift=st.integers(-8, 8))
def test_group_advantage_ignores_a_shift(normalize, reward, shift):
  # Shifted rewards are exact; only the roundings of the means differ, blown up by 1 / eps at most.
  np.testing.assert_allclose(
    normalize(reward + shift, group_size=K), normalize(reward, group_size=K), rtol=1e-4, atol=1e-4
  )


@every_kind
@properties
@given(reward=REWARDS, exponent=st.integers(-4, 4))
def test_group_advantage_ignores_a_scale_that_eps_shares(normalize, reward, exponent):
  # Powers of two scale floats exactly, and the eps here stays exact too.
  scale = 2.0**exponent
  np.testing.assert_array_equal(
    normalize(reward * scale, group_size=K, eps=scale / 1024),
    normalize(reward, group_size=K, eps=1 / 1024),
  )


@every_kind
@properties
@given(reward=REWARDS)
def test_group_advantage_turns_with_the_sign_of_the_reward(normalize, reward):
  np.testing.assert_array_equal(normalize(-reward, group_size=K), -normalize(reward, group_size=K))


@pytest.mark.parametrize("name", ["group", "global_std"])
@properties
@given(reward=REWARDS)
def test_advantages_of_a_group_sum_to_zero_at_every_step(name, reward):
  advantage = NORMALIZE[name](reward, group_size=K)
  np.testing.assert_allclose(grouped(advantage).mean(-1), 0, atol=2e-6)


@properties
@given(REWARDS)
def test_joint_advantages_of_a_prompt_sum_to_zero_over_all_its_steps(reward):
  advantage = NORMALIZE["group_joint"](reward, group_size=K)
  np.testing.assert_allclose(grouped(advantage).mean((0, 2)), 0, atol=2e-6)


@properties
@given(REWARDS)
def test_group_advantages_have_unit_spread_where_there_is_any(reward):
  spread = grouped(NORMALIZE["group"](reward, group_size=K)).std(-1)
  flat = np.asarray(advantages.zero_spread(reward, K))
  np.testing.assert_array_equal(spread[flat], 0)
  # Rewards are sixteenths: the least std of a group that has any is sqrt(3) / 64, against eps = 1e-4.
  np.testing.assert_allclose(spread[~flat], 1, atol=0.005)


@pytest.mark.parametrize("name", ["group", "group_joint"])
@properties
@given(reward=REWARDS, other=st.integers(-32, 32))
def test_group_advantage_does_not_look_at_other_prompts(name, reward, other):
  changed = reward.at[:, K:].set(other)
  np.testing.assert_array_equal(
    NORMALIZE[name](reward, group_size=K)[:, :K], NORMALIZE[name](changed, group_size=K)[:, :K]
  )


@properties
@given(REWARDS)
def test_group_advantage_normalises_every_step_on_its_own(reward):
  alone = [advantages.normalize_group(row, K) for row in reward]
  np.testing.assert_allclose(NORMALIZE["group"](reward, group_size=K), alone, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e6 / 7])
@pytest.mark.parametrize("group_size", [3, 24])
def test_group_without_spread_gives_exactly_zero(normalize, value, group_size):
  # The float32 mean of equal numbers can be an ulp off them.
  reward = jnp.full((5, 2 * group_size), value)
  np.testing.assert_array_equal(normalize(reward, group_size=group_size), 0)


@properties
@given(REWARDS)
def test_zero_spread_marks_groups_of_equal_rewards(reward):
  equal = grouped(reward).min(-1) == grouped(reward).max(-1)
  np.testing.assert_array_equal(advantages.zero_spread(reward, K), equal)


@every_kind
@pytest.mark.parametrize("group_size", [-1, 0, 1])
def test_a_group_of_less_than_two_is_refused(normalize, group_size):
  with pytest.raises(ValueError, match=f"group_size={group_size}: must be at least 2"):
    normalize(jnp.zeros((W, 4)), group_size=group_size)


@every_kind
def test_a_group_that_does_not_divide_the_batch_is_refused(normalize):
  with pytest.raises(ValueError, match="group_size=3: must divide the 8 samples"):
    normalize(jnp.zeros((W, 8)), group_size=3)


def test_the_config_names_every_normalization():
  assert tuple(advantages.ADVANTAGES) == fields.NORMALIZATIONS
