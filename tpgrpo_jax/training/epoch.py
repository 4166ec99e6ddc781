"""One epoch, as the box in the paper has it: sample, score, credit, update."""

import dataclasses
import io
import os
import time
from typing import Any

from etils import epath
import jax
import numpy as np
import tqdm

from tpgrpo_jax.data import groups
from tpgrpo_jax.flow import schedule
from tpgrpo_jax.runs import metrics, preemption, processes, run_folder
from tpgrpo_jax.training import build, rollout, step
from tpgrpo_jax.training import session as session_lib
from tpgrpo_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Sampled:
  """An epoch's samples and their credit; nothing is learned from them yet.

  Attributes:
    rollout: samples and rewards.
    credit: StepCredit of NumPy arrays [W, B].
    advantage: [W, B].
    weight: [B], 0 for samples that are left out.
    evaluations: of the model, a sample.
    began: time.perf_counter() at the start.
  """

  rollout: rollout.Rollout
  credit: Any
  advantage: np.ndarray
  weight: np.ndarray
  evaluations: int
  began: float


def sample_epoch(
  session: session_lib.Session,
  state: state_lib.TrainState,
  epoch: int,
  on_chunk: preemption.OnChunk = preemption.go_on,
) -> Sampled:
  """Rollout, rewards and credit; `state` stays as it is.

  Args:
    session: of the run.
    state: before the epoch.
    epoch: its number, from 0.
    on_chunk: called between microbatches with a scoring to wait for; raises to end the epoch.
  """
  config, method = session.config, session.method
  began = time.perf_counter()
  rng = np.random.default_rng((config.seed, epoch, 1))
  start, _ = schedule.draw_window(rng, config.sampler.window, config.sampler.window_range)
  indices = session_lib.epoch_indices(config, epoch, len(session.train_prompts))
  indices = groups.repeat_groups(indices, config.train.group_size)
  prompts = [session.train_prompts[int(i)] for i in indices]
  params = session.model.params(state.trainable)
  key, plan = rollout.epoch_key(config.seed, epoch), build.build_plan(config, method, start)
  chunks = len(prompts) // config.train.microbatch

  def sample(chunk, group, condition):
    args = (params, key, chunk, group, condition, start, plan)
    session.meter.count("rollout", chunks, *args)
    return session.rollout_fn(*args)

  hidden = None if processes.is_first() else True  # None: hidden where nobody looks
  with tqdm.tqdm(total=len(prompts), desc="rollout", leave=False, disable=hidden) as bar:

    def report(count, scoring):
      bar.update(count)
      on_chunk(scoring)

    rolled = rollout.collect(
      config, session.model, session.mesh, sample, session.reward_fn, prompts, report
    )
  credit, advantage, weight = jax.device_get(session.credit_fn(rolled.completion_reward))
  _check_credit_is_finite(config, credit, prompts)
  evaluations = build.evaluations_per_sample(config, plan)
  return Sampled(rolled, credit, advantage, weight, evaluations, began)


def update_epoch(
  session: session_lib.Session, state: state_lib.TrainState, epoch: int, sampled: Sampled
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """The optimizer updates of an epoch; `state` is used up.

  Returns:
    (state, metrics row).
  """
  config, rolled = session.config, sampled.rollout
  began, rows = time.perf_counter(), []
  for batch in step.split_updates(config, rolled, sampled.advantage, sampled.weight):
    args = (state, session.model.frozen, session.reference, batch)
    session.meter.count("update", config.train.updates_per_epoch, *args)
    state, row = session.train_step(*args)
    rows.append(row)
  rows = jax.device_get(rows)
  _check_update_is_finite(config, epoch, rows)
  ended, count = time.perf_counter(), len(rolled.prompts)
  result = metrics.epoch_metrics(rolled, sampled.credit, sampled.advantage, config.train.group_size)
  result |= step.merge_metrics(rows) | {"evaluations_per_sample": float(sampled.evaluations)}
  times = rolled.seconds | {"update": ended - began, "epoch": ended - sampled.began}
  result |= {f"time/{k}": v for k, v in times.items()}
  result |= session.meter.row(times)
  result["time/samples_per_second"] = count / (ended - sampled.began)
  return state, result


def _check_credit_is_finite(config, credit, prompts):
  bad = np.argwhere(~np.isfinite(credit.reward))
  if len(bad):
    step_index, sample = bad[0]
    raise ValueError(
      f"credit.method={config.credit.method!r}: gave {credit.reward[step_index, sample]} to step "
      f"{step_index} of a sample of {prompts[sample].text!r}: must be finite. Mend it, then start "
      "the same command again: the run goes on from its last checkpoint."
    )


def _check_update_is_finite(config, epoch, rows):
  for row in rows:
    if not (np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"])):
      raise ValueError(
        f"epoch {epoch + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}: must be finite. "
        "Nothing of this epoch is kept; the last checkpoint is good. Start anew in another run.dir "
        f"with optimizer.learning_rate below {config.optimizer.learning_rate}."
      )


def save_rollout(run_dir: os.PathLike | str, number: int, sampled: Sampled) -> None:
  """Keeps one epoch's rewards along its trajectories in rollouts/epoch_<number>.npz, for the report."""
  rolled, credit = sampled.rollout, sampled.credit
  content = io.BytesIO()
  np.savez_compressed(
    content,
    completion_reward=rolled.completion_reward,
    is_turning_point=np.asarray(credit.is_turning_point),
    step_reward=np.asarray(credit.reward),
    prompts=np.asarray([p.text for p in rolled.prompts]),
    images=rolled.images,
  )
  path = epath.Path(run_dir) / "rollouts" / f"epoch_{number:05d}.npz"
  run_folder.write(path, content.getvalue())
