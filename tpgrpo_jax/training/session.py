"""A run before it runs: everything that stays the same from epoch to epoch."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards, types
from tpgrpo_jax.cost import utilisation
from tpgrpo_jax.data import groups, survey
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.training import (
  build,
  evaluation,
  judging,
  losses,
  old_scores,
  progress,
  rollout,
  step,
)
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib


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
    rescoring_step: likewise, with old log-probs of its own; compiled where they are asked for.
    old_scores: which of the two an epoch takes.
    reward_fn: weighted sum.
    reported: weighted sum of what evaluations report.
    held_out: prompts of an evaluation.
    unseen: prompts that judge the run at its end.
    evaluate: params -> Evaluation, while the run goes on.
    evaluate_unseen: the same on the prompts that judge it; None where there are none.
    meter: of the operations of rollout and update.
    objective: what the state holds and which weights sample.
  """

  config: config_lib.Config
  mesh: jax.sharding.Mesh
  model: build.Model
  method: method_lib.Method
  reference: Any
  train_prompts: Any
  rollout_fn: Any
  credit_fn: Any
  train_step: Any
  rescoring_step: Any
  old_scores: old_scores.OldScores
  reward_fn: Any
  reported: Any
  held_out: list[types.Prompt]
  unseen: list[types.Prompt]
  evaluate: Any
  evaluate_unseen: Any
  meter: utilisation.Meter
  objective: losses.Objective

  def sampling_weights(self, state: state_lib.TrainState) -> Any:
    """The trainable weights that sample an epoch."""
    return state.old if self.objective.samples_with_old else state.trainable

  def move_old(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """The state after an epoch; it is used up where there is an old policy."""
    if not self.objective.keeps_old:
      return state
    return _move_old(state, self.config.loss.old_decay)


def open_session(
  config: config_lib.Config,
  announce: Callable[[build.Model, method_lib.Method], None] = lambda model, method: None,
) -> Session:
  """Builds all functions of a run and loads its data; nothing is compiled yet.

  Args:
    config: of the run.
    announce: is called as soon as the run's sizes are known, with a model of shapes.

  Raises:
    ValueError: whatever in the config does not fit the devices, the weights or the files.
  """
  mesh = mesh_lib.make_mesh(config.mesh)
  mesh_lib.check_microbatch(config, mesh)
  method_lib.bind_credit(config)  # a user's own functions are tried before weights are read
  losses.check_own(config)
  drafted = build.draft(config)
  shapes = build.drafted_model(config, drafted)
  shards = mesh_lib.batch_shards(mesh)
  announce(shapes, method_lib.build_method(config, shapes, shards=shards))
  reward_fn = make_rewards(config, mesh, config.rewards)
  source = config.prompts
  load = functools.partial(
    prompts_lib.load_prompts, source.name, source.path, data_dir=source.cache or None
  )
  all_held_out = load("test")
  held_out = [all_held_out[i] for i in range(min(config.eval.prompts, len(all_held_out)))]
  unseen = judging.choose_prompts(all_held_out, config.eval)
  train_prompts = load("train")
  visited = [train_prompts[i] for i in _visited(config, len(train_prompts))]
  asked = [*held_out, *unseen, *visited]
  for line in survey.survey(visited, [*held_out, *unseen]):
    progress.say(f"note: {line}.")
  reward_fn.check(asked)  # pyright: ignore[reportFunctionMemberAccess]
  model = build.build_model(config, mesh, asked, drafted)
  reported = build_eval_rewards(config, mesh, reward_fn)
  for function in (reward_fn, reported):
    evaluation.check_model(function, model, asked[0])
  evaluate = functools.partial(evaluation.make_evaluate, config, model, mesh, reported)
  return Session(
    config=config,
    mesh=mesh,
    model=model,
    reference=_reference(config, model),
    train_prompts=train_prompts,
    reward_fn=reward_fn,
    reported=reported,
    held_out=held_out,
    unseen=list(unseen),
    evaluate=evaluate(held_out),
    evaluate_unseen=evaluate(unseen, judging.noise_seed(unseen, held_out)) if unseen else None,
    objective=losses.OBJECTIVES[config.loss.objective],
    old_scores=old_scores.OldScores(config),
    **_bind(config, model, mesh),
  )


def _bind(config, model, mesh, noise_levels=()) -> dict[str, Any]:
  """The functions of the method, as fields of a Session."""
  build_method = functools.partial(
    method_lib.build_method, config, shards=mesh_lib.batch_shards(mesh), noise_levels=noise_levels
  )
  method = build_method(model)
  rollout_fn = rollout.make_rollout_fn(config, model, method)
  train_step = counted = step.make_train_step(config, method)
  rescoring_step, programs = None, {}
  if losses.OBJECTIVES[config.loss.objective].has_ratio:
    rescoring_step = step.make_rescoring_step(config, method)
    programs["old_log_prob"] = step.make_scores(config, method)
  if (plain := build.without_remat(config, model)) is not model:
    counted = step.make_train_step(config, build_method(plain))
  return dict(
    method=method,
    rollout_fn=rollout_fn,
    credit_fn=step.make_credit_fn(config, method),
    train_step=train_step,
    rescoring_step=rescoring_step,
    meter=utilisation.Meter(programs | {"rollout": rollout_fn, "update": counted}),
  )


def with_noise_levels(session: Session, noise_levels: tuple[float, ...]) -> Session:
  """The session with these levels, one for each step of the window, in place of the config's."""
  bound = _bind(session.config, session.model, session.mesh, noise_levels)
  return dataclasses.replace(session, **bound)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def _move_old(state, decay):
  return state_lib.move_old(state, decay)


def epoch_indices(config: config_lib.Config, epoch: int, dataset_size: int) -> np.ndarray:
  """Which training prompts an epoch takes."""
  return groups.epoch_indices(
    epoch,
    seed=config.seed,
    dataset_size=dataset_size,
    prompts_per_epoch=config.train.prompts_per_epoch,
  )


def files_of(session: Session) -> dict[str, tuple[str, str]]:
  """Part -> (the field that names its files, a name of their content)."""
  config = session.config
  model = f"model.path={config.model.path!r}"
  prompts = (f"prompts.path={config.prompts.path!r}", session.train_prompts.identity)
  return {n: (model, name) for n, name in session.model.identity.items()} | {"prompts": prompts}


def check_files(session: Session, totals: Mapping[str, Any]) -> None:
  """Raises ValueError where a run that is resumed would go on with other files.

  Args:
    session: of the run.
    totals: as its newest checkpoint has them.
  """
  for name, (field, identity) in files_of(session).items():
    if totals.get(name, identity) != identity:
      raise ValueError(
        f"{field}: its files ({name}) have changed since the run in {session.config.run.dir} began. To "
        "resume it, bring them back; to train on the new ones, use another run.dir."
      )


def _visited(config, dataset_size):
  """Which training prompts the run will see, in order: those that must be embedded."""
  visited: set[int] = set()
  for epoch in range(config.train.epochs):
    if len(visited) == dataset_size:
      break
    visited.update(map(int, epoch_indices(config, epoch, dataset_size)))
  return sorted(visited)


def make_rewards(
  config: config_lib.Config, mesh: jax.sharding.Mesh, asked: Any
) -> rewards.CombinedRewardFn:
  """Rewards (as `config.rewards`) on the mesh, with the config's patience."""
  placement = mesh_lib.make_placement(mesh)
  return rewards.make_rewards(asked, placement=placement, **dataclasses.asdict(config.scoring))


def build_eval_rewards(
  config: config_lib.Config, mesh: jax.sharding.Mesh, reward_fn: Any = None
) -> rewards.CombinedRewardFn:
  """The rewards that evaluation reports: eval.rewards by name, or those of training."""
  if not config.eval.rewards:
    return reward_fn
  asked = {name: config.rewards.get(name, 1.0) for name in config.eval.rewards}
  return make_rewards(config, mesh, asked)


def _reference(config, model):
  if not config.loss.kl_coef:
    return {}
  if config.lora.rank:
    return {"frozen": model.frozen, "trainable": {}}
  return {"frozen": model.frozen, "trainable": jax.tree.map(jax.numpy.copy, model.trainable)}


def abstract_state(session: Session) -> state_lib.TrainState:
  """What a checkpoint of the run is restored into."""
  return state_lib.abstract_state(
    session.model.trainable,
    session.method.optimizer,
    session.mesh,
    keeps_old=session.objective.keeps_old,
  )


def init_state(session: Session) -> state_lib.TrainState:
  """The state before the first update, on the mesh."""
  create = functools.partial(
    state_lib.init_state,
    optimizer=session.method.optimizer,
    keeps_old=session.objective.keeps_old,
  )
  layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(session))
  return jax.jit(create, out_shardings=layout)(session.model.trainable)
