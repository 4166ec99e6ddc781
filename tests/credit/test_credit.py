"""The table of credit methods against the paper's rules in plain Python, one trajectory at a time."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import credit
from tpgrpo_jax.config import names

W, B = 5, 6
REWARDS = hnp.arrays(np.int32, (W + 1, B), elements=st.integers(-12, 12)).map(
  lambda a: jnp.asarray(a / 8, jnp.float32)  # differences are exact, ties are common
)
properties = settings(max_examples=25, deadline=None)


def against_or_with(change, whole):
  """-1, 0, 1: a change against the whole trajectory's, flat, with it."""
  if change == 0 or whole == 0:
    return 0
  return 1 if (change > 0) == (whole > 0) else -1


def reference_turns(r, consistent):
  """Definitions 4.1 and 5.1, step by step."""
  last, turns = len(r) - 1, []
  for k in range(last):
    now = against_or_with(r[k + 1] - r[k], r[last] - r[0])
    if k == 0:
      turned = now == 1
    else:
      turned = now == 1 and against_or_with(r[k] - r[k - 1], r[last] - r[0]) == -1
    rest = r[last] - r[k + 1]
    if consistent and (k == 0 or turned):
      turned = against_or_with(r[k + 1] - r[k], rest) == 1
    turns.append(turned)
  return turns


def balanced_values(turns, aggregated):
  """Appendix D: of the commoner sign, only as many as there are of the other, the largest; sorted."""
  value = sorted((aggregated[k][b] for k in range(W) for b in range(B) if turns[k][b]), key=abs)
  signs = {s: [v for v in value if s * v > 0] for s in (1, -1)}
  fewer = min(len(signs[1]), len(signs[-1]))
  kept = [v for group in signs.values() for v in (group[-fewer:] if fewer else group)]
  return sorted(kept + [v for v in value if v == 0])


def reference(method, reward):
  """(aggregated rewards, turning points) [W][B] of nested lists [W + 1][B]."""
  aggregated = [[reward[W][b] - reward[k][b] for b in range(B)] for k in range(W)]
  columns = [
    reference_turns([row[b] for row in reward], method == "tp_grpo_consistent") for b in range(B)
  ]
  return aggregated, [[columns[b][k] for b in range(B)] for k in range(W)]


def reference_pay(method, reward, aggregated, turns):
  """Step rewards [W][B] of the turning points that were kept."""
  increments = [[reward[k + 1][b] - reward[k][b] for b in range(B)] for k in range(W)]
  elsewhere = [reward[W]] * W if method == "aggregation" else increments
  return [
    [
      # A sum of 0 replaces no increment; where the alternative is the outcome, it does.
      aggregated[k][b]
      if turns[k][b] and (aggregated[k][b] != 0 or method == "aggregation")
      else elsewhere[k][b]
      for b in range(B)
    ]
    for k in range(W)
  ]


TURNING = ("aggregation", "tp_grpo", "tp_grpo_consistent")
WITHOUT = {  # step k's reward, of one trajectory
  "flow_grpo": lambda r, k: r[W],
  "increments": lambda r, k: r[k + 1] - r[k],
  "coca": lambda r, k: r[W],
  "branch": lambda r, k: r[k + 1],
  "branch_gain": lambda r, k: r[k + 1] - r[0],
}
EXTRAS = {
  "key": jax.random.key(3),
  "alignment": jnp.linspace(-0.5, 1, W + 1)[:, None] ** 2 * jnp.ones(B),
}
FUNCTIONS = {
  (name, table is credit.BALANCED): jax.jit(
    functools.partial(method.function, **{extra: EXTRAS[extra] for extra in method.extras})
  )
  for table in (credit.CREDIT, credit.BALANCED)
  for name, method in table.items()
}
every_method = pytest.mark.parametrize("method, balanced", FUNCTIONS)
in_both_tables = pytest.mark.parametrize("balanced", [False, True])


@pytest.mark.parametrize("method", TURNING)
@properties
@given(reward=REWARDS)
def test_credit_is_the_papers_rule_one_trajectory_at_a_time(method, reward):
  aggregated, turns = reference(method, reward.tolist())
  result = FUNCTIONS[method, False](reward)
  np.testing.assert_array_equal(result.is_turning_point, turns)
  paid = reference_pay(method, reward.tolist(), aggregated, turns)
  np.testing.assert_array_equal(result.reward, np.float32(paid))


@pytest.mark.parametrize("method", TURNING)
@properties
@given(reward=REWARDS)
def test_balanced_credit_keeps_the_papers_replacements_up_to_ties(method, reward):
  aggregated, turns = reference(method, reward.tolist())
  kept = np.asarray(FUNCTIONS[method, True](reward).is_turning_point)
  assert not np.any(kept & ~np.array(turns))
  assert sorted(np.array(aggregated)[kept]) == balanced_values(turns, aggregated)


@pytest.mark.parametrize("method", TURNING)
@properties
@given(reward=REWARDS)
def test_balanced_credit_pays_by_the_turning_points_that_it_kept(method, reward):
  result = FUNCTIONS[method, True](reward)
  aggregated, _ = reference(method, reward.tolist())
  paid = reference_pay(method, reward.tolist(), aggregated, result.is_turning_point.tolist())
  np.testing.assert_array_equal(result.reward, np.float32(paid))


@in_both_tables
@pytest.mark.parametrize("method", WITHOUT)
@properties
@given(reward=REWARDS)
def test_credit_without_turning_points_is_its_rule_step_by_step(method, balanced, reward):
  columns = np.asarray(reward).T.tolist()
  paid = [[WITHOUT[method](column, k) for column in columns] for k in range(W)]
  result = FUNCTIONS[method, balanced](reward)
  np.testing.assert_array_equal(result.reward, np.float32(paid))
  assert not np.any(result.is_turning_point)


@every_method
def test_credit_has_one_reward_and_one_mark_for_every_step(method, balanced):
  result = FUNCTIONS[method, balanced](jnp.zeros((W + 1, B)))
  assert result.reward.shape == result.is_turning_point.shape == (W, B)
  assert (result.reward.dtype, result.is_turning_point.dtype) == (jnp.float32, bool)


@every_method
def test_shares_are_one_for_every_step_or_none(method, balanced):
  share = FUNCTIONS[method, balanced](jnp.ones((W + 1, B))).share
  if share is not None:
    assert (share.shape, share.dtype) == ((W, B), jnp.float32)
  assert (share is not None) == (method in ("vgpo", "coca"))


@pytest.mark.parametrize("table", [credit.CREDIT, credit.BALANCED])
def test_the_config_names_every_method(table):
  assert set(table) == set(names.CREDIT_METHODS)


@in_both_tables
def test_methods_without_completions_read_the_terminal_reward_alone(balanced):
  table = credit.BALANCED if balanced else credit.CREDIT
  without = [name for name, method in table.items() if method.completions == "none"]
  assert without == ["flow_grpo", "coca"]
  reward = jnp.full((W + 1, B), jnp.nan).at[-1].set(1.0)
  for name in without:
    np.testing.assert_array_equal(FUNCTIONS[name, balanced](reward).reward, 1.0)


def test_only_balancing_needs_a_key():
  needs = lambda table: {name for name, m in table.items() if "key" in m.extras}
  assert needs(credit.CREDIT) == set()
  assert needs(credit.BALANCED) == set(TURNING)


def test_options_can_be_bound_before_the_call():
  reward = jnp.ones((W + 1, B))
  bound = functools.partial(credit.CREDIT["vgpo"].function, gamma=0.0)
  np.testing.assert_array_equal(bound(reward).reward, 1.0)
  bound = functools.partial(credit.CREDIT["coca"].function, eps=0.0)
  alignment = jnp.ones((W + 1, B)).at[0].set(0.0)  # all of it gained by the first step
  np.testing.assert_array_equal(bound(reward, alignment=alignment).share[:, 0], [W, 0, 0, 0, 0])


def test_methods_differ_on_a_trajectory_that_turns():
  # Def. 4.1 turns at 0 and 2, Def. 5.1 nowhere.
  reward = jnp.array([0, 0.5, -0.25, 0.375, 0.125])[:, None]
  names = ("flow_grpo", "increments", *TURNING)
  paid = {name: tuple(np.ravel(FUNCTIONS[name, False](reward).reward)) for name in names}
  assert len(set(paid.values())) == 4
  assert paid["tp_grpo_consistent"] == paid["increments"]
