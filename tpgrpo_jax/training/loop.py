"""The training loop; reads like the box in the paper."""

import dataclasses
import functools
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from PIL import Image
import tqdm

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import processes, rewards
from tpgrpo_jax.data import groups
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.flow import schedule
from tpgrpo_jax.training import (
  build,
  checkpoint,
  evaluation,
  metrics,
  rollout,
  run_folder,
  step,
)
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import state as state_lib

GRID_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Session:
  """Everything that stays the same from epoch to epoch.

  Attributes:
    config: of the run.
    mesh: of the run.
    model: weights that never change, and functions.
    method: sampler, credit, optimizer.
    reference: params of the adapter-free model; {} without a KL term.
    train_prompts: dataset that epochs draw from.
    rollout_fn: jitted, of one microbatch.
    credit_fn: jitted.
    train_step: jitted.
    reward_fn: weighted sum.
    evaluate: params -> Evaluation.
  """

  config: config_lib.Config
  mesh: jax.sharding.Mesh
  model: build.Model
  method: build.Method
  reference: Any
  train_prompts: Any
  rollout_fn: Any
  credit_fn: Any
  train_step: Any
  reward_fn: Any
  evaluate: Any


def open_session(config: config_lib.Config) -> Session:
  """Builds all functions of a run and loads its data; nothing is compiled yet.

  Raises:
    ValueError: whatever in the config does not fit the devices, the weights or the files.
  """
  mesh = mesh_lib.make_mesh(config.mesh)
  mesh_lib.check_divides("train.microbatch", config.train.microbatch, mesh)
  reward_fn = rewards.make_rewards(config.rewards, placement=mesh_lib.make_placement(mesh))
  load = functools.partial(prompts_lib.load_prompts, config.prompts.name, config.prompts.path)
  held_out = load("test")
  held_out = [held_out[i] for i in range(min(config.eval.prompts, len(held_out)))]
  train_prompts = load("train")
  asked = [*held_out, *(train_prompts[i] for i in _visited(config, len(train_prompts)))]
  model = build.build_model(config, mesh, [prompt.text for prompt in asked])
  method = build.build_method(config, model)
  return Session(
    config=config,
    mesh=mesh,
    model=model,
    method=method,
    reference=_reference(config, model),
    train_prompts=train_prompts,
    rollout_fn=rollout.make_rollout_fn(config, model, method),
    credit_fn=step.make_credit_fn(config, method),
    train_step=step.make_train_step(config, method),
    reward_fn=reward_fn,
    evaluate=evaluation.make_evaluate(
      config, model, mesh, build_eval_rewards(config, mesh, reward_fn), held_out
    ),
  )


def _epoch_indices(config, epoch, dataset_size):
  return groups.epoch_indices(
    epoch,
    seed=config.seed,
    dataset_size=dataset_size,
    prompts_per_epoch=config.train.prompts_per_epoch,
  )


def _visited(config, dataset_size):
  """Which training prompts the run will see, in order: those that must be embedded."""
  visited: set[int] = set()
  for epoch in range(config.train.epochs):
    if len(visited) == dataset_size:
      break
    visited.update(map(int, _epoch_indices(config, epoch, dataset_size)))
  return sorted(visited)


def build_eval_rewards(
  config: config_lib.Config, mesh: jax.sharding.Mesh, reward_fn: Any = None
) -> rewards.CombinedRewardFn:
  """The rewards that evaluation reports: eval.rewards by name, or those of training."""
  if not config.eval.rewards:
    return reward_fn
  asked = {name: config.rewards.get(name, 1.0) for name in config.eval.rewards}
  return rewards.make_rewards(asked, placement=mesh_lib.make_placement(mesh))


def _reference(config, model):
  if not config.loss.kl_coef:
    return {}
  if config.lora.rank:
    return {"frozen": model.frozen, "trainable": {}}
  return {"frozen": model.frozen, "trainable": jax.tree.map(jax.numpy.copy, model.trainable)}


def init_state(session: Session) -> state_lib.TrainState:
  """The state before the first update, on the mesh."""
  create = functools.partial(state_lib.init_state, optimizer=session.method.optimizer)
  shardings = mesh_lib.param_shardings(
    session.mesh, jax.eval_shape(create, session.model.trainable)
  )
  return jax.jit(create, out_shardings=shardings)(session.model.trainable)


def train(config: config_lib.Config) -> dict[str, float]:
  """Trains, or resumes when the run folder holds a checkpoint of the same config.

  Returns:
    The last evaluation's row.

  Raises:
    ValueError: a config that cannot run, or a run folder made by another one.
    RewardError: a reward returned what cannot be trained on; the run can be resumed.
    SystemExit: with status 143, when SIGTERM came to a process of several: the epoch under way was
      finished and saved.
  """
  metrics.check_sinks(config.log)
  with run_folder.hold(config.run.dir):
    run_folder.check_config(config.run.dir, config)
    return _train_in_folder(open_session(config))


def _train_in_folder(session):
  """Resumes or starts, and trains to the end."""
  config, run_dir = session.config, pathlib.Path(session.config.run.dir)
  run_folder.save_config(run_dir, config)
  every, keep = config.checkpoint.every, config.checkpoint.keep
  with (
    jax.set_mesh(session.mesh),
    checkpoint.RunCheckpoints(run_dir, keep=keep, every=every) as checkpoints,
  ):
    state, totals = _restore_or_start(session, checkpoints)
    # Rows carry the number of finished epochs; a fresh start keeps none, not even that of epoch 0.
    done = totals["epoch"]
    run_folder.truncate_metrics(run_dir / "metrics.jsonl", done + 1 if done else 0)
    with metrics.MetricsLog(run_dir, config.log, dataclasses.asdict(config)) as sink:
      return _train(session, state, totals, checkpoints, sink, run_dir)


def _restore_or_start(session, checkpoints):
  """(state, totals) of the newest checkpoint, or of a run that begins."""
  config, run_dir = session.config, session.config.run.dir
  state = init_state(session)
  totals = {"epoch": 0, "evaluations": 0, "samples": 0, "seconds": 0.0}
  files = {
    "prompts": (f"prompts.path={config.prompts.path!r}", session.train_prompts.identity),
    "weights": (f"model.path={config.model.path!r}", session.model.identity),
  }
  if checkpoints.latest() is not None:
    state, totals = checkpoints.restore(_abstract(state))
    for name, (field, identity) in files.items():
      if totals.get(name, identity) != identity:
        raise ValueError(
          f"{field}: its files have changed since the run in {run_dir} began. To resume it, bring "
          "them back; to train on the new ones, use another run.dir."
        )
    if processes.is_first():
      tqdm.tqdm.write(f"{run_dir}: resumes after epoch {totals['epoch']} of {config.train.epochs}")
  return state, totals | {name: identity for name, (_, identity) in files.items()}


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _train(session, state, totals, checkpoints, sink, run_dir):
  """From `totals` to the last epoch."""
  config = session.config
  first, row = totals["epoch"], {}
  clock = time.perf_counter() - totals["seconds"]
  if not first:
    row = _evaluate(session, state, totals, sink, run_dir)
  elif first >= config.train.epochs:  # nothing left to train: say where the run stands
    row = session.evaluate(session.model.params(state.ema)).row
  quiet = not processes.is_first()
  with tqdm.tqdm(total=config.train.epochs, initial=first, desc="epochs", disable=quiet) as bar:
    for epoch in range(first, config.train.epochs):
      state, train_row = train_epoch(session, state, epoch, totals, run_dir)
      totals |= {"epoch": epoch + 1, "seconds": time.perf_counter() - clock}
      sink.write({"epoch": epoch + 1, "kind": "train", **totals_row(totals), **train_row})
      last = epoch + 1 == config.train.epochs
      if last or (config.eval.every and (epoch + 1) % config.eval.every == 0):
        row = _evaluate(session, state, totals, sink, run_dir)
        totals["seconds"] = time.perf_counter() - clock
      checkpoints.save(epoch + 1, state, totals, force=last)
      if checkpoints.must_stop(epoch + 1) and not last:
        if not quiet:
          bar.write(f"{run_dir}: SIGTERM; stops after epoch {epoch + 1}, which is saved")
        sys.exit(128 + signal.SIGTERM)  # as if the signal had ended it: the run is not finished
      bar.set_postfix(reward=f"{train_row['reward/mean']:.3f}", held_out=_shown(row), refresh=False)
      bar.update()
  return row


def train_epoch(session: Session, state: state_lib.TrainState, epoch: int, totals: dict, run_dir):
  """One epoch: rollout, credit, updates.

  Returns:
    (state, metrics row).
  """
  config, method = session.config, session.method
  began = time.perf_counter()
  rng = np.random.default_rng((config.seed, epoch, 1))
  start, _ = schedule.draw_window(rng, config.sampler.window, config.sampler.window_range)
  indices = _epoch_indices(config, epoch, len(session.train_prompts))
  indices = groups.repeat_groups(indices, config.train.group_size)
  prompts = [session.train_prompts[int(i)] for i in indices]
  params = session.model.params(state.trainable)
  key, plan = rollout.epoch_key(config.seed, epoch), build.build_plan(config, method, start)
  sample = lambda chunk, group, condition: session.rollout_fn(
    params, key, chunk, group, condition, start, plan
  )
  with tqdm.tqdm(
    total=len(prompts), desc="rollout", leave=False, disable=None if processes.is_first() else True
  ) as bar:
    rolled = rollout.collect(
      config, session.model, session.mesh, sample, session.reward_fn, prompts, on_chunk=bar.update
    )
  credit, advantage, weight = jax.device_get(session.credit_fn(rolled.completion_reward))
  _check_credit_is_finite(config, credit, prompts)
  update_began = time.perf_counter()
  rows = []
  for batch in step.split_updates(config, rolled, advantage, weight):
    state, row = session.train_step(state, session.model.frozen, session.reference, batch)
    rows.append(row)
  rows = jax.device_get(rows)
  _check_update_is_finite(config, epoch, rows)
  ended = time.perf_counter()
  evaluations = build.evaluations_per_sample(config, plan)
  totals["evaluations"] += evaluations * len(prompts)
  totals["samples"] += len(prompts)
  times = rolled.seconds | {"update": ended - update_began, "epoch": ended - began}
  result = metrics.epoch_metrics(rolled, credit, advantage, config.train.group_size)
  result |= step.merge_metrics(rows) | {"evaluations_per_sample": float(evaluations)}
  result |= {f"time/{k}": v for k, v in times.items()}
  result["time/samples_per_second"] = len(prompts) / (ended - began)
  if processes.is_first() and config.log.images_every and epoch % config.log.images_every == 0:
    _save_rollout(run_dir, epoch + 1, rolled, credit)
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


def totals_row(totals: dict[str, Any]) -> dict[str, Any]:
  """What a run has spent so far, under the names of the metrics."""
  return {
    "total/evaluations": totals["evaluations"],
    "total/samples": totals["samples"],
    "time/total": totals["seconds"],
  }


def _evaluate(session, state, totals, sink, run_dir):
  """Writes the row and a sample grid."""
  result = session.evaluate(session.model.params(state.ema))
  number = totals["epoch"]
  sink.write(
    {
      "epoch": number,
      "kind": "eval",
      "update": number * session.config.train.updates_per_epoch,
      **totals_row(totals),
      **result.row,
    }
  )
  if not processes.is_first():
    return result.row
  captions = [p.text for p in result.prompts[:GRID_IMAGES]]
  sheet = evaluation.grid(result.images[:GRID_IMAGES], captions)
  folder = run_dir / "images"
  folder.mkdir(exist_ok=True)
  Image.fromarray(sheet).save(folder / f"eval_{number:05d}.png")
  sink.image("eval/samples", sheet, number)
  return result.row


def _save_rollout(run_dir, epoch, rolled, credit):
  """Keeps one epoch's rewards along its trajectories, for the report."""
  folder = run_dir / "rollouts"
  folder.mkdir(exist_ok=True)
  np.savez_compressed(
    folder / f"epoch_{epoch:05d}.npz",
    completion_reward=rolled.completion_reward,
    is_turning_point=np.asarray(credit.is_turning_point),
    step_reward=np.asarray(credit.reward),
    prompts=np.asarray([p.text for p in rolled.prompts]),
    images=rolled.images[:64],
  )


def _shown(row):
  return ", ".join(
    f"{v:.3f}" for k, v in row.items() if k.startswith("reward/") and k.endswith("mean")
  )
