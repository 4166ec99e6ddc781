"""How the losses and metrics of pairs become those of an update, and those of updates an epoch's."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.models import in_turn
from tpgrpo_jax.training import mesh as mesh_lib


class Extreme(NamedTuple):
  """How a metric that is no mean is taken.

  Attributes:
    within: a pair's values -> one.
    of_two: of two pairs.
    of_parts: of the parts of `mesh.by_data`.
    start: of none.
    of_updates: on the host.
  """

  within: Callable[..., Any]
  of_two: Callable[..., Any]
  of_parts: Callable[..., Any]
  start: float
  of_updates: Callable[..., Any]


_LARGEST = Extreme(jnp.max, jnp.maximum, jax.lax.pmax, 0.0, max)
_EXTREMES = {
  "ratio/min": Extreme(jnp.min, jnp.minimum, jax.lax.pmin, jnp.inf, min),
  "ratio/max": _LARGEST._replace(start=-jnp.inf),
  "ratio/max_abs_log": _LARGEST,
  "ratio/rollout_max_abs_log": _LARGEST,
}


def of_pair(weight, loss, metrics, weight_sum):
  """A pair's part of the mean loss, and of the metrics: extremes, else weighted means."""
  mean = lambda values: jnp.sum(weight * values) / jnp.maximum(weight_sum, 1.0)
  reduce = lambda name: _EXTREMES[name].within if name in _EXTREMES else mean
  found = mean(loss)
  return found, {"loss": found} | {name: reduce(name)(v) for name, v in metrics.items()}


def none(metrics_of: Callable[..., Any], pairs: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What the metrics of a scan over pairs start from; `metrics_of` is of one pair."""
  first = {name: jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for name, a in pairs.items()}
  start = lambda name: _EXTREMES[name].start if name in _EXTREMES else 0.0
  return {n: jnp.asarray(start(n), jnp.float32) for n in jax.eval_shape(metrics_of, first)}


def of_two(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Of pairs that were summed before."""
  add = lambda name: _EXTREMES[name].of_two if name in _EXTREMES else jnp.add
  return {name: add(name)(a[name], b[name]) for name in a}


def side_by_side(config: config_lib.Config, pairs: dict[str, jax.Array], share_of_mean: Callable):
  """(pairs, share) of train.steps_per_call pairs at once.

  Args:
    config: of the run.
    pairs: leading axis C W, which becomes [C W / steps_per_call, steps_per_call].
    share_of_mean: (trainable, pair) -> (its share of the loss, (metrics, scores)).
  """
  count = config.train.steps_per_call
  if count == 1:
    return pairs, share_of_mean

  def share_of_group(trainable, pair):
    each = in_turn.side_by_side(functools.partial(share_of_mean, trainable))
    shares, (metrics, scores) = each(pair)
    add = lambda name: _EXTREMES[name].within if name in _EXTREMES else jnp.sum
    return jnp.sum(shares), ({name: add(name)(a) for name, a in metrics.items()}, scores)

  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), pairs), share_of_group


def one_by_one(config: config_lib.Config, scores: Any) -> Any:
  """What a scan over the pairs of `side_by_side` has stacked, with one leading axis again."""
  if config.train.steps_per_call == 1:
    return scores
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), scores)


def of_parts(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Of the parts of `mesh.by_data`."""
  add = lambda name: _EXTREMES[name].of_parts if name in _EXTREMES else jax.lax.psum
  return {name: mesh_lib.total(value, add(name)) for name, value in metrics.items()}


def of_updates(rows: list[dict[str, jax.Array]]) -> dict[str, float]:
  """One row of an epoch from those of its updates; sums become means, extremes stay extremes."""
  mean = lambda values: sum(values) / len(rows)
  reduce = lambda name: _EXTREMES[name].of_updates if name in _EXTREMES else mean
  merged = {name: float(reduce(name)([float(row[name]) for row in rows])) for name in rows[0]}
  if "ratio/max_abs_log" in merged:
    # The first update is on-policy: anything but 0 here says that rollout and update disagree.
    merged["ratio/first_update_max_abs_log"] = float(rows[0]["ratio/max_abs_log"])
  return merged
