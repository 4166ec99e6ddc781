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
from tpgrpo_jax import models, types
from tpgrpo_jax.flow import completion, sampler
from tpgrpo_jax.training import build
from tpgrpo_jax.training import mesh as mesh_lib

RolloutFn = Callable[..., tuple[types.Trajectory, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Rollout:
  """The scored samples of one epoch, prompt-major.

  Attributes:
    trajectories: one for each microbatch, on the device.
    conditions: likewise.
    completion_reward: [W+1, B] float32 total reward; NaN where no completion was made (k < W).
    rewards: label -> [W+1, B], the same for each reward alone.
    images: [B, H, W, 3] uint8, the trajectories' own.
    prompts: [B].
    seconds: phase -> time.
  """

  trajectories: list[types.Trajectory]
  conditions: list[Any]
  completion_reward: np.ndarray
  rewards: dict[str, np.ndarray]
  images: np.ndarray
  prompts: list[types.Prompt]
  seconds: dict[str, float]


def make_rollout_fn(
  config: config_lib.Config, model: build.Model, method: build.Method
) -> RolloutFn:
  """Returns a jitted function that samples one microbatch.

  (params, key, chunk, group [B, 2], condition, start, plan) -> (Trajectory, images uint8
  [W+1 or 1, B, H, W, 3]); the last image is the trajectory's own.
  """

  @jax.jit
  def rollout(params, key, chunk, group, condition, start, plan, sigmas):
    # The noise belongs to the sample, the draws to the microbatch; both are functions of the epoch.
    noise_key, draw_key = jax.random.split(key)
    x_init = sampler.initial_noise(
      noise_key, model.variant.latent_shape, group, same_latent=config.sampler.same_latent
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
    flat = latents.reshape(-1, *latents.shape[2:])
    images = models.images_uint8(model.variant.decode(flat))
    return trajectory, images.reshape(*latents.shape[:2], *images.shape[1:])

  # An argument and not a constant: XLA would fold log(std) at compile time, with another rounding
  # than the update's.
  return functools.partial(rollout, sigmas=np.asarray(method.sigmas, np.float32))


def collect(
  config: config_lib.Config,
  model: build.Model,
  mesh: jax.sharding.Mesh,
  rollout_fn: Callable[..., tuple[types.Trajectory, jax.Array]],
  reward_fn: Callable[..., Any],
  prompts: Sequence[types.Prompt],
  on_chunk: Callable[[int], Any] = lambda done: None,
) -> Rollout:
  """Samples and scores an epoch; rewards of one microbatch run while the device does the next.

  All that runs on the devices, rewards included, is dispatched by the calling thread.

  Args:
    config: of the run.
    model: of the run.
    mesh: of the run.
    rollout_fn: (chunk number, group [B, 2], condition) -> (Trajectory, images).
    reward_fn: as of `rewards.make_rewards`.
    prompts: [B] prompt-major, every prompt K times.
    on_chunk: called after each microbatch with the number of its samples.
  """
  began = time.perf_counter()
  size, group_size = config.train.microbatch, config.train.group_size
  index = np.arange(len(prompts))
  group = np.stack([index // group_size, index % group_size], axis=1).astype(np.int32)
  trajectories, conditions, pending = [], [], []
  with futures.ThreadPoolExecutor(1) as scorer:
    for chunk, first in enumerate(range(0, len(prompts), size)):
      part = slice(first, first + size)
      texts = [p.text for p in prompts[part]]
      placed = (group[part], build.build_condition(config, model, texts))
      placed = jax.device_put(placed, mesh_lib.batch_sharding(mesh))
      trajectory, images = rollout_fn(chunk, *placed)
      trajectories.append(trajectory)
      conditions.append(placed[1])
      pending.append(scorer.submit(_begin_scoring(reward_fn, images, prompts[part])))
      # Two microbatches at most are under way, so that images do not pile up on the device.
      if chunk:
        pending[chunk - 1].result()
      on_chunk(len(texts))
    jax.block_until_ready(trajectories)
    device_done = time.perf_counter()
    scored = [job.result() for job in pending]
  total, by_label, images = zip(*scored)
  finished = time.perf_counter()
  return Rollout(
    trajectories,
    conditions,
    _fill(np.concatenate(total, axis=1), config),
    {k: _fill(np.concatenate([d[k] for d in by_label], axis=1), config) for k in by_label[0]},
    np.concatenate(images),
    list(prompts),
    {"rollout": device_done - began, "reward_wait": finished - device_done},
  )


def _begin_scoring(reward_fn, images, prompts):
  """Dispatches rewards of images [W+1 or 1, B, ...]; returns what waits for them and for images[-1]."""
  states, batch = images.shape[:2]
  texts = [p.text for p in prompts] * states
  metadata = [p.metadata for p in prompts] * states
  own = images[-1]
  finish = reward_fn(images.reshape(-1, *images.shape[2:]), texts, metadata)

  def wait():
    total, by_label, _ = finish()
    shape = (states, batch)
    return total.reshape(shape), {k: v.reshape(shape) for k, v in by_label.items()}, np.asarray(own)

  return wait


def _fill(reward, config):
  """[W+1, B]; the rows of completions that were not asked for are NaN."""
  missing = config.sampler.window[1] - config.sampler.window[0] + 1 - len(reward)
  return np.concatenate([np.full((missing, reward.shape[1]), np.nan, np.float32), reward])


def epoch_key(seed: int, epoch: int) -> jax.Array:
  """The key of an epoch's sampling, a function of the two alone: a resume needs nothing else."""
  return jax.random.fold_in(jax.random.key(seed), epoch)
