"""One epoch, as the box in the paper has it: sample, score, credit, update."""

import dataclasses
import io
import os
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.cost import memory
from tpgrpo_jax.data import groups
from tpgrpo_jax.rewards import combine
from tpgrpo_jax.runs import metrics, preemption, processes, run_folder
from tpgrpo_jax.training import batches as batches_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import progress, rollout, skipped, sums
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
    evaluations: of the model, a sample; the mean over the microbatches.
    began: time.perf_counter() at the start.
    memory: as of memory.peak_row.
  """

  rollout: rollout.Rollout
  credit: Any
  advantage: np.ndarray
  weight: np.ndarray
  evaluations: float
  began: float
  memory: dict[str, float]


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
  indices = session_lib.epoch_indices(config, epoch, len(session.train_prompts))
  indices = groups.repeat_groups(indices, config.train.group_size)
  prompts = [session.train_prompts[int(i)] for i in indices]
  params = session.model.params(session.sampling_weights(state))
  key = rollout.epoch_key(config.seed, epoch)
  chunks = len(prompts) // config.train.microbatch
  evaluations, most, condition_of = [], [], []

  def sample(chunk, group, condition):
    place = method_lib.draw_place(config, epoch, chunk)
    plan = method_lib.build_plan(config, method, place)
    evaluations.append(method_lib.evaluations_per_sample(config, method, plan, place))
    most.append(method_lib.most_evaluations(config, method, plan))
    condition_of[:] = [condition]
    args = (params, key, chunk, group, condition, place.astype(np.int32), plan)
    session.meter.count("rollout", chunks, *args)
    with progress.first("the rollout", session.rollout_fn):
      return session.rollout_fn(*args)

  with progress.Bar("rollout", len(prompts), "samples") as bar:

    def report(count, scoring):
      bar.advance(count)
      on_chunk(scoring)

    rolled = rollout.collect(
      config,
      session.model,
      method,
      session.mesh,
      sample,
      session.reward_fn,
      prompts,
      _sample_order(config, epoch),
      report,
    )
  latents = (config.train.microbatch // method.members, *session.model.pipeline.latent_shape)
  session.meter.skip(
    "rollout",
    (sum(most) - sum(evaluations)) * config.train.microbatch,
    lambda: skipped.flops_of_one(config, method, params, condition_of[0], latents),
  )
  credit, advantage, weight = _assign_credit(session, rolled, key)
  _check_credit_is_finite(config, credit, prompts)
  peak = memory.peak_row("rollout")
  return Sampled(rolled, credit, advantage, weight, float(np.mean(evaluations)), began, peak)


def _sample_order(config, epoch):
  """[B] the samples as they are made: prompt by prompt, or shuffled; members of one state stay together."""
  members = config.sampler.branches
  count = config.train.prompts_per_epoch * config.train.group_size // members
  first = np.arange(count)
  if config.train.shuffle:
    first = np.random.default_rng((config.seed, epoch, 3)).permutation(count)
  return (first[:, None] * members + np.arange(members)).ravel()


def _assign_credit(session, rolled, key):
  """(StepCredit, advantage [W, B], weight [B]) of NumPy arrays."""
  config = session.config
  known = {
    "key": lambda: jax.random.fold_in(key, 1),
    "alignment": lambda: _alignment(rolled),
  }
  extras = {name: known[name]() for name in session.method.credit.extras}
  if config.advantage.per_reward:
    each = combine.weights_of(config.rewards)
    rewards = np.concatenate([rolled.rewards[label] for label in each])
    weights = np.repeat([*each.values()], len(rolled.completion_reward))
  else:
    rewards, weights = rolled.completion_reward, np.ones(len(rolled.completion_reward))
  return jax.device_get(session.credit_fn(rewards, weights.astype(np.float32), extras))


def _alignment(rolled):
  """[W+1, B] cosine of the latent after k steps and the finished one, in the samples' own order."""
  each = [processes.fetch(_cosines(t)) for t in rolled.transitions]
  return np.concatenate(each, axis=1)[:, np.argsort(rolled.order)]


@jax.jit
def _cosines(transitions):
  states = transitions.states.astype(jnp.float32)
  flat = states.reshape(*states.shape[:2], -1)
  final = transitions.final.reshape(1, len(transitions.final), -1)
  norm = lambda a: jnp.linalg.norm(a, axis=-1)
  return jnp.sum(flat * final, axis=-1) / (norm(flat) * norm(final))


def update_epoch(
  session: session_lib.Session, state: state_lib.TrainState, epoch: int, sampled: Sampled
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """The optimizer updates of an epoch; `state` is used up.

  Returns:
    (state, metrics row).
  """
  config, rolled = session.config, sampled.rollout
  began = time.perf_counter()
  batches = _stacked(config, sampled, epoch)
  args = (state, session.model.frozen, session.reference, batches[0])
  session.meter.count("update", config.train.updates_per_epoch, *args)
  state, rows, seconds = _update_by(session, state, epoch, batches)
  state = session.move_old(state)
  rows, off = jax.device_get(rows)
  _check_update_is_finite(config, epoch, rows)
  ended, count = time.perf_counter(), len(rolled.prompts)
  compared = {"prompt": config.train.group_size, "state": config.sampler.branches}
  group_size = compared[config.advantage.group]
  result = metrics.epoch_metrics(rolled, sampled.credit, sampled.advantage, group_size)
  if not config.advantage.per_reward:  # there the credit is of each reward for itself
    result |= metrics.found_turning_points(config.credit.method, rolled.completion_reward[0])
  result |= metrics.variance_shares(
    {label: each[0, rolled.compared] for label, each in rolled.rewards.items()},
    combine.weights_of(config.rewards),
    group_size,
    per_reward=config.advantage.per_reward,
  )
  result |= sums.of_updates(rows) | {"evaluations_per_sample": float(sampled.evaluations)}
  result |= {f"noise_level/{k}": a for k, a in enumerate(session.method.noise_levels)}
  if off:
    result["ratio/rollout_max_abs_log"] = float(max(off))
  times = rolled.seconds | seconds | {"epoch": ended - sampled.began}
  times["update"] = ended - began - seconds.get("old_log_prob", 0.0)
  result |= {f"time/{k}": v for k, v in times.items()}
  result |= session.meter.row(times) | sampled.memory | memory.peak_row("update")
  result["time/samples_per_second"] = count / (ended - sampled.began)
  return state, result


def _stacked(config, sampled, epoch):
  """The batches of an epoch's updates; the rollout's own arrays are given up, share by share."""
  rolled = sampled.rollout
  shares = batches_lib.split_updates(config, rolled, sampled.advantage, sampled.weight, epoch)
  rolled.transitions.clear()
  rolled.conditions.clear()
  batches = []
  while shares:
    # Updates of steps are of the same samples: what does not go with a step is theirs together.
    like = batches[0] if batches and config.train.updates_by == "steps" else None
    batches.append(batches_lib.stacked(config, shares.pop(0), like))
  return batches


def _update_by(session, state, epoch, batches):
  """(state, (metrics of each update, how far the rollout's log-probs were off), seconds of scoring)."""
  source, limit = session.old_scores, session.old_scores.limit
  if source.are_own(epoch):
    return _update_by_own_scores(session, state, batches)
  rows = []
  with progress.Bar("update", len(batches), "updates") as bar:
    for batch in batches:
      batch = dataclasses.replace(batch, limit=limit)
      with progress.first("the update", session.train_step):
        state, row = session.train_step(state, session.model.frozen, session.reference, batch)
      if limit is not None and not rows:
        if (found := float(row["ratio/max_abs_log"])) > limit:  # the state is as it was
          source.change(epoch, found)
          return _update_by_own_scores(session, state, batches)
        limit = np.float32(np.inf)
      rows.append(row)
      _follow(bar, rows)
    _follow(bar, rows, last=True)
  return state, (rows, []), {}


def _follow(bar, rows, *, last=False):
  """Advances by the step before the newest, which is under way meanwhile, or by the last one."""
  if last or len(rows) > 1:
    jax.block_until_ready(rows[-1 if last else -2])
    bar.advance(1)


def _update_by_own_scores(session, state, batches):
  """As `_update_by`: old log-probs of all but the first batch come before the first optimizer step."""
  with progress.Bar("update", 2 * len(batches) - 1, "passes") as bar:
    return _score_and_update(session, state, batches, bar)


def _score_and_update(session, state, batches, bar):
  began, off, rows = time.perf_counter(), [], []

  def run(state, batch, phase):
    batch = dataclasses.replace(batch, phase=np.int32(phase))
    args = (state, session.model.frozen, session.reference, batch)
    with progress.first("the update", session.rescoring_step):
      state, row, scores = session.rescoring_step(*args)
    off.append(row.pop("ratio/rollout_max_abs_log"))
    _follow(bar, off)
    return state, row, scores

  for number, batch in enumerate(batches[1:], start=1):
    args = (state, session.model.frozen, session.reference, batch)
    session.meter.count("old_log_prob", len(batches) - 1, *args)
    state, _, scores = run(state, batch, batches_lib.SCORE)
    batches[number] = batches_lib.with_scores(batch, scores)  # the rollout's scores go
  jax.block_until_ready(state)
  seconds = {"old_log_prob": time.perf_counter() - began} if batches[1:] else {}
  for number, batch in enumerate(batches):
    state, row, _ = run(state, batch, batches_lib.LATER if number else batches_lib.FIRST)
    rows.append(row)
  _follow(bar, off, last=True)
  return state, (rows, off), seconds


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
        "Nothing of this epoch is kept; every checkpoint is good. Start anew in another run.dir "
        f"with optimizer.learning_rate below {config.optimizer.learning_rate}."
      )


def save_rollout(run_dir: os.PathLike | str, number: int, sampled: Sampled) -> None:
  """Keeps one epoch's rewards along its trajectories in rollouts/epoch_<number>.npz, for the report."""
  rolled, credit = sampled.rollout, sampled.credit
  content = io.BytesIO()
  np.savez_compressed(
    content,
    completion_reward=rolled.completion_reward[0],
    is_turning_point=np.asarray(credit.is_turning_point),
    step_reward=np.asarray(credit.reward),
    prompts=np.asarray([p.text for p in rolled.prompts]),
    images=rolled.images,
  )
  path = epath.Path(run_dir) / "rollouts" / f"epoch_{number:05d}.npz"
  run_folder.write(path, content.getvalue())
