"""The table of credit methods against the paper's rules in plain Python, one trajectory at a time."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import credit
from tpgrpo_jax.config import fields

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


def reference_balance(turns, aggregated):
  """Appendix D: of the commoner sign, only as many as there are of the other, the largest."""
  cells = [(k, b) for k in range(W) for b in range(B) if turns[k][b]]
  signs = {s: [c for c in cells if s * aggregated[c[0]][c[1]] > 0] for s in (1, -1)}
  fewer = min(len(signs[1]), len(signs[-1]))
  if fewer:
    for group in signs.values():
      group.sort(key=lambda c: -abs(aggregated[c[0]][c[1]]))  # stable: earlier step, then sample
      for k, b in group[fewer:]:
        turns[k][b] = False
  return turns


def reference(method, balanced, reward):
  """(step reward, turning points) [W][B] of nested lists [W + 1][B]."""
  end = reward[W]
  increments = [[reward[k + 1][b] - reward[k][b] for b in range(B)] for k in range(W)]
  aggregated = [[end[b] - reward[k][b] for b in range(B)] for k in range(W)]
  nothing = [[False] * B for _ in range(W)]
  if method == "flow_grpo":
    return [end] * W, nothing
  if method == "increments":
    return increments, nothing
  columns = [
    reference_turns([row[b] for row in reward], method == "tp_grpo_consistent") for b in range(B)
  ]
  turns = [[columns[b][k] for b in range(B)] for k in range(W)]
  if balanced:
    turns = reference_balance(turns, aggregated)
  elsewhere = [end] * W if method == "aggregation" else increments
  paid = [
    [
      # A sum of 0 replaces no increment; where the alternative is the outcome, it does.
      aggregated[k][b]
      if turns[k][b] and (aggregated[k][b] != 0 or method == "aggregation")
      else elsewhere[k][b]
      for b in range(B)
    ]
    for k in range(W)
  ]
  return paid, turns


FUNCTIONS = {
  (name, table is credit.BALANCED): jax.jit(method.function)
  for table in (credit.CREDIT, credit.BALANCED)
  for name, method in table.items()
}


@pytest.mark.parametrize("method, balanced", FUNCTIONS)
@properties
@given(reward=REWARDS)
def test_credit_is_the_papers_rule_one_trajectory_at_a_time(method, balanced, reward):
  paid, turns = reference(method, balanced, reward.tolist())
  result = FUNCTIONS[method, balanced](reward)
  np.testing.assert_array_equal(result.is_turning_point, turns)
  np.testing.assert_array_equal(result.reward, np.float32(paid))


@pytest.mark.parametrize("method, balanced", FUNCTIONS)
def test_credit_has_one_reward_and_one_mark_for_every_step(method, balanced):
  result = FUNCTIONS[method, balanced](jnp.zeros((W + 1, B)))
  assert result.reward.shape == result.is_turning_point.shape == (W, B)
  assert (result.reward.dtype, result.is_turning_point.dtype) == (jnp.float32, bool)


@pytest.mark.parametrize("table", [credit.CREDIT, credit.BALANCED])
def test_the_config_names_every_method(table):
  assert tuple(table) == fields.CREDIT_METHODS


def test_only_flow_grpo_does_without_completions():
  for table in (credit.CREDIT, credit.BALANCED):
    assert [name for name, m in table.items() if m.completions == "none"] == ["flow_grpo"]


def test_methods_differ_on_a_trajectory_that_turns():
  # Def. 4.1 turns at 0 and 2, Def. 5.1 nowhere.
  reward = jnp.array([0, 0.5, -0.25, 0.375, 0.125])[:, None]
  paid = {
    name: tuple(np.ravel(jax.jit(m.function)(reward).reward)) for name, m in credit.CREDIT.items()
  }
  distinct = set(paid.values())
  assert len(distinct) == 4
  assert paid["tp_grpo_consistent"] == paid["increments"]
