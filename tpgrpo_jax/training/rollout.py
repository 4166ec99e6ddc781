"""One epoch's samples: states, completions and images, scored while the device goes on."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards, types
from tpgrpo_jax.credit import branch, stepwise
from tpgrpo_jax.flow import branching, completion, sampler
from tpgrpo_jax.models import layers
from tpgrpo_jax.runs import metrics, preemption, processes
from tpgrpo_jax.training import build, losses
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

KEPT = 64  # images of an epoch that stay on the host, for the report

RolloutFn = Callable[..., tuple[types.Transitions, jax.Array | types.Samples]]


@dataclasses.dataclass(frozen=True)
class Rollout:
  """The scored samples of one epoch, prompt-major, whatever the order that they were made in.

  Attributes:
    transitions: one for each microbatch, on the device; none once the update has taken them.
    conditions: likewise, with a row for each `Method.neighbours` of its states.
    order: [B] the samples in the order of the microbatches.
    sigmas: [T + 1] the grid.
    compared: the rows of completion_reward whose images are compared: the last of trajectories, all members
      of branches.
    completion_reward: [G, W+1, B] float32 total reward, for each of the G strides; NaN where no
      completion was made (k < W). Of branches: row 0 is the anchor's own, row k + 1 the member's. Where
      the credit method asks for states, row k < W is the reward of the noisy state after k steps.
    rewards: label -> [G, W+1, B], the same for each reward alone.
    images: uint8 [at most KEPT, H, W, 3], the first samples' own (the anchors', on branches); none where no
      reward looks at pictures.
    gains: [W, B] of the first stride: the increments, on branches the member's reward over its anchor's.
    statistics: [S, 3] of the images of trajectories or anchors, as of metrics.statistics_of_each; S = 0
      without images.
    scored: images that rewards have looked at, completions included.
    prompts: [B].
    seconds: phase -> time.
  """

  transitions: list[types.Transitions]
  conditions: list[Any]
  order: np.ndarray
  sigmas: np.ndarray
  compared: slice
  completion_reward: np.ndarray
  rewards: dict[str, np.ndarray]
  images: np.ndarray
  gains: np.ndarray
  statistics: np.ndarray
  scored: int
  prompts: list[types.Prompt]
  seconds: dict[str, float]


class States(NamedTuple):
  """How states come about: one row of STATES.

  Attributes:
    sample: (config, method) -> function of a microbatch that returns Transitions and completions.
    arrange: (own [B], completions [segments, B], method) -> completion_reward [G, W+1, B].
    compared: rows of completion_reward, as of Rollout.
    gains: completion_reward [W+1, B] -> [W, B], what each step has brought.
  """

  sample: Callable[..., Any]
  arrange: Callable[[np.ndarray, np.ndarray, method_lib.Method], np.ndarray]
  compared: slice
  gains: Callable[[Any], Any]


def _trajectory(config, method):
  def sample(params, key, x_init, condition, place, plan, sigmas):
    trajectory = sampler.sample_trajectory(
      method.velocity_fn,
      method.step_fn,
      method.log_prob_fn,
      params,
      key,
      x_init,
      condition,
      sigmas=sigmas,
      start=place[0],
      window=method.window,
      copies=method.copies,
      dtype=config.sampler.latents,
    )
    if plan is None:
      return trajectory, None
    lanes = config.completion.lanes_per_chunk
    args = (method.velocity_fn, params, trajectory, condition, plan)
    return trajectory, completion.complete(*args, lanes_per_chunk=lanes)

  return sample


def _branch(config, method):
  def sample(params, key, x_init, condition, place, plan, sigmas):
    transitions = branching.sample_branches(
      method.velocity_fn,
      method.step_fn,
      method.log_prob_fn,
      params,
      key,
      x_init,
      condition,
      sigmas=sigmas,
      branched=place,
      members=method.members,
      antithetic=config.sampler.antithetic,
      dtype=config.sampler.latents,
    )
    lanes = config.completion.lanes_per_chunk
    args = (method.velocity_fn, params, transitions, condition, plan)
    return transitions, branching.complete(*args, lanes_per_chunk=lanes)

  return sample


def _ode(config, method):
  del config

  def sample(params, key, x_init, condition, place, plan, sigmas):
    del key, place, plan
    final = sampler.sample_ode(method.velocity_fn, params, x_init, condition, sigmas=sigmas)
    none = jnp.zeros((0, *final.shape))
    empty, scalars = none[:, :, None], jnp.zeros((0,))
    transitions = types.Transitions(none, empty, none, empty[..., 0, 0, 0], scalars, scalars, final)
    return transitions, None

  return sample


def _after_states(own, completions, method):
  """Of trajectories: completions of the states, then the own images."""
  rows = completions.reshape(-1, method.window, len(own))
  if not rows.size:
    rows = np.full((1, method.window, len(own)), np.nan, np.float32)
  return np.concatenate([rows, np.broadcast_to(own, (len(rows), 1, len(own)))], axis=1)


def _after_anchors(own, completions, method):
  """Of branches: the anchors' own images, then the members of each step."""
  rows = completions.reshape(-1, method.window, len(own))
  return np.concatenate([np.broadcast_to(own, (len(rows), 1, len(own))), rows], axis=1)


STATES = {
  "trajectory": States(_trajectory, _after_states, slice(-1, None), stepwise.increments),
  "branch": States(_branch, _after_anchors, slice(1, None), branch.gain),
  "ode": States(_ode, _after_states, slice(-1, None), stepwise.increments),
}


def make_rollout_fn(
  config: config_lib.Config, model: build.Model, method: method_lib.Method
) -> RolloutFn:
  """Returns `sample_microbatch` of these three, jitted."""
  sample = build.jit(config, functools.partial(sample_microbatch, config, model, method))
  # An argument and not a constant: XLA would fold log(std) at compile time, with another rounding
  # than the update's.
  return functools.partial(sample, sigmas=np.asarray(method.sigmas, np.float32))


def sample_microbatch(
  config: config_lib.Config,
  model: build.Model,
  method: method_lib.Method,
  params: Any,
  key: jax.Array,
  chunk: jax.Array | int,
  group: jax.Array,
  condition: Any,
  place: jax.Array,
  plan: types.Plan | None,
  *,
  sigmas: jax.Array,
) -> tuple[types.Transitions, jax.Array | types.Samples]:
  """Samples one microbatch of S states with M members.

  Args:
    config: of the run.
    model: of the run.
    method: of the run.
    params: as of Model.params.
    key: of the epoch.
    chunk: number of the microbatch.
    group: [S, 2] (prompt number, anchor number within the prompt's group).
    condition: leading axis S or a divisor of it.
    place: as of method.draw_place.
    plan: as of method.build_plan.
    sigmas: [T + 1] float32.

  Returns:
    (Transitions, images uint8 [S, segments M + 1, H, W, 3]); a state's last image is its trajectory's (or
    anchor's) own. Where a reward takes latents, Samples of as many in place of the images; they are
    decoded only where another one looks at pictures.
  """
  # The noise belongs to the sample, the draws to the microbatch; both are functions of the epoch.
  noise_key, draw_key = jax.random.split(key)
  x_init = sampler.initial_noise(
    noise_key, model.pipeline.latent_shape, group, same_latent=config.sampler.same_latent
  )
  x_init = jax.lax.with_sharding_constraint(x_init, jax.sharding.PartitionSpec(mesh_lib.BATCH))
  sample = STATES[config.sampler.rollout].sample(config, method)
  key = jax.random.fold_in(draw_key, chunk)
  transitions, completed = sample(params, key, x_init, condition, place, plan, sigmas)
  states = len(transitions.final)
  latents = transitions.final[:, None]
  if completed is not None:
    # States lead: each stays on the devices that sampled it.
    members = completed.reshape(len(completed), states, -1, *completed.shape[2:]).swapaxes(0, 1)
    members = members.reshape(states, -1, *completed.shape[2:])
    latents = jnp.concatenate([members, latents], axis=1)
  levels = jnp.zeros(latents.shape[1])
  if method.credit.completions == "states":
    latents = jnp.concatenate([transitions.x.swapaxes(0, 1), latents], axis=1)
    levels = jnp.concatenate([transitions.sigma, levels])
  # Without loss: they were rounded to it.
  kept = functools.partial(jax.tree.map, lambda x: x.astype(config.sampler.latents))
  velocity = transitions.velocity if losses.reads_old_velocity(config) else None
  transitions = dataclasses.replace(
    transitions,
    states=kept(transitions.states),
    members=kept(transitions.members),
    velocity=velocity,
  )
  seen = rewards.reads(config.rewards)
  if not seen.pictures:
    return transitions, types.Samples(latents, levels)
  images = model.pipeline.paint(params, latents)
  return transitions, types.Samples(latents, levels, images) if seen.latents else images


def collect(
  config: config_lib.Config,
  model: build.Model,
  method: method_lib.Method,
  mesh: jax.sharding.Mesh,
  rollout_fn: RolloutFn,
  reward_fn: rewards.CombinedRewardFn,
  prompts: Sequence[types.Prompt],
  order: np.ndarray | None = None,
  on_chunk: Callable[[int, futures.Future | None], Any] = lambda done, scoring: preemption.go_on(
    scoring
  ),
) -> Rollout:
  """Samples and scores an epoch; rewards of one microbatch run while the device does the next.

  Args:
    config: of the run.
    model: of the run.
    method: of the run.
    mesh: of the run.
    rollout_fn: (chunk number, group [S, 2], condition) -> (Transitions, images or Samples).
    reward_fn: the weighted sum of the run's rewards; of several processes each scores its own samples.
    prompts: [B] prompt-major, every prompt K times.
    order: [B] the samples as the microbatches take them; None is as they are. Members stay together.
    on_chunk: called after each microbatch is under way with the number of its samples and with the
      scoring of the one before, and after the last with 0 and its own scoring; it waits for that, and
      raises to end the epoch. By default what went wrong is raised at the end.
  """
  began = time.perf_counter()
  size, group_size = config.train.microbatch, config.train.group_size
  order = np.arange(len(prompts)) if order is None else order
  anchor = order % group_size // config.sampler.branches
  group = np.stack([order // group_size, anchor], axis=1).astype(np.int32)
  transitions, conditions, pending, count = [], [], [], 0
  scorer = futures.ThreadPoolExecutor(1)
  try:
    for chunk, first in enumerate(range(0, len(prompts), size)):
      samples = order[first : first + size]
      lead = samples[:: method.members]
      asked = [prompts[i] for i in lead]
      condition = method_lib.build_condition(config, model, asked[:: method.neighbours])
      placed = processes.put_batch(mesh, (group[first : first + size : method.members], condition))
      condition = _with_one_negative(placed[1], conditions[:1])
      found, seen = rollout_fn(chunk, placed[0], condition)
      transitions.append(found)
      conditions.append(condition)
      painted = seen.images if isinstance(seen, types.Samples) else seen
      count += 0 if painted is None else math.prod(painted.shape[:2])
      shown = model.pipeline.show(asked)
      job = _begin_scoring(reward_fn, seen, condition, shown, samples < KEPT)
      pending.append(scorer.submit(job))
      # Two microbatches at most are under way, so that images do not pile up on the device.
      on_chunk(len(samples), pending[chunk - 1] if chunk else None)
    jax.block_until_ready(transitions)
    device_done = time.perf_counter()
    on_chunk(0, pending[-1])
    scored = [job.result() for job in pending]
  finally:  # without waiting: whoever ends an epoch early does not wait for a reward that hangs
    scorer.shutdown(wait=False, cancel_futures=True)
  total, by_label, images, statistics = processes.sum_over(_concatenate(scored))
  finished = time.perf_counter()
  states = STATES[config.sampler.rollout]

  def in_order(scores):
    own, completions = scores
    arranged = states.arrange(own, completions, method)
    return np.ascontiguousarray(arranged[..., np.argsort(order)], np.float32)

  completion_reward = in_order(total)
  return Rollout(
    transitions,
    conditions,
    order,
    method.sigmas,
    states.compared,
    completion_reward,
    {label: in_order(scores) for label, scores in by_label.items()},
    images[np.argsort(order[order < KEPT])] if len(images) else images,
    np.asarray(states.gains(jnp.asarray(completion_reward[0]))),
    statistics,
    count,
    list(prompts),
    {"rollout": device_done - began, "reward_wait": finished - device_done},
  )


def _with_one_negative(condition, earlier):
  """The condition with an earlier one's arrays of what all microbatches are guided away from."""
  if not earlier or not isinstance(condition, types.GuidedCondition):
    return condition
  return dataclasses.replace(condition, negative=earlier[0].negative)


def _begin_scoring(reward_fn, seen, condition, prompts, kept):
  """Dispatches what runs on the devices; the returned function does the rest, in another thread.

  It gives (own, completions) scores of all samples [B], [segments, B], their own images where `kept` [B]
  is set, and the statistics of all own images [S, 3]; zeros for the samples of other processes, and None
  for both where nothing was decoded.
  """
  images, looked = seen, {}
  if isinstance(seen, types.Samples):
    images = seen.images
    each = lambda rows: layers.per_sample(rows, seen.x)
    condition = jax.tree.map(each, method_lib.positive(condition))
    looked = {"looked": reward_fn.look(seen, condition)}
  lead = images if images is not None else seen.x
  states, count = lead.shape[:2]
  members = len(kept) // states
  flat = None if images is None else images.reshape(-1, *images.shape[2:])
  texts = [p.text for p in prompts for _ in range(count)]
  metadata = [p.metadata for p in prompts for _ in range(count)]
  last, mine = None if images is None else images[:, -1], processes.own_rows(lead)
  wait = reward_fn(flat, texts, metadata, rows=np.repeat(mine, count), **looked)

  def split(flat):
    scores = flat.reshape(states, count)
    own = np.repeat(scores[:, -1], members)
    return own, scores[:, :-1].reshape(states, -1, members).swapaxes(0, 1).reshape(-1, len(kept))

  def finish():
    total, by_label, _ = wait()
    labels = {k: split(values) for k, values in by_label.items()}
    if last is None:
      return split(total), labels, None, None
    found = processes.fetch_rows(last, mine)
    pictures, statistics = np.zeros(last.shape, np.uint8), np.zeros((states, 3), np.float32)
    pictures[mine], statistics[mine] = found, metrics.statistics_of_each(found)
    pictures = np.repeat(pictures, members, axis=0)[kept]
    return split(total), labels, pictures, statistics

  return finish


def _concatenate(scored):
  """The microbatches side by side: (own, completions), label -> the same, images, statistics.

  Empty arrays in place of the latter two where nothing was decoded.
  """
  total, by_label, images, statistics = zip(*scored)
  join = lambda parts: tuple(np.concatenate(each, axis=-1) for each in zip(*parts))
  scores = {k: join([part[k] for part in by_label]) for k in by_label[0]}
  if images[0] is None:
    return join(total), scores, np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 3), np.float32)
  return join(total), scores, np.concatenate(images), np.concatenate(statistics)


def epoch_key(seed: int, epoch: int) -> jax.Array:
  """The key of an epoch's sampling, a function of the two alone: a resume needs nothing else."""
  return jax.random.fold_in(jax.random.key(seed), epoch)
