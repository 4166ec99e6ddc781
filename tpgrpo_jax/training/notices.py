"""What a run knows of itself and says once, in one line each, beside the metrics that show it."""

from collections.abc import Iterable, Iterator, Mapping
import math
from typing import Any

import jax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import progress

DROWNS = 0.95  # share of the advantage's variance
CLIPPED = 0.9  # share of terms without gradient
BELOW = 2.0  # standard errors


class Notices:
  """Says each thing once in a run; of several processes the first one speaks."""

  def __init__(self, config: config_lib.Config):
    self._config, self._said, self._epochs = config, set(), 0

  def epoch(self, row: Mapping[str, Any]) -> None:
    """Says what is new in the metrics of an epoch."""
    self._epochs += 1
    self._say(of_epoch(self._config, row))
    self._say(of_memory(row))
    if self._epochs > 1:  # the first one compiles
      self._say(of_time(row))

  def evaluation(self, row: Mapping[str, Any]) -> None:
    """Says what is new in the row of an evaluation."""
    self._say(of_evaluation(self._config, row))

  def _say(self, found):
    for name, line in found:
      if name not in self._said:
        progress.say(f"note: {line}")
      self._said.add(name)


def opened(config: config_lib.Config, model: Any, method: method_lib.Method) -> str:
  """What is known when the model is open: parameters that are trained, what an epoch costs."""
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  place = method_lib.draw_place(config, 0, 0)
  plan = method_lib.build_plan(config, method, place)
  each = method_lib.evaluations_per_sample(config, method, plan, place)
  samples = config.train.prompts_per_epoch * config.train.group_size
  completed = len(place) * max(1, len(config.completion.strides)) * (plan is not None)
  images = samples * (completed + 1 / config.sampler.branches)
  return (
    f"trains {count(model.trainable):,} parameters ({count(model.frozen):,} stay as they are); an epoch is "
    f"{samples:,} samples, {samples * each:,.0f} evaluations of the model, {images:,.0f} scored images and "
    f"{config.train.updates_per_epoch} updates"
  )


def of_time(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(name, line) of the utilisation, where the devices' peak is known."""
  shares = {p: row.get(f"time/{p}_utilisation") for p in ("rollout", "update")}
  known = {phase: share for phase, share in shares.items() if share is not None}
  if known:
    each = ", ".join(f"{phase} {share:.0%}" for phase, share in known.items())
    yield "utilisation", f"utilisation of the devices' bfloat16 peak: {each}."


def of_memory(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(name, line) of the devices' memory, where they tell."""
  peaks = {p: row.get(f"memory/{p}_peak_gib") for p in ("rollout", "update")}
  known = ", ".join(f"{phase} {peak:.2f} GiB" for phase, peak in peaks.items() if peak is not None)
  limit = row.get("memory/limit_gib")
  if known:
    room = "" if limit is None else f", of {limit:.2f} GiB"
    yield "memory", f"peak device memory by the end of the first {known}{room}."


def of_evaluation(config: config_lib.Config, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(name, line) of each thing that an evaluation's row tells: as `of_epoch`."""
  if row.get("epoch", 0) > 0 and row.get("ema/moves", 1) == 0:
    yield (
      "ema",
      f"ema.every={config.ema.every}: the average has not moved after {row['update']} updates, so this "
      "evaluation is that of the first weights. Lower ema.every, or train longer.",
    )
  if row.get("best/below", 0.0) > BELOW:
    yield (
      "below",
      f"held out, {config.checkpoint.best} is {row['best/below']:.1f} standard errors below its best, after "
      f"epoch {row['best/epoch']}. Those weights are kept (--weights best); eval.patience would end "
      "such a run.",
    )


def below_best(
  metric: str, row: Mapping[str, Any], count: int, earlier: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
  """best/epoch and best/below: how many standard errors of its own an evaluation lies below the best before.

  Args:
    metric: checkpoint.best.
    row: of the evaluation.
    count: its prompts.
    earlier: rows of the evaluations before it.
  """
  known = [r for r in earlier if isinstance(r.get(metric), (int, float))]
  if not known:
    return {}
  best = max(known, key=lambda r: r[metric])
  error = row[metric.replace("/mean", "/std")] / math.sqrt(count)
  below = max(0.0, best[metric] - row[metric])
  return {"best/epoch": best["epoch"], "best/below": below / error if error else 0.0}


def of_epoch(config: config_lib.Config, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(name, line) of each thing that an epoch's metrics tell.

  Args:
    config: of the run.
    row: metric name -> number.
  """
  shares = {
    key.split("/")[1]: value
    for key, value in row.items()
    if key.startswith("reward/") and key.endswith("/share")
  }
  for label, share in shares.items():
    if len(shares) > 1 and share > DROWNS:
      others = ", ".join(repr(other) for other in shares if other != label)
      remedy = (
        f"Lower rewards.{label} or raise the others' weights"
        if config.advantage.per_reward
        else "Set advantage.per_reward=True, which normalises each for itself, or change the weights"
      )
      yield (
        f"share/{label}",
        f"reward {label!r} makes {share:.0%} of the advantage's variance, so {others} hardly counts. "
        f"{remedy}.",
      )
  if row.get("group/zero_spread") == 1.0:
    yield (
      "spread",
      "no group of this epoch has any spread in its rewards, so nothing is learned from it: prompts too easy "
      "or too hard, a group too small, or a reward too coarse (group/zero_spread).",
    )
  first, clip = row.get("ratio/first_update_max_abs_log"), config.loss.clip_range
  if first is not None and clip and first > clip / 10:
    yield (
      "ratio",
      f"the log-ratio before the first update is {first:.2g}, more than a tenth of loss.clip_range={clip:g}: "
      "rollout and update disagree, and clipping acts on rounding. Use float32, or a wider clip range.",
    )
  if row.get("clip/inactive", 0.0) > CLIPPED:
    yield (
      "clipped",
      f"{row['clip/inactive']:.0%} of the terms have no gradient (clip/inactive): the updates are too large "
      f"for loss.clip_range={clip:g}. Lower optimizer.learning_rate, or widen it.",
    )
