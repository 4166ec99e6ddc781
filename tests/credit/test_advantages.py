"""Group normalisation of step rewards."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.config import names
from tpgrpo_jax.credit import advantages

W, P, K = 3, 2, 4
REWARDS = hnp.arrays(np.int32, (W, P * K), elements=st.integers(-32, 32)).map(
  lambda a: jnp.asarray(a / 16, jnp.float32)
)
NORMALIZE = {
  name: jax.jit(f, static_argnames=("group_size", "eps", "floor"))
  for name, f in advantages.ADVANTAGES.items()
}
SHIFT_FREE = [f for name, f in NORMALIZE.items() if name != "value"]  # a value's own size counts
normalize_value = jax.jit(
  advantages.normalize_value, static_argnames=("group_size", "eps", "floor", "bonus")
)
properties = settings(max_examples=25, deadline=None)
every_kind = pytest.mark.parametrize("normalize", NORMALIZE.values(), ids=NORMALIZE)
every_shift_free_kind = pytest.mark.parametrize(
  "normalize", SHIFT_FREE, ids=[name for name in NORMALIZE if name != "value"]
)


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


@every_shift_free_kind
@properties
@given(reward=REWARDS, shift=st.integers(-8, 8))
def test_group_advantage_ignores_a_shift(normalize, reward, shift):
  # Shifted rewards are exact; only the roundings of the means differ, blown up by 1 / eps at most.
  np.testing.assert_allclose(
    normalize(reward + shift, group_size=K), normalize(reward, group_size=K), rtol=1e-4, atol=1e-4
  )


@every_shift_free_kind
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


@pytest.mark.parametrize("name", ["group", "group_joint", "value"])
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
  assert set(advantages.ADVANTAGES) == set(names.NORMALIZATIONS)


@every_kind
@properties
@given(reward=REWARDS)
def test_no_floor_is_the_default(normalize, reward):
  np.testing.assert_array_equal(
    normalize(reward, group_size=K, floor=0.0), normalize(reward, group_size=K)
  )


@every_kind
@properties
@given(reward=REWARDS)
def test_a_floor_below_every_std_changes_nothing(normalize, reward):
  # Rewards are sixteenths: the least std of a group that has any is sqrt(3) / 64.
  np.testing.assert_array_equal(
    normalize(reward, group_size=K, floor=0.02), normalize(reward, group_size=K)
  )


@every_kind
@properties
@given(reward=REWARDS)
def test_a_floor_above_every_std_divides_all_alike(normalize, reward):
  # Powers of two: dividing by twice as much is exact.
  smaller, larger = (normalize(reward, group_size=K, eps=0.0, floor=floor) for floor in (4.0, 8.0))
  np.testing.assert_array_equal(smaller, larger * 2)


def test_a_floor_keeps_noise_from_unit_variance():
  # A step whose rewards differ by .008, and one where they differ by 1, both as std.
  reward = jnp.array([[1 - 0.008, 1 + 0.008], [0.0, 2.0]])
  spread = advantages.normalize_group(reward, 2, eps=0.0, floor=0.08).std(-1)
  np.testing.assert_allclose(spread, [0.1, 1.0], rtol=1e-4)  # 1 + .008 is rounded to 6e-8


def test_value_advantage_has_its_worked_value():
  # Mean 3, std 1, alpha 1/2: (1.5 * 2 - 3) / 1 and (1.5 * 4 - 3) / 1.
  advantage = advantages.normalize_value(jnp.array([2.0, 4.0]), 2, eps=0.0, bonus=0.5)
  np.testing.assert_allclose(advantage, [0.0, 3.0], atol=1e-6)


@properties
@given(REWARDS, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 0.5]))
def test_value_advantage_is_its_formula_group_by_group(reward, bonus, floor):
  advantage = grouped(normalize_value(reward, group_size=K, floor=floor, bonus=bonus))
  for k in range(W):
    for p in range(P):
      q = grouped(reward)[k, p].astype(float).tolist()
      mean = sum(q) / K
      std = (sum((v - mean) ** 2 for v in q) / K) ** 0.5
      alpha, divisor = bonus * std, max(std, floor) + advantages.EPS
      expected = [((1 + alpha) * v - mean) / divisor for v in q]
      np.testing.assert_allclose(advantage[k, p], expected, rtol=1e-4, atol=1e-5)


@properties
@given(REWARDS)
def test_value_advantage_without_bonus_is_the_groups(reward):
  np.testing.assert_array_equal(
    normalize_value(reward, group_size=K, bonus=0.0), NORMALIZE["group"](reward, group_size=K)
  )


def test_value_advantage_favours_groups_of_larger_values():
  reward = jnp.array([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
  low, high = advantages.normalize_value(reward, 3).reshape(2, 3)
  assert np.all(high > low)


STREAMS = hnp.arrays(np.int32, (3, W, 4), elements=st.integers(-64, 64)).map(
  lambda a: jnp.asarray(a / 16, jnp.float32)
)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=3, max_size=3)


@properties
@given(STREAMS, WEIGHTS)
def test_combined_streams_are_the_weighted_sum_entry_by_entry(streams, weights):
  combined = advantages.combine_streams(streams, weights)
  for k in range(W):
    for b in range(4):
      assert float(combined[k, b]) == sum(w * float(s[k, b]) for w, s in zip(weights, streams))


@properties
@given(STREAMS)
def test_one_stream_of_weight_one_is_itself(streams):
  np.testing.assert_array_equal(advantages.combine_streams(streams[:1], [1.0]), streams[0])


@properties
@given(STREAMS, WEIGHTS)
def test_streams_combine_alike_with_weights_of_either_kind(streams, weights):
  np.testing.assert_array_equal(
    advantages.combine_streams(streams, jnp.array(weights)),
    advantages.combine_streams(streams, weights),
  )


def test_the_spread_of_no_reward_drowns_anothers():
  small, large = jnp.array([0.0, 0.1, 0.0, 0.1]), jnp.array([0.0, 0.0, 100.0, 100.0])
  each = jnp.stack([advantages.normalize_group(r, 4, eps=0.0) for r in (small, large)])
  np.testing.assert_allclose(advantages.combine_streams(each, [1.0, 1.0]), [-2, 0, 0, 2], atol=1e-6)


def test_every_stream_needs_its_weight():
  with pytest.raises(ValueError):
    advantages.combine_streams(jnp.zeros((3, W, 4)), [1.0, 1.0])
