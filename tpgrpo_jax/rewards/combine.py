"""Several rewards at once: their weighted sum, and each on its own for the log.

A call has two phases. What runs on the devices is dispatched at once, in the caller's thread and in the
labels' order, so that every process of a pod dispatches the same programs in the same order; rewards of
the host run, and everything is waited for, when the result is asked for, in whatever thread.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import copy
import functools
import http.client
import inspect
import json
import logging
import math
import threading
import time
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Bool, UInt8
import numpy as np

from tpgrpo_jax import registry, types
from tpgrpo_jax.rewards import latents
from tpgrpo_jax.rewards import specs as specs_lib
from tpgrpo_jax.runs import processes

log = logging.getLogger(__name__)

MAY_PASS = (OSError, RuntimeError, http.client.HTTPException, json.JSONDecodeError)
"""What a call raises that may succeed when it is made again: servers and networks that fail."""

RewardMaker = Callable[..., types.RewardFn]

DeviceRewardMaker = Callable[..., types.DeviceRewardFn]
"""(placement=..., **options) -> the reward."""

LatentRewardMaker = Callable[..., types.LatentRewardFn]
"""(placement=..., **options) -> the reward."""


Scores = tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict[str, Any]]]
"""(total float32 [N], label -> float32 [N], label -> info)."""

CombinedRewardFn = Callable[..., Callable[[], Scores]]
"""(images uint8 [N, H, W, 3], prompts, metadata, *, rows=None) -> a function that waits for their Scores."""


class RewardError(RuntimeError):
  """A reward returned what cannot be trained on; the run stops and can be resumed."""


def make_weighted_sum(
  rewards: Mapping[str, Any],
  host: Mapping[str, RewardMaker],
  device: Mapping[str, DeviceRewardMaker],
  latent: Mapping[str, LatentRewardMaker] = {},
  *,
  placement: types.Placement | None = None,
  timeout: float = math.inf,
  retries: int = 0,
  backoff: float = 1.0,
) -> CombinedRewardFn:
  """Makes the function total = sum over labels of weight * score, computed in the labels' order.

  Rewards of the host that are computed together run at the same time, each in a thread of its own, so
  that those that wait (for a server) do not hold up those that compute.

  Args:
    rewards: label -> weight, or label -> {"weight": w, "make": name or "package.module:make",
      ...options of that reward}; without "make" the label is the name.
    host: name -> maker of a reward of the host; the user's own are of these.
    device: name -> maker of a reward of the devices.
    latent: name -> maker of a reward of latents, on the devices too.
    placement: of the weights and batches of rewards of the devices; None for the default device.
    timeout: seconds that one call of a reward of the host may take.
    retries: how often a call is made again that took longer, or raised one of MAY_PASS.
    backoff: seconds before the first of them; each later one waits twice as long.

  Returns:
    begin: (images uint8 [N, H, W, 3], of the host or of the devices, prompts, metadata, rows, looked) ->
    finish: () -> (total float32 [N], label -> float32 [N], label -> info). `begin` does not wait.
    `finish` raises RewardError if a reward returns anything but N finite numbers, or gives up.
    `rows`, bool [N], marks those that this process scores, by default all: the other scores are 0,
    so that the sum over processes has them all, and an info is of these rows alone.
    `looked` is what `begin.look(samples, condition)` gave for the same N: label -> scores [N] of the
    rewards of latents, dispatched. Where all are of latents, images may be None.
    `begin.check(prompts)` raises ValueError for a prompt that a reward cannot score: it asks those
    rewards that have such an attribute, a function of one prompt and its metadata. It warns of what their
    attribute `survey`, of all prompts, says, unless `surveys` is False.
    `begin.canaries` is label -> the canary.Canary that a reward brings, or None.
    `begin.check_model(latent_shape, condition)` raises ValueError for a model that a reward of latents cannot
    judge.

  Raises:
    ValueError: no rewards, an unknown name, a weight that is not a finite number, or an option that
      the reward does not have or accept.
  """
  if not isinstance(rewards, Mapping) or not rewards:
    raise ValueError(
      f"rewards={rewards!r}: must be a mapping with one reward or more, label -> weight. "
      "Try rewards={'ocr': 1.0}."
    )
  specs = {label: specs_lib.parse(label, spec) for label, spec in rewards.items()}
  table = {**host, **device, **latent}
  functions: dict[str, dict[str, Any]] = {"host": {}, "device": {}, "latent": {}}
  for label, (_, name, options) in specs.items():
    maker = registry.lookup(table, name, field=f"rewards.{label}")
    kind = "latent" if name in latent else "device" if name in device else "host"
    given = {} if kind == "host" else {"placement": placement}
    if getattr(maker, "is_told_the_label", False):
      given = {"run_label": label if label in table and label != name else ""}
    functions[kind][label] = _make(label, maker, options, given)
  weights = {label: weight for label, (weight, _, _) in specs.items()}
  patience = _Patience(timeout, retries, backoff)

  def begin(
    images: UInt8[np.ndarray | jax.Array, "N H W 3"] | None,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    *,
    rows: Bool[np.ndarray, " N"] | None = None,
    looked: Mapping[str, Any] = {},
  ) -> Callable[[], Scores]:
    latents.check_seen(functions, images, looked)
    count = len(prompts) if images is None else len(images)
    if not count == len(prompts) == len(metadata):
      raise ValueError(
        f"{count} images, {len(prompts)} prompts, {len(metadata)} metadata: must be "
        "equally many. Pass one prompt and one metadata per image."
      )
    rows = np.ones(len(prompts), bool) if rows is None else rows
    extra = 0 if placement is None else -len(prompts) % jax.device_count()
    dispatched = _dispatch(functions["device"], images, prompts, metadata, placement, extra)

    def finish() -> Scores:
      results = _run_host(functions["host"], images, prompts, metadata, rows, patience)
      for label, scores in dispatched.items():
        results[label] = (_wait(label, scores, prompts, extra) * rows, {})
      for label, scores in looked.items():
        results[label] = (_wait(label, scores, prompts, 0) * rows, {})
      scores = {label: results[label][0] for label in weights}
      total = np.zeros(len(prompts), np.float32)
      for label, score in scores.items():
        total += np.float32(weights[label]) * score
      return total, scores, {label: results[label][1] for label in weights}

    return finish

  def check(prompts: Sequence[types.Prompt], *, surveys: bool = True) -> None:
    for label, function in (each for kind in functions.values() for each in kind.items()):
      for prompt in prompts:
        with _noting(label, [prompt.text]):
          getattr(function, "check", lambda *_: None)(prompt.text, prompt.metadata)
      for line in getattr(function, "survey", lambda _: [])(prompts) if surveys else ():
        warnings.warn(f"rewards.{label}: {line}", stacklevel=2)

  bind = functools.partial
  begin.look = bind(latents.look, functions["latent"])  # pyright: ignore[reportFunctionMemberAccess]
  begin.check_model = bind(latents.check_model, functions["latent"])  # pyright: ignore[reportFunctionMemberAccess]
  begin.check = check  # pyright: ignore[reportFunctionMemberAccess]
  begin.canaries = {  # pyright: ignore[reportFunctionMemberAccess]
    label: getattr(function, "canary", None)
    for kind in functions.values()
    for label, function in kind.items()
  }
  begin.flops = functools.partial(_flops, functions)  # pyright: ignore[reportFunctionMemberAccess]
  return begin


def _flops(functions, count, size):
  """Operations of all rewards on pictures of (height, width); None of none, and where one does not say."""
  each = [fn for kind in functions.values() for fn in kind.values()]
  known = count and all(hasattr(fn, "flops") for fn in each)
  return float(count * sum(fn.flops(*size) for fn in each)) if known else None


def weights_of(rewards: Mapping[str, Any]) -> dict[str, float]:
  """Label -> weight of what `make_weighted_sum` takes."""
  return {label: specs_lib.parse(label, spec)[0] for label, spec in rewards.items()}


def _dispatch(functions, images, prompts, metadata, placement, extra):
  """{label: scores on the devices}; the last row is repeated `extra` times, so that meshes divide."""
  if not functions:
    return {}
  if extra:
    pad = jnp.pad if isinstance(images, jax.Array) else np.pad
    images = pad(images, [(0, extra), (0, 0), (0, 0), (0, 0)], mode="edge")
    prompts, metadata = ([*x, *[x[-1]] * extra] for x in (prompts, metadata))
  images = jnp.asarray(images) if placement is None else placement.batch(images)
  dispatched = {}
  for label, function in functions.items():
    with _noting(label, prompts):
      dispatched[label] = processes.replicate(function(images, prompts, metadata))
  return dispatched


class _Patience(NamedTuple):
  timeout: float
  retries: int
  backoff: float


def _run_host(functions, images, prompts, metadata, rows, patience):
  """{label: (scores, info)}; other scores than those of `rows` are 0."""
  if not functions or not rows.any():
    return {label: (np.zeros(len(rows), np.float32), {}) for label in functions}
  images = processes.fetch_rows(images, rows)
  prompts, metadata = ([x for x, own in zip(xs, rows) if own] for xs in (prompts, metadata))
  with futures.ThreadPoolExecutor(len(functions), thread_name_prefix="reward") as pool:
    pending = {
      label: pool.submit(_insist, label, fn, images, prompts, metadata, patience)
      for label, fn in functions.items()
    }
  results = {}
  for label, future in pending.items():
    scores, info = future.result()
    whole = np.zeros(len(rows), np.float32)
    whole[rows] = scores
    results[label] = (whole, info)
  return results


def _insist(label, function, images, prompts, metadata, patience):
  """`_score`, again after a failure that may pass; each kind of failure is said once."""
  attempt, said = 0, None
  while True:
    try:
      return _limit(patience.timeout, _score, label, function, images, prompts, metadata)
    except RewardError:
      raise
    except MAY_PASS as error:
      if attempt == patience.retries:
        raise RewardError(
          f"reward {label!r} failed {attempt + 1} times, the last time with {type(error).__name__}: "
          f"{error}. The run stops. Mend the reward (scoring.timeout={patience.timeout}, "
          f"scoring.retries={patience.retries}), then start the same command again."
        ) from error
      wait = patience.backoff * 2**attempt
      attempt += 1
      if (problem := f"{type(error).__name__}: {error}") != said:
        log.warning("reward %r: %s; again in %.3g s", label, problem, wait)
        said = problem
      time.sleep(wait)


def _limit(timeout, function, *args):
  """function(*args); TimeoutError after `timeout` seconds, and then its thread is left to itself."""
  if timeout == math.inf:
    return function(*args)
  future: futures.Future = futures.Future()

  def run():
    try:
      future.set_result(function(*args))
    except BaseException as error:
      future.set_exception(error)

  # A daemon: a call that hangs for ever does not keep the process from ending.
  threading.Thread(target=run, daemon=True, name="reward call").start()
  try:
    return future.result(timeout)
  except futures.TimeoutError as error:
    if future.done():
      raise  # the reward's own
    raise TimeoutError(f"no answer within {timeout:g} s") from error


def _make(label, make, options, given):
  """The reward function of one entry; `given` are the options that are not the user's."""
  try:
    parameters = inspect.signature(make).parameters.values()
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"rewards.{label}.make: names {make!r}, must name a Python function make(**options) that returns "
      "the function of images, prompts and metadata."
    ) from error
  named = {
    p.name: p
    for p in parameters
    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in given
  }
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
    function = make(**options, **given)
  except (ValueError, TypeError) as error:
    raise ValueError(f"rewards.{label}: {error}") from error
  except BaseException as error:  # such as a package or a file that is missing
    error.add_note(f"This happened when the reward {label!r} was made.")
    raise
  if not callable(function):
    raise ValueError(
      f"rewards.{label}: its maker returned {function!r}, which must be a function "
      "(images, prompts, metadata) -> (scores, info). Return the function itself."
    )
  return function


@contextlib.contextmanager
def _noting(label, prompts):
  """Notes on any exception which reward raised it, and on which prompts."""
  try:
    yield
  except BaseException as error:  # extensions in Rust panic with one that is no Exception
    error.add_note(f"This happened in the reward {label!r}, on {_batch_name(prompts)}.")
    raise


def _score(label, function, images, prompts, metadata):
  """(scores float32 [N], info) of one reward of the host, checked.

  It has images and metadata of its own: what it paints or writes on them, which torch.from_numpy can do to
  a read-only array too, is not another's, nor that of a second try.
  """
  images, metadata = images.copy(), copy.deepcopy(metadata)
  images.flags.writeable = False
  with _noting(label, prompts):
    try:
      result = function(images, list(prompts), metadata)
    except SystemExit as error:  # else the run would end as if it were finished
      raise RewardError(
        f"reward {label!r} called sys.exit({error.code!r}). The run stops."
      ) from error
  if not isinstance(result, tuple) or len(result) != 2:
    raise _error(label, prompts, f"{type(result).__name__}", "a pair (scores, info)")
  if not isinstance(result[1], dict):
    raise _error(label, prompts, f"info {result[1]!r}", "a pair (scores, info) with a dict as info")
  try:
    given = _to_numpy(result[0])
  except Exception as error:  # of NumPy, of torch
    raise _error(label, prompts, f"scores that cannot be read ({error})", "N numbers") from error
  return _checked(label, given, prompts), result[1]


def _to_numpy(given):
  """Numbers of NumPy, JAX or torch (of any dtype, on any device, with a gradient), or a list of such."""
  if isinstance(given, (list, tuple)):
    given = [_to_numpy(each) for each in given]
  elif hasattr(given, "detach"):
    given = given.detach().cpu()
    given = (given.double() if given.is_floating_point() else given).numpy()
  array = np.asarray(given)
  is_small = (
    jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.kind != "f"
  )  # such as bfloat16
  return array.astype(np.float32) if is_small else array


def _wait(label, dispatched, prompts, extra):
  """Scores float32 [N] of one reward of the devices, checked; the extra rows are dropped."""
  with _noting(label, prompts):
    scores = np.asarray(dispatched)  # what failed on the device is raised here
  whole = scores.shape == (len(prompts) + extra,)
  return _checked(label, scores[: len(prompts)] if whole else scores, prompts)


def _checked(label, given, prompts):
  """Scores as float32 [N]; RewardError where they are anything else."""
  if given.dtype.kind not in "biuf":
    raise _error(label, prompts, f"scores of dtype {given.dtype}", "numbers that float32 can hold")
  if given.shape != (len(prompts),):
    raise _error(label, prompts, f"scores of shape {given.shape}", f"of shape ({len(prompts)},)")
  with np.errstate(over="ignore"):  # becomes inf, which the next line reports
    scores = given.astype(np.float32)
  bad = np.flatnonzero(~np.isfinite(scores))
  if bad.size:
    culprits = [prompts[i] for i in bad]
    raise _error(label, culprits, f"the score {given[bad[0]]}", "finite in float32")
  return scores


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
