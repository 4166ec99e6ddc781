"""Opens what a run has learned, or a base model, to sample from; writes nothing."""

from collections.abc import Sequence
import dataclasses
import fnmatch
import logging
import os
from typing import Any, NamedTuple
import warnings

import jax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.config import bridge
from tpgrpo_jax.models import lora
from tpgrpo_jax.reporting import history
from tpgrpo_jax.runs import best, checkpoint
from tpgrpo_jax.training import build, losses
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import state as state_lib

log = logging.getLogger(__name__)


class Opened(NamedTuple):
  """A model with its weights on the mesh.

  Attributes:
    config: of the run or the recipe.
    mesh: over the devices that are here.
    model: functions and the weights that never change.
    params: what sampling takes, as of Model.params.
    name: what it is, for people.
  """

  config: config_lib.Config
  mesh: jax.sharding.Mesh
  model: build.Model
  params: Any
  name: str


def choose_config(run_dir: str | None, recipe: Any) -> config_lib.Config:
  """The config of --run or of --config.

  Args:
    run_dir: of a run, or empty.
    recipe: a ConfigDict, or None.

  Raises:
    ValueError: both or neither are given, or the config cannot be read.
  """
  if run_dir and recipe is not None:
    asked = config_lib.from_config_dict(config_lib.Config, recipe)
    try:
      own = history.load_run_config(run_dir)
    except ValueError:
      own = None
    if (
      own and asked.run.dir == own.run.dir
    ):  # its own config with --config.x=y (reporting.run_recipe)
      _check_weights(own, asked)
      return asked
  if bool(run_dir) == (recipe is not None):
    given = "both are" if run_dir else "neither is"
    raise ValueError(
      f"--run, --config: {given} given, must be exactly one. Use --run RUN_DIR for a trained "
      "model, --config RECIPE.py for the base model that a recipe starts from."
    )
  if run_dir:
    # How processes meet is a matter of the command that starts them, not of the run.
    return dataclasses.replace(
      history.load_run_config(run_dir), distributed=config_lib.Distributed()
    )
  return config_lib.from_config_dict(config_lib.Config, recipe)


_OF_WEIGHTS = ("model.variant", "model.path", "lora.*")  # fields that say which weights a run has


def _check_weights(own, asked):
  """Raises ValueError where --config.x=y changes what a run's weights are."""
  old, new = (bridge.flatten(dataclasses.asdict(config)) for config in (own, asked))
  for name, value in new.items():
    if old.get(name) != value and any(fnmatch.fnmatchcase(name, p) for p in _OF_WEIGHTS):
      raise ValueError(
        f"--config.{name}={value!r}: the run has {old.get(name)!r}, and its weights belong to that. Leave "
        "it out; fields that do not change the weights may be set."
      )


def open_model(
  config: config_lib.Config,
  run_dir: str | os.PathLike[str] | None = None,
  *,
  prompts: Sequence[types.Prompt | str] | None = None,
  weights: str = "ema",
  strength: float = 1.0,
  epoch: int | None = None,
) -> Opened:
  """Opens the base model of a config, or the weights of a run's newest checkpoint.

  Args:
    config: of the run or of the recipe.
    run_dir: of a run, which may still be training; empty for the base model.
    prompts: as of `build.build_model`.
    weights: of a run, a name of WEIGHTS.
    strength: base + strength (learned - base): 1 is what was learned, 0 the model without it.
    epoch: of a run, the checkpoint after so many; None is the newest.

  Raises:
    ValueError: a run without a finished checkpoint, or weights that cannot be opened.
  """
  if not run_dir:
    if weights != "ema" or strength != 1.0 or epoch is not None:
      shown = "" if epoch is None else f", --epoch={epoch}"
      raise ValueError(
        f"--weights={weights}, --strength={strength}{shown}: are of a run. Give --run RUN_DIR."
      )
    mesh = mesh_lib.make_mesh(config.mesh)
    model = build.build_model(config, mesh, prompts)
    name = f"base model of {config.model.path or config.model.variant}"
    name += f" with {config.lora.path}" if config.lora.path else ""
    return Opened(config, mesh, model, model.params(model.trainable), name)
  if weights == "best" and epoch is not None:
    raise ValueError(f"--epoch={epoch}: the best weights have an epoch of their own. Leave it out.")
  try:
    checkpoints = checkpoint.RunCheckpoints(run_dir, read_only=True)
  except ValueError as error:
    raise ValueError(_without_checkpoint(config, run_dir)) from error
  with checkpoints:
    if checkpoints.latest() is None:
      raise ValueError(_without_checkpoint(config, run_dir))
    mesh = mesh_here(config)
    # The checkpoint holds the adapters: the file that the run began from need not be there.
    fresh = dataclasses.replace(config, lora=dataclasses.replace(config.lora, path=""))
    model = build.build_model(fresh, mesh, prompts)
    optimizer = state_lib.make_optimizer(config.optimizer)
    objective = losses.OBJECTIVES[config.loss.objective]
    abstract = state_lib.abstract_state(
      model.trainable, optimizer, mesh, keeps_old=objective.keeps_old
    )
    try:
      state, extra = checkpoints.restore(abstract, epoch)
    except ValueError as error:
      if epoch is None or epoch in checkpoints.steps():
        raise
      raise ValueError(
        f"--epoch={epoch}: the run has checkpoints after {checkpoints.steps()}. checkpoint.keep and "
        "checkpoint.keep_every say which are kept."
      ) from error
  for part, identity in model.identity.items():
    if extra.get(part, identity) != identity:
      raise ValueError(
        f"model.path={config.model.path!r}: its files ({part}) have changed since the run in {run_dir} "
        "began, and what it learned belongs to the old ones. Bring them back."
      )
  updates = int(state.update)
  if weights == "ema" and updates < config.ema.every:
    warnings.warn(
      f"ema.every={config.ema.every}: the run has made {updates} updates, so its EMA weights are still the "
      "first ones. As the last update left them: export --weights last.",
      stacklevel=2,
    )
  trainable, epoch = _chosen(weights, state, extra, run_dir, abstract)
  name = f"{os.fspath(run_dir)} after epoch {epoch}, {WEIGHTS[weights]} weights"
  if strength != 1.0:
    trainable = _at_strength(config, model.trainable, trainable, strength)
    name += f" at strength {strength}"
  return Opened(config, mesh, model, model.params(trainable), name)


WEIGHTS = {"ema": "EMA", "last": "last", "best": "best"}
"""Name -> its word: the newest moving average; as the last update left them; those of the best evaluation."""


def _chosen(weights, state, extra, run_dir, abstract):
  """(trainable weights, epochs that made them)."""
  if weights != "best":
    return (state.ema if weights == "ema" else state.trainable), extra["step"]
  try:
    trainable, found = best.load(run_dir, abstract.ema)
  except ValueError as error:
    raise ValueError(
      f"--run={os.fspath(run_dir)!r}: {error} A run keeps them at its evaluations, unless "
      "checkpoint.best=''. The newest: --weights ema."
    ) from error
  return trainable, found["step"]


def _at_strength(config, base, learned, strength):
  """base + strength (learned - base); of adapters the base is the model without them."""
  if config.lora.rank:
    return lora.scale(learned, strength)
  return jax.tree.map(lambda b, w: b + strength * (w - b), base, learned)


def _without_checkpoint(config, run_dir):
  return (
    f"--run={os.fspath(run_dir)!r}: has no finished checkpoint. The run saves one every "
    f"checkpoint.every={config.checkpoint.every} epochs and after the last: wait for it, or look at "
    "the base model with --config RECIPE.py."
  )


def mesh_here(config: config_lib.Config) -> jax.sharding.Mesh:
  """The run's own mesh, or data parallel over what is here when it was trained on other machines."""
  try:
    return mesh_lib.make_mesh(config.mesh)
  except ValueError:
    log.info("the run's mesh %s does not fit %d devices", config.mesh, jax.device_count())
    return mesh_lib.make_mesh(config_lib.Mesh())
