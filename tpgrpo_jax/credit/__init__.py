"""Who gets the credit: completion rewards [W+1, B] -> a reward for every step [W, B].

CREDIT is the table of methods; BALANCED holds those that mark turning points with the replacements
balanced (App. D of arXiv 2602.06422). Add your own function of the same form to use it by name.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from tpgrpo_jax.credit import outcome, stepwise, turning_point
from tpgrpo_jax.types import CreditFn, CreditMethod, StepCredit


def flow_grpo(completion_reward: jax.Array) -> StepCredit:
  """The terminal reward at every step; [W+1, B] -> [W, B]. Only R[W] is read."""
  reward = outcome.terminal(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool))


def increments(completion_reward: jax.Array) -> StepCredit:
  """The increments alone, without turning points; [W+1, B] -> [W, B]."""
  reward = stepwise.increments(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool))


def from_turning_points(
  completion_reward: jax.Array,
  *,
  find: Callable[[jax.Array], jax.Array],
  keep: Callable[[jax.Array, jax.Array], jax.Array],
  pay: Callable[[jax.Array, jax.Array], jax.Array],
) -> StepCredit:
  """Finds turning points, keeps some of them, and pays the steps accordingly.

  Args:
    completion_reward: [W+1, B].
    find: rewards -> [W, B] bool.
    keep: (turning points, aggregated rewards) -> [W, B] bool.
    pay: (rewards, kept turning points) -> [W, B].
  """
  kept = keep(find(completion_reward), turning_point.aggregated(completion_reward))
  return StepCredit(pay(completion_reward, kept), kept)


def keep_all(is_turning_point: jax.Array, value: jax.Array) -> jax.Array:
  """No balancing."""
  del value
  return is_turning_point


def _methods(keep) -> dict[str, CreditFn]:
  bind = functools.partial(functools.partial, from_turning_points, keep=keep)
  first, consistent = turning_point.turning_points, turning_point.consistent_turning_points
  return {
    "aggregation": bind(find=first, pay=turning_point.aggregated_or_terminal),
    "tp_grpo": bind(find=first, pay=turning_point.step_reward),
    "tp_grpo_consistent": bind(find=consistent, pay=turning_point.step_reward),
  }


def _table(keep) -> dict[str, CreditMethod]:
  return {
    "flow_grpo": CreditMethod(flow_grpo, completions="none"),
    "increments": CreditMethod(increments, completions="all"),
    **{name: CreditMethod(f, completions="all") for name, f in _methods(keep).items()},
  }


CREDIT = _table(keep_all)
BALANCED = _table(turning_point.balance)
