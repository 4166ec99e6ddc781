"""One epoch's samples: trajectories, completions and images, scored while the device goes on."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, rewards, types
from tpgrpo_jax.flow import completion, sampler
from tpgrpo_jax.runs import metrics, preemption, processes
from tpgrpo_jax.training import build
from tpgrpo_jax.training import mesh as mesh_lib

KEPT = 64  # images of an epoch that stay on the host, for the report

RolloutFn = Callable[..., tuple[types.Trajectory, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Rollout:
  """The scored samples of one epoch, prompt-major.

  Attributes:
    trajectories: one for each microbatch, on the device.
    conditions: likewise.
    completion_reward: [W+1, B] float32 total reward; NaN where no completion was made (k < W).
    rewards: label -> [W+1, B], the same for each reward alone.
    images: uint8 [at most KEPT, H, W, 3], the first trajectories' own.
    statistics: [B, 3] of the trajectories' images, as of metrics.statistics_of_each.
    prompts: [B].
    seconds: phase -> time.
  """

  trajectories: list[types.Trajectory]
  conditions: list[Any]
  completion_reward: np.ndarray
  rewards: dict[str, np.ndarray]
  images: np.ndarray
  statistics: np.ndarray
  prompts: list[types.Prompt]
  seconds: dict[str, float]


def make_rollout_fn(
  config: config_lib.Config, model: build.Model, method: build.Method
) -> RolloutFn:
  """Returns a jitted function that samples one microbatch.

  (params, key, chunk, group [B, 2], condition, start, plan) -> (Trajectory, images uint8
  [B, W+1 or 1, H, W, 3]); a sample's last image is the trajectory's own. `params` as of Model.params.
  """

  @jax.jit
  def rollout(params, key, chunk, group, condition, start, plan, sigmas):
    # The noise belongs to the sample, the draws to the microbatch; both are functions of the epoch.
    noise_key, draw_key = jax.random.split(key)
    x_init = sampler.initial_noise(
      noise_key, model.pipeline.latent_shape, group, same_latent=config.sampler.same_latent
    )
    x_init = jax.lax.with_sharding_constraint(x_init, jax.sharding.PartitionSpec(mesh_lib.BATCH))
    trajectory = sampler.sample_trajectory(
      method.velocity_fn,
      method.step_fn,
      method.log_prob_fn,
      params,
      jax.random.fold_in(draw_key, chunk),
      x_init,
      condition,
      sigmas=sigmas,
      start=start,
      window=method.window,
    )
    latents = trajectory.final[None]
    if plan is not None:
      completed = completion.complete(
        method.velocity_fn,
        params,
        trajectory,
        condition,
        plan,
        lanes_per_chunk=config.completion.lanes_per_chunk,
      )
      latents = jnp.concatenate([completed, latents])
    # Samples lead: each stays on the devices that sampled it.
    flat = latents.swapaxes(0, 1).reshape(-1, *latents.shape[2:])
    images = models.images_uint8(model.pipeline.decode(params["decoder"], flat))
    return trajectory, images.reshape(*latents.shape[1::-1], *images.shape[1:])

  # An argument and not a constant: XLA would fold log(std) at compile time, with another rounding
  # than the update's.
  return functools.partial(rollout, sigmas=np.asarray(method.sigmas, np.float32))


def collect(
  config: config_lib.Config,
  model: build.Model,
  mesh: jax.sharding.Mesh,
  rollout_fn: Callable[..., tuple[types.Trajectory, jax.Array]],
  reward_fn: rewards.CombinedRewardFn,
  prompts: Sequence[types.Prompt],
  on_chunk: Callable[[int, futures.Future | None], Any] = lambda done, scoring: preemption.go_on(
    scoring
  ),
) -> Rollout:
  """Samples and scores an epoch; rewards of one microbatch run while the device does the next.

  Args:
    config: of the run.
    model: of the run.
    mesh: of the run.
    rollout_fn: (chunk number, group [B, 2], condition) -> (Trajectory, images).
    reward_fn: the weighted sum of the run's rewards; of several processes each scores its own samples.
    prompts: [B] prompt-major, every prompt K times.
    on_chunk: called after each microbatch is under way with the number of its samples and with the
      scoring of the one before, and after the last with 0 and its own scoring; it waits for that, and
      raises to end the epoch. By default what went wrong is raised at the end.
  """
  began = time.perf_counter()
  size, group_size = config.train.microbatch, config.train.group_size
  index = np.arange(len(prompts))
  group = np.stack([index // group_size, index % group_size], axis=1).astype(np.int32)
  trajectories, conditions, pending = [], [], []
  scorer = futures.ThreadPoolExecutor(1)
  try:
    for chunk, first in enumerate(range(0, len(prompts), size)):
      part = slice(first, first + size)
      texts = [p.text for p in prompts[part]]
      condition = build.build_condition(config, model, texts)
      placed = processes.put_batch(mesh, (group[part], condition))
      trajectory, images = rollout_fn(chunk, *placed)
      trajectories.append(trajectory)
      conditions.append(placed[1])
      job = _begin_scoring(reward_fn, images, prompts[part], keep=max(0, KEPT - first))
      pending.append(scorer.submit(job))
      # Two microbatches at most are under way, so that images do not pile up on the device.
      on_chunk(len(texts), pending[chunk - 1] if chunk else None)
    jax.block_until_ready(trajectories)
    device_done = time.perf_counter()
    on_chunk(0, pending[-1])
    scored = [job.result() for job in pending]
  finally:  # without waiting: whoever ends an epoch early does not wait for a reward that hangs
    scorer.shutdown(wait=False, cancel_futures=True)
  total, by_label, images, statistics = processes.sum_over(_concatenate(scored))
  finished = time.perf_counter()
  return Rollout(
    trajectories,
    conditions,
    _fill(total, config),
    {label: _fill(scores, config) for label, scores in by_label.items()},
    images,
    statistics,
    list(prompts),
    {"rollout": device_done - began, "reward_wait": finished - device_done},
  )


def _begin_scoring(reward_fn, images, prompts, keep):
  """Dispatches what runs on the devices; the returned function does the rest, in another thread.

  It gives the scores [states, B] of all samples, their last images, of which it keeps some, and these
  images' statistics; zeros for the samples of other processes.
  """
  batch, states = images.shape[:2]
  flat = images.reshape(-1, *images.shape[2:])
  texts = [p.text for p in prompts for _ in range(states)]
  metadata = [p.metadata for p in prompts for _ in range(states)]
  last, own = images[:, -1], processes.own_rows(images)
  wait = reward_fn(flat, texts, metadata, rows=np.repeat(own, states))

  def finish():
    total, by_label, _ = wait()
    scores = lambda flat: flat.reshape(batch, states).T
    found = processes.fetch_rows(last, own)
    pictures, statistics = np.zeros(last.shape, np.uint8), np.zeros((batch, 3), np.float32)
    pictures[own], statistics[own] = found, metrics.statistics_of_each(found)
    by_label = {label: scores(values) for label, values in by_label.items()}
    return scores(total), by_label, pictures[:keep], statistics

  return finish


def _concatenate(scored):
  """The microbatches side by side: total [states, B], label -> [states, B], images, statistics."""
  total, by_label, images, statistics = zip(*scored)
  scores = {k: np.concatenate([part[k] for part in by_label], axis=1) for k in by_label[0]}
  pictures, each = np.concatenate(images), np.concatenate(statistics)
  return np.concatenate(total, axis=1), scores, pictures, each


def _fill(reward, config):
  """[W+1, B]; the rows of completions that were not asked for are NaN."""
  missing = config.sampler.window[1] - config.sampler.window[0] + 1 - len(reward)
  return np.concatenate([np.full((missing, reward.shape[1]), np.nan, np.float32), reward])


def epoch_key(seed: int, epoch: int) -> jax.Array:
  """The key of an epoch's sampling, a function of the two alone: a resume needs nothing else."""
  return jax.random.fold_in(jax.random.key(seed), epoch)
