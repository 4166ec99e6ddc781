"""Several rewards at once: their weighted sum, and each on its own for the log."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import inspect
import math
import numbers
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import registry, types

_LARGEST = float(np.finfo(np.float32).max)  # a weight beyond makes every total infinite

RewardMaker = Callable[..., types.RewardFn]

CombinedRewardFn = Callable[
    [np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]],
    tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict[str, Any]]],
]
"""(images uint8 [N, H, W, 3], prompts, metadata) -> (total float32 [N], label -> float32 [N],
label -> info)."""


class RewardError(RuntimeError):
  """A reward returned what cannot be trained on; the run stops and can be resumed."""


def make_weighted_sum(
    rewards: Mapping[str, Any], table: Mapping[str, RewardMaker]
) -> CombinedRewardFn:
  """Makes the function total = sum over labels of weight * score, computed in the labels' order.

  The rewards of one call run at the same time, each in a thread of its own, so that those that wait
  (for a server) do not hold up those that compute.

  Args:
    rewards: label -> weight, or label -> {"weight": w, "make": name or "package.module:make",
      ...options of that reward}; without "make" the label is the name.
    table: name -> maker.

  Returns:
    (images uint8 [N, H, W, 3], prompts, metadata) -> (total float32 [N], label -> float32 [N],
    label -> info); raises RewardError if a reward returns anything but N finite numbers.

  Raises:
    ValueError: no rewards, an unknown name, a weight that is not a finite number, or an option that
      the reward does not have or accept.
  """
  if not isinstance(rewards, Mapping) or not rewards:
    raise ValueError(
        f"rewards={rewards!r}: must be a mapping with one reward or more, label -> weight. "
        "Try rewards={'ocr': 1.0}."
    )
  specs = {label: _parse(label, spec) for label, spec in rewards.items()}
  functions = {
      label: _make(label, registry.lookup(table, name, field=f"rewards.{label}"), options)
      for label, (_, name, options) in specs.items()
  }
  weights = {label: weight for label, (weight, _, _) in specs.items()}

  def combined(
      images: UInt8[np.ndarray, "N H W 3"],
      prompts: Sequence[str],
      metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[
      Float32[np.ndarray, " N"], dict[str, Float32[np.ndarray, " N"]], dict[str, dict[str, Any]]
  ]:
    if not len(images) == len(prompts) == len(metadata):
      raise ValueError(
          f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata: must be "
          "equally many. Pass one prompt and one metadata per image."
      )
    images = images.view()
    images.flags.writeable = False  # a reward that paints on them would spoil the others' scores
    with futures.ThreadPoolExecutor(len(functions), thread_name_prefix="reward") as pool:
      pending = {
          label: pool.submit(_score, label, fn, images, prompts, metadata)
          for label, fn in functions.items()
      }
    results = {label: future.result() for label, future in pending.items()}
    scores = {label: score for label, (score, _) in results.items()}
    total = np.zeros(len(images), np.float32)
    for label, score in scores.items():
      total += np.float32(weights[label]) * score
    return total, scores, {label: info for label, (_, info) in results.items()}

  return combined


def _parse(label, spec):
  """(weight, name, options) of one entry."""
  field, name, options = f"rewards.{label}", label, {}
  weight = spec
  if isinstance(spec, Mapping):
    options = dict(spec)
    name = options.pop("make", label)
    if "weight" not in options:
      raise ValueError(f"{field}={spec!r}: has no weight. Add 'weight': 1.0.")
    weight, field = options.pop("weight"), f"{field}.weight"
  is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
  if not is_number or not math.isfinite(weight) or abs(float(weight)) > _LARGEST:
    raise ValueError(f"{field}={weight!r}: must be a finite number. Use 1.0 if it is the only one.")
  if not isinstance(name, str):
    raise ValueError(f"rewards.{label}.make={name!r}: must be a name. Without it the label is.")
  return float(weight), name, options


def _make(label, make, options):
  """The reward function of one entry."""
  parameters = inspect.signature(make).parameters.values()
  named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
  if not any(p.kind is p.VAR_KEYWORD for p in parameters):
    for option in options:
      if option not in named:
        accepted = registry.nearest(option, named) if named else " It has none; leave it out."
        raise ValueError(f"rewards.{label}.{option}: unknown option of this reward.{accepted}")
  missing = [n for n, p in named.items() if p.default is p.empty and n not in options]
  if missing:
    raise ValueError(
        f"rewards.{label}: needs the options {', '.join(missing)}. Set them beside the weight. (A "
        'reward of your own is named by its maker: "package.module:make", where make(**options) '
        "returns the function of images, prompts and metadata.)"
    )
  try:
    function = make(**options)
  except ValueError as error:
    raise ValueError(f"rewards.{label}: {error}") from error
  if not callable(function):
    raise ValueError(
        f"rewards.{label}: its maker returned {function!r}, which must be a function "
        "(images, prompts, metadata) -> (scores, info). Return the function itself."
    )
  return function


def _score(label, function, images, prompts, metadata):
  """(scores float32 [N], info) of one reward, checked."""
  try:
    result = function(images, prompts, metadata)
  except Exception as error:
    error.add_note(f"This happened in the reward {label!r}, on {_batch_name(prompts)}.")
    raise
  if not isinstance(result, tuple) or len(result) != 2:
    raise _error(label, prompts, f"{type(result).__name__}", "a pair (scores, info)")
  if not isinstance(result[1], dict):
    raise _error(label, prompts, f"info {result[1]!r}", "a pair (scores, info) with a dict as info")
  given = np.asarray(result[0])
  if given.dtype.kind not in "biuf":
    raise _error(label, prompts, f"scores of dtype {given.dtype}", "numbers that float32 can hold")
  if given.shape != (len(images),):
    raise _error(label, prompts, f"scores of shape {given.shape}", f"of shape ({len(images)},)")
  with np.errstate(over="ignore"):  # becomes inf, which the next line reports
    scores = given.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(scores))
  if bad.size:
    culprits = [prompts[i] for i in bad]
    raise _error(label, culprits, f"the score {given[bad[0]]}", "finite in float32")
  return scores, result[1]


def _error(label, prompts, value, rule):
  return RewardError(
      f"reward {label!r} returned {value} for {_batch_name(prompts)}: must be {rule}. Mend the "
      "reward, then start the same command again: the run goes on from its last checkpoint."
  )


def _batch_name(prompts):
  if not prompts:
    return "an empty batch"
  more = f" (and {len(prompts) - 1} more)" if len(prompts) > 1 else ""
  return f"the prompt {prompts[0]!r}{more}"
