"""From a config to the functions of its method: the five choices, bound."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import inspect
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit, models, registry, rewards, types
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.flow import branching, completion, guidance, schedule, steps
from tpgrpo_jax.training import build
from tpgrpo_jax.training import state as state_lib

# dynamics -> (step, log_prob); the noise level is bound by `bind_dynamics`.
DYNAMICS = {
  "sde": (steps.sde_step, steps.gaussian_log_prob),
  "cps": (steps.cps_step, steps.cps_log_prob),
  "dance": (steps.dance_step, steps.gaussian_log_prob),
}
_MOST_PLACES = 2000  # of which the packings are compared, so that one shape serves all


@dataclasses.dataclass(frozen=True)
class Method:
  """All functions of a run, bound to its config.

  Attributes:
    velocity_fn: guided when the config says so; the SAME one in rollout and update.
    reference_velocity_fn: the adapter-free model, likewise guided.
    step_fn: the stochastic step.
    log_prob_fn: its score.
    noise_levels: [W] of the window's steps, where each has its own; else ().
    sigmas: [T + 1] grid of training.
    window: W, rows of an epoch's advantages: stochastic steps, branched steps, or trained noise levels.
    members: of one state in the batches of rollout and update; 1 but for branches.
    copies: neighbours of a batch that share noise and prompt until the window begins.
    neighbours: states of a batch that share a prompt, and a row of its condition.
    credit: method and the completions it needs.
    normalize: reward [W, B] -> advantage.
    optimizer: of optax.
  """

  velocity_fn: types.VelocityFn
  reference_velocity_fn: types.VelocityFn
  step_fn: types.StepFn
  log_prob_fn: types.LogProbFn
  noise_levels: tuple[float, ...]
  sigmas: np.ndarray
  window: int
  members: int
  copies: int
  neighbours: int
  credit: types.CreditMethod
  normalize: Callable[[jax.Array], jax.Array]
  optimizer: optax.GradientTransformation


def build_method(
  config: config_lib.Config,
  model: build.Model,
  *,
  shards: int = 1,
  noise_levels: tuple[float, ...] = (),
) -> Method:
  """Binds sampler, credit, advantages and optimizer to the config.

  Args:
    config: of the run.
    model: of the run.
    shards: into how many parts the mesh divides a batch.
    noise_levels: calibrated ones, in place of the config's.
  """
  sampler, train = config.sampler, config.train
  sigmas = make_sigmas(sampler, model, sampler.num_steps)
  levels = noise_levels or sampler.noise_levels
  step_fn, log_prob_fn = bind_dynamics(sampler, sigmas, levels)
  is_late = any(where.min() > 0 for where in _places(config))
  part = train.update_microbatch or train.microbatch
  members = _neighbours(sampler.branches, part, shards)
  return Method(
    velocity_fn=guide(config, model.velocity_fn),
    reference_velocity_fn=guide(config, model.base_velocity_fn),
    step_fn=step_fn,
    log_prob_fn=log_prob_fn,
    noise_levels=levels,
    sigmas=sigmas,
    window=num_rows(config),
    members=members,
    copies=_neighbours(train.group_size, train.microbatch, shards)
    if sampler.rollout == "trajectory" and sampler.same_latent and is_late and not train.shuffle
    else 1,
    neighbours=1
    if train.shuffle
    else _neighbours(train.group_size // members, part // members, shards),
    credit=bind_credit(config),
    normalize=_bind_advantages(config),
    optimizer=state_lib.make_optimizer(
      config.optimizer, total_updates=train.epochs * train.updates_per_epoch
    ),
  )


def num_rows(config: config_lib.Config) -> int:
  """W, rows of an epoch's advantages: stochastic steps, branched steps, or trained noise levels."""
  start, end = config.sampler.window
  drawn = {"branch": config.sampler.branch_steps, "ode": config.loss.levels}
  return drawn.get(config.sampler.rollout, 0) or end - start


def _neighbours(most, batch, shards):
  """How many neighbours of a batch stay together: a divisor of `most` that leaves `shards` even parts."""
  return max(m for m in range(1, most + 1) if not (most % m or batch % m or batch // m % shards))


def bind_credit(config: config_lib.Config) -> types.CreditMethod:
  """The credit method with its options bound; its extras are passed by keyword.

  Raises:
    ValueError: a method, perhaps the user's own, that is none, or that does not go with the rollout.
  """
  table = credit.BALANCED if config.credit.balance else credit.CREDIT
  method = registry.lookup(table, config.credit.method, field="credit.method")
  if not isinstance(method, types.CreditMethod):
    method = types.CreditMethod(method, completions="all")  # the user's own function
  field = f"credit.method={config.credit.method!r}"
  kinds = ("all", "states", "none")
  if method.completions not in kinds or not callable(method.function):
    raise ValueError(f"{field}: must be a function, or CreditMethod(function, one of {kinds}).")
  _check_needs(config, method, field)
  method = method._replace(function=_bind_known(method.function, gamma=config.credit.gamma))
  _check_credit(config, method, field)
  return method


def _check_needs(config, method, field):
  """Raises ValueError unless a credit method gets what it asks for."""
  s, known = config.sampler, ("key", "alignment")
  if not isinstance(method.extras, tuple) or not {*method.extras} <= {*known}:
    raise ValueError(f"{field}: extras={method.extras!r} must be a tuple of {known}.")
  if method.completions == "states":
    _check_states(config, field)
  if s.rollout == "branch" and (method.completions == "none" or "alignment" in method.extras):
    raise ValueError(
      f"{field}: has completions={method.completions!r} and extras={method.extras}. Members of "
      "sampler.rollout='branch' are their completions, and have no trajectory to be aligned with: use "
      "completions='all' without 'alignment'."
    )
  if s.calibration and method.completions == "none":
    raise ValueError(
      f"sampler.calibration={s.calibration}: counts the signs of increments, and {field} makes no "
      "completions. Use one that does, or set calibration to 0."
    )


def _check_states(config, field):
  """Raises ValueError where the noisy states themselves cannot be scored."""
  if rewards.reads(config.rewards).pictures:
    raise ValueError(
      f"{field}: asks for the rewards of noisy states, and rewards={sorted(config.rewards)} look at "
      f"pictures. Use rewards of latents alone, such as {' or '.join(rewards.LATENT_REWARDS)}."
    )
  if config.sampler.rollout != "trajectory":
    raise ValueError(
      f"{field}: asks for the rewards of noisy states, and sampler.rollout={config.sampler.rollout!r} keeps "
      "none of a sample. Use 'trajectory'."
    )


def _check_credit(config, method, field):
  """Raises ValueError unless a credit method, perhaps the user's own, returns what credit is."""
  window = num_rows(config)
  batch = config.train.prompts_per_epoch * config.train.group_size
  rule = (
    f"must return StepCredit(reward float [{window}, {batch}], is_turning_point bool [{window}, {batch}], "
    f"share None or float [{window}, {batch}]) for completion rewards [{window + 1}, {batch}]"
  )
  rewards = jax.ShapeDtypeStruct((window + 1, batch), jnp.float32)
  known = {"key": jax.eval_shape(lambda: jax.random.key(0)), "alignment": rewards}
  extras = {name: known[name] for name in method.extras}
  found = shapes_of(method.function, rewards, **extras, rule=f"{field}: {rule}")
  fits = lambda leaf, kind: (
    getattr(leaf, "shape", None) == (window, batch) and jnp.issubdtype(leaf.dtype, kind)
  )
  if not (
    isinstance(found, types.StepCredit)
    and fits(found.reward, jnp.floating)
    and fits(found.is_turning_point, jnp.bool_)
    and (found.share is None or fits(found.share, jnp.floating))
  ):
    raise ValueError(f"{field}: {rule}, returns {found}. See docs/bring_your_own.md.")


def shapes_of(function: Callable[..., Any], *args: Any, rule: str, **kwargs: Any) -> Any:
  """What jax.eval_shape finds; whatever a user's own function raises becomes a ValueError with the rule."""
  try:
    return jax.eval_shape(function, *args, **kwargs)
  except Exception as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"{rule}, and raises {type(error).__name__}: {text[:200]}. It is traced, so it must use jax.numpy. See "
      "docs/bring_your_own.md."
    ) from error


def _bind_advantages(config):
  asked, train = config.advantage, config.train
  size = train.group_size if asked.group == "prompt" else config.sampler.branches
  normalize = _bind_known(
    advantages.ADVANTAGES[asked.normalization], floor=asked.floor, bonus=asked.bonus
  )
  return lambda reward: normalize(reward, size)


def _bind_known(function, **options):
  """The function with those of the options that it has a parameter for."""
  known = inspect.signature(function).parameters
  return functools.partial(function, **{k: v for k, v in options.items() if k in known})


def bind_dynamics(
  sampler: config_lib.Sampler, sigmas: np.ndarray, noise_levels: Any = ()
) -> tuple[types.StepFn, types.LogProbFn]:
  """(step, log_prob) with the noise level bound, or those of the window's steps where they are given."""
  step_fn, log_prob_fn = DYNAMICS[sampler.dynamics]
  if sampler.dynamics == "sde":
    step_fn = functools.partial(step_fn, sigma_max=float(sigmas[1]))
  if not len(noise_levels):
    return functools.partial(step_fn, noise_level=sampler.noise_level), log_prob_fn
  states = np.asarray(sigmas, np.float32)[slice(*sampler.window)]
  return steps.with_levels(step_fn, states, jnp.asarray(noise_levels, jnp.float32)), log_prob_fn


def make_sigmas(sampler: config_lib.Sampler, model: build.Model, num_steps: int) -> np.ndarray:
  """The grid of noise levels, [num_steps + 1]."""
  height, width, _ = model.pipeline.latent_shape
  image_tokens = height * width // model.config.latents.patch**2
  line, terminal = dict(model.pipeline.grid), None
  if sampler.schedule != "linear":
    terminal = line.pop("terminal", None)
  line.pop("terminal", None)
  sigmas = schedule.SCHEDULES[sampler.schedule](num_steps, sampler.shift, image_tokens, **line)
  return schedule.stretch_to_terminal(sigmas, terminal) if terminal and num_steps > 1 else sigmas


def is_guided(config: config_lib.Config) -> bool:
  """Whether a step evaluates the model twice, with the prompt and without: above 1, as in diffusers."""
  variant = models.MODELS[config.model.variant]
  return variant.guidance == "classifier_free" and config.sampler.guidance_scale > 1.0


def guide(config: config_lib.Config, velocity_fn: types.VelocityFn) -> types.VelocityFn:
  """The velocity function that takes what `build_condition` makes."""
  if not is_guided(config):
    return velocity_fn
  return guidance.classifier_free(velocity_fn, config.sampler.guidance_scale)


def build_condition(
  config: config_lib.Config, model: build.Model, prompts: Sequence[types.Prompt | str]
) -> Any:
  """Embeds prompts on the host: a Condition, or a GuidedCondition when guidance is on."""
  positive = model.pipeline.condition(prompts)
  if not is_guided(config):
    return positive
  return types.GuidedCondition(positive, model.pipeline.encode([""]))


def positive(condition: Any) -> types.Condition:
  """The part of what `build_condition` makes that is of the prompts themselves."""
  return condition.positive if isinstance(condition, types.GuidedCondition) else condition


def draw_place(config: config_lib.Config, epoch: int, chunk: int) -> np.ndarray:
  """Where the noise goes in one microbatch: [W] the steps that are stochastic, or that are branched."""
  s = config.sampler
  rng = np.random.default_rng((config.seed, epoch, 1))
  if s.window_draw == "microbatch":
    rng = np.random.default_rng((config.seed, epoch, 1, chunk))
  window = schedule.draw_window(rng, s.window, s.window_range)
  if s.window_every:
    window = schedule.progressive_window(
      epoch, window=s.window, num_steps=s.num_steps - (s.dynamics == "cps"), every=s.window_every
    )
  return schedule.draw_steps(rng, window, s.branch_steps)


def _windows(sampler) -> Iterator[tuple[int, int]]:
  """All windows that `draw_place` can find."""
  start, end = sampler.window
  starts = range(start, start + 1)
  if sampler.window_range:
    starts = range(sampler.window_range[0], sampler.window_range[1] - (end - start) + 1)
  if sampler.window_every:
    starts = range(start, sampler.num_steps - (sampler.dynamics == "cps") - (end - start) + 1)
  yield from ((first, first + end - start) for first in starts)


def _places(config) -> Iterator[np.ndarray]:
  """All that `draw_place` can find."""
  for window in _windows(config.sampler):
    count = config.sampler.branch_steps or window[1] - window[0]
    yield from map(np.asarray, itertools.combinations(range(*window), count))


def build_plan(config: config_lib.Config, method: Method, place: np.ndarray) -> types.Plan | None:
  """The packing of one microbatch's completions; None when the credit method makes none.

  Where windows or steps are drawn every plan is padded to the largest shape, so that all compile to one
  program, which skips what is idle.
  """
  if method.credit.completions != "all":
    return None
  plan = functools.partial(_plan, config.sampler, config.completion, tuple(method.sigmas))
  largest = _largest_plan(config.sampler, config.completion, tuple(method.sigmas))
  return plan(tuple(map(int, place)), at_least=largest)


def _plan(sampler, asked, sigmas, place, at_least=(0, 0)):
  options = dict(steps=asked.steps, strides=asked.strides, solver=asked.solver, at_least=at_least)
  if sampler.rollout == "branch":
    return branching.plan(np.asarray(sigmas), place, **options)
  return completion.plan(np.asarray(sigmas), start=place[0], window=len(place), **options)


@functools.lru_cache(maxsize=8)
def _largest_plan(sampler, asked, sigmas):
  """(steps, lanes) that hold the completions of every place; (0, 0) where there is but one."""
  count = sampler.branch_steps or sampler.window[1] - sampler.window[0]
  windows = list(_windows(sampler))
  choices = (itertools.combinations(range(*window), count) for window in windows)
  places = [place for some in choices for place in itertools.islice(some, _MOST_PLACES)]
  if len(places) == 1:
    return 0, 0
  rows, lanes = zip(*(_plan(sampler, asked, sigmas, place).load.shape for place in places))
  total = len(windows) * math.comb(sampler.window[1] - sampler.window[0], count)
  most = max(lanes) if len(places) == total else count * max(1, len(asked.strides))
  return max(rows), most


def evaluations_per_sample(
  config: config_lib.Config, method: Method, plan: types.Plan | None, place: np.ndarray
) -> float:
  """Model evaluations that one sample of the rollout takes, idle lanes too; guidance counts twice."""
  return _evaluations(config, method, plan, int(place[0]) if method.copies > 1 else 0)


def most_evaluations(config: config_lib.Config, method: Method, plan: types.Plan | None) -> float:
  """As `evaluations_per_sample`, where nothing is skipped or shared: what `flops.count` counts."""
  return _evaluations(config, method, plan and plan._replace(busy=()), 0)


def _evaluations(config, method, plan, first):
  """`first` steps are made once for all copies."""
  count = first / method.copies + (config.sampler.num_steps - first)
  count /= method.members
  if plan is not None:
    lanes_per_chunk = config.completion.lanes_per_chunk
    count += completion.num_lane_evaluations(plan, lanes_per_chunk=lanes_per_chunk)
  return count * (2 if is_guided(config) else 1)
