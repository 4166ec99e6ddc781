"""Who gets the credit: completion rewards [W+1, B] -> a reward for every step [W, B].

CREDIT is the table of methods; BALANCED holds the same with the replacements of turning points
balanced (App. D of arXiv 2602.06422), for which they need a key. Options of a method ("vgpo": gamma,
"coca": eps) are keywords with defaults, to be bound with functools.partial. Add your own function of
the same form to use it by name.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from tpgrpo_jax.credit import alignment, branch, outcome, stepwise, turning_point, value
from tpgrpo_jax.types import CreditFn, CreditMethod, StepCredit


def without_turning_points(
  completion_reward: jax.Array, *, pay: Callable[[jax.Array], jax.Array]
) -> StepCredit:
  """Pays every step by one rule.

  Args:
    completion_reward: [W+1, B].
    pay: rewards -> [W, B].
  """
  reward = pay(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool))


def from_turning_points(
  completion_reward: jax.Array,
  *,
  find: Callable[[jax.Array], jax.Array],
  keep: Callable[..., jax.Array],
  pay: Callable[[jax.Array, jax.Array], jax.Array],
  **extras: jax.Array,
) -> StepCredit:
  """Finds turning points, keeps some of them, and pays the steps accordingly.

  Args:
    completion_reward: [W+1, B].
    find: rewards -> [W, B] bool.
    keep: (turning points, aggregated rewards, **extras) -> [W, B] bool.
    pay: (rewards, kept turning points) -> [W, B].
    **extras: what `keep` needs besides.
  """
  kept = keep(find(completion_reward), turning_point.aggregated(completion_reward), **extras)
  return StepCredit(pay(completion_reward, kept), kept)


def keep_all(is_turning_point: jax.Array, aggregated: jax.Array) -> jax.Array:
  """No balancing."""
  del aggregated
  return is_turning_point


def _turning(keep) -> dict[str, CreditFn]:
  bind = functools.partial(functools.partial, from_turning_points, keep=keep)
  first, consistent = turning_point.turning_points, turning_point.consistent_turning_points
  return {
    "aggregation": bind(find=first, pay=turning_point.aggregated_or_terminal),
    "tp_grpo": bind(find=first, pay=turning_point.step_reward),
    "tp_grpo_consistent": bind(find=consistent, pay=turning_point.step_reward),
  }


def _table(keep, extras: tuple[str, ...]) -> dict[str, CreditMethod]:
  by = lambda pay: functools.partial(without_turning_points, pay=pay)
  return {
    "flow_grpo": CreditMethod(by(outcome.terminal), completions="none"),
    "increments": CreditMethod(by(stepwise.increments), completions="all"),
    "latent_increments": CreditMethod(by(stepwise.increments), completions="states"),
    **{
      name: CreditMethod(f, completions="all", extras=extras) for name, f in _turning(keep).items()
    },
    "vgpo": CreditMethod(value.vgpo, completions="all"),
    "coca": CreditMethod(alignment.coca, completions="none", extras=("alignment",)),
    "branch": CreditMethod(by(branch.member), completions="all"),
    "branch_gain": CreditMethod(by(branch.gain), completions="all"),
  }


def find_turning_points(name: str, completion_reward: jax.Array) -> jax.Array | None:
  """All turning points that a method of CREDIT finds, before any balancing; [W+1, B] -> [W, B] bool.

  Args:
    name: of a method; None is returned for one that looks for none, and for a user's own.
    completion_reward: [W+1, B].
  """
  rule = CREDIT.get(name)
  find = rule and getattr(rule.function, "keywords", {}).get("find")
  return find(completion_reward) if find else None


CREDIT = _table(keep_all, extras=())
BALANCED = _table(turning_point.balance, extras=("key",))
