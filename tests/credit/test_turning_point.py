"""Turning points, their balancing, and the rewards that they are given."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.credit import stepwise, turning_point

W, B = 5, 4


def sixteenths(shape):
  """Rewards with many ties, whose float32 differences are exact."""
  return hnp.arrays(np.int32, shape, elements=st.integers(-24, 24)).map(
    lambda a: jnp.asarray(a / 16, jnp.float32)
  )


REWARDS = sixteenths((W + 1, B))
VALUES = sixteenths((W, B))
MASKS = hnp.arrays(bool, (W, B)).map(jnp.asarray)
RULES = {
  "turning_points": jax.jit(turning_point.turning_points),
  "consistent_turning_points": jax.jit(turning_point.consistent_turning_points),
}
aggregated = jax.jit(turning_point.aggregated)
step_reward = jax.jit(turning_point.step_reward)
balance = jax.jit(turning_point.balance)
KEYS = st.integers(0, 99).map(jax.random.key)
properties = settings(max_examples=25, deadline=None)
both_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def column(*reward):
  return jnp.array(reward, jnp.float32)[:, None]


def steps_of(is_turning_point):
  return np.flatnonzero(is_turning_point[:, 0]).tolist()


# The two examples worked in docs/methods: (rewards, Def. 4.1's steps, rewards), Def. 5.1's likewise.
FIRST = column(0, 1, 0.5, 0.2, 0.8, 1.5)
SECOND = column(0, 0.5, -0.2, 0.3, 0.1)


@pytest.mark.parametrize(
  "rule, reward, turns, paid",
  [
    ("turning_points", FIRST, [0, 3], [1.5, -0.5, -0.3, 1.3, 0.7]),
    ("turning_points", SECOND, [0, 2], [0.1, -0.7, 0.3, -0.2]),
    ("consistent_turning_points", FIRST, [0, 3], [1.5, -0.5, -0.3, 1.3, 0.7]),
    ("consistent_turning_points", SECOND, [], [0.5, -0.7, 0.5, -0.2]),
  ],
)
def test_worked_examples(rule, reward, turns, paid):
  found = RULES[rule](reward)
  assert steps_of(found) == turns
  np.testing.assert_allclose(step_reward(reward, found)[:, 0], paid, atol=1e-6)


def test_first_step_turns_when_it_goes_with_the_outcome():
  assert steps_of(turning_point.turning_points(column(1, 0.5, 0))) == [0]
  assert steps_of(turning_point.turning_points(column(0, -1, 1))) == [1]


def test_a_flat_step_is_neither_with_nor_against_the_outcome():
  assert steps_of(turning_point.turning_points(column(0, 0, 1))) == []
  assert steps_of(turning_point.turning_points(column(0, -1, -1, 1))) == []


def test_a_trajectory_that_changes_nothing_has_no_turning_points():
  assert steps_of(turning_point.turning_points(column(0, -1, 1, 0))) == []


@both_rules
@properties
@given(reward=REWARDS, exponent=st.integers(-3, 3), shift=st.integers(-8, 8))
def test_turning_points_ignore_shift_and_positive_scale(rule, reward, exponent, shift):
  np.testing.assert_array_equal(rule(reward * 2.0**exponent + shift), rule(reward))


@both_rules
@properties
@given(reward=REWARDS)
def test_turning_points_of_a_cost_are_those_of_the_reward(rule, reward):
  np.testing.assert_array_equal(rule(-reward), rule(reward))


@both_rules
@properties
@given(reward=REWARDS)
def test_a_sample_turns_independently_of_its_group(rule, reward):
  alone = [RULES_OF_ONE[rule](reward[:, b : b + 1]) for b in range(B)]
  np.testing.assert_array_equal(rule(reward), np.concatenate(alone, axis=1))


RULES_OF_ONE = {rule: jax.jit(lambda r, rule=rule: rule(r)) for rule in RULES.values()}


@properties
@given(REWARDS)
def test_consistent_turning_points_are_turning_points(reward):
  first, consistent = (rule(reward) for rule in RULES.values())
  assert not np.any(consistent & ~first)


@properties
@given(REWARDS)
def test_two_neighbouring_steps_after_the_first_never_both_turn(reward):
  turns = np.asarray(RULES["turning_points"](reward))
  assert not np.any(turns[1:] & turns[:-1])


@both_rules
@properties
@given(
  jumps=hnp.arrays(np.int32, (W, B), elements=st.integers(1, 9)), sign=st.sampled_from([1, -1])
)
def test_a_monotone_trajectory_turns_at_the_first_step_alone(rule, jumps, sign):
  start = np.zeros((1, B), np.int32)
  reward = jnp.asarray(sign * np.concatenate([start, jumps]).cumsum(0), jnp.float32)
  np.testing.assert_array_equal(rule(reward), np.arange(W)[:, None] == np.zeros(B))


@properties
@given(REWARDS)
def test_aggregated_reward_is_the_sum_of_the_increments_to_come(reward):
  to_come = np.cumsum(stepwise.increments(reward)[::-1], axis=0)[::-1]
  np.testing.assert_array_equal(aggregated(reward), to_come)


@properties
@given(REWARDS, MASKS)
def test_step_reward_without_turning_points_is_the_increment(reward, mask):
  paid = step_reward(reward, mask)
  increments = stepwise.increments(reward)
  np.testing.assert_array_equal(step_reward(reward, jnp.zeros_like(mask)), increments)
  np.testing.assert_array_equal(np.where(mask, 0, paid), np.where(mask, 0, increments))


@both_rules
@pytest.mark.parametrize("window", range(1, 9))
def test_with_a_reward_of_0_and_1_turning_points_are_paid_their_increments(rule, window):
  """All trajectories: such a reward cannot go further the way that a step went."""
  reward = jnp.asarray([*itertools.product([0.0, 1.0], repeat=window + 1)]).T
  turns = rule(reward)
  np.testing.assert_array_equal(step_reward(reward, turns), stepwise.increments(reward))
  assert turns.any() == (rule is RULES["turning_points"])  # by Def. 5.1 there are none


def test_an_aggregated_reward_of_zero_leaves_the_increment():
  reward = column(1, 2, 1)
  np.testing.assert_array_equal(step_reward(reward, jnp.array([[True], [True]])), column(1, -1))


@properties
@given(REWARDS, MASKS, st.integers(-8, 8), st.sampled_from([-4.0, -1.0, 0.25, 2.0]))
def test_step_reward_ignores_a_shift_and_scales(reward, mask, shift, factor):
  np.testing.assert_array_equal(
    step_reward(reward * factor + shift, mask), step_reward(reward, mask) * factor
  )


@properties
@given(REWARDS, MASKS)
def test_aggregated_or_terminal_pays_the_outcome_elsewhere(reward, mask):
  paid = turning_point.aggregated_or_terminal(reward, mask)
  terminal = np.broadcast_to(reward[-1], paid.shape)
  np.testing.assert_array_equal(np.asarray(paid)[~mask], terminal[~mask])
  np.testing.assert_array_equal(np.asarray(paid)[mask], np.asarray(aggregated(reward))[mask])


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_keeps_a_subset(mask, value, key):
  assert not np.any(balance(mask, value, key) & ~mask)


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_equalises_the_signs_when_both_occur(mask, value, key):
  count = lambda marked: (int((marked & (value > 0)).sum()), int((marked & (value < 0)).sum()))
  before, after = count(mask), count(balance(mask, value, key))
  assert after == ((min(before),) * 2 if min(before) else before)


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_drops_only_magnitudes_below_those_it_keeps(mask, value, key):
  kept = balance(mask, value, key)
  for sign in (1, -1):
    of_sign = np.sign(value) == sign
    stay, drop = (np.abs(value[m & of_sign]) for m in (kept, mask & ~kept))
    assert not len(drop) or drop.max() <= stay.min()


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_leaves_zeros_and_unmarked_steps_alone(mask, value, key):
  kept = balance(mask, value, key)
  np.testing.assert_array_equal(kept[value == 0], mask[value == 0])
  moved = jnp.where(mask, value, 100.0)  # what is not marked has no say
  np.testing.assert_array_equal(balance(mask, moved, key), kept)


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_drops_nothing_of_a_single_sign(mask, value, key):
  for one_sign in (np.abs(value), -np.abs(value)):
    np.testing.assert_array_equal(balance(mask, jnp.asarray(one_sign), key), mask)


@properties
@given(MASKS, st.permutations(range(1, W * B + 1)), hnp.arrays(bool, (W, B)), KEYS, KEYS)
def test_the_key_has_no_say_where_all_magnitudes_differ(mask, magnitude, negative, key, other):
  value = jnp.where(negative, -1.0, 1.0) * jnp.array(magnitude, jnp.float32).reshape(W, B)
  np.testing.assert_array_equal(balance(mask, value, key), balance(mask, value, other))


@properties
@given(MASKS, VALUES, KEYS)
def test_balance_of_one_key_is_one_choice(mask, value, key):
  np.testing.assert_array_equal(balance(mask, value, key), turning_point.balance(mask, value, key))


def test_balance_counts_over_the_whole_batch():
  value = jnp.array([[1.0, 3.0, -9.0], [2.0, 1.0, 5.0]])
  kept = balance(jnp.ones((2, 3), bool), value, jax.random.key(0))
  np.testing.assert_array_equal(kept, [[False, False, True], [False, False, True]])


def test_balance_may_keep_any_of_the_equal_magnitudes():
  # One of the three 2s goes with the -1; the 1 is smaller and never stays.
  value = jnp.array([[-1.0, 2.0, 1.0], [2.0, 2.0, 0.0]])
  keys = jax.random.split(jax.random.key(0), 40)
  kept = jax.vmap(lambda key: turning_point.balance(jnp.ones((2, 3), bool), value, key))(keys)
  np.testing.assert_array_equal(kept.any(0), [[1, 1, 0], [1, 1, 1]])
  np.testing.assert_array_equal(kept.sum((1, 2)), 3)


@pytest.mark.parametrize("negatives", [0.2, 0.8])
def test_binary_rewards_keep_the_same_share_at_all_steps_and_samples(negatives):
  draws, steps, samples = 400, 9, 24
  where, sign, chance = jax.random.split(jax.random.key(0), 3)
  mask = jax.random.bernoulli(where, 0.5, (draws, steps, samples))
  negative = jax.random.bernoulli(sign, negatives, mask.shape)
  value = jnp.where(negative, -1.0, 1.0)
  kept = jax.vmap(turning_point.balance)(mask, value, jax.random.split(chance, draws))
  # Of the commoner sign a quarter stays. A step counts about 3,800 of it (standard error .007), a sample
  # 1,400 (.012); five errors are allowed. A fixed order keeps all at one end and none at the other.
  common = mask & (negative == (negatives > 0.5))
  share = lambda axes: np.sum(kept & common, axes) / np.sum(common, axes)
  np.testing.assert_allclose(share((0, 2)), 0.25, atol=0.035)
  np.testing.assert_allclose(share((0, 1)), 0.25, atol=0.06)
