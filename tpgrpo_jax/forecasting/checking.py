"""A run tried before it is started: all is opened and counted, and nothing written into its folder."""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.cost import flops, hardware
from tpgrpo_jax.cost.hardware import GIB
from tpgrpo_jax.forecasting import forecast, lowering
from tpgrpo_jax.models import hf
from tpgrpo_jax.runs import boards, checkpoint, processes, run_folder
from tpgrpo_jax.training import announcement, evaluation, loop, notices
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import session as session_lib

GRAY = 128  # of the picture that the rewards are shown


def check(config: config_lib.Config) -> Iterator[str]:
  """Says, line by line, what `loop.train` would do with this config.

  Caches of prompts and compiled programs are filled. Servers of rewards are asked who they are, as at every
  start.

  Raises:
    ValueError: a config that cannot run, or a run folder that is not its own.
    RewardError: a reward that does not answer, or not with a number.
  """
  config = config_lib.name_run(config)
  with run_folder.named_errors(config.run.dir), jax.enable_x64(False):
    boards.check(config.log)
    totals = _finished(config)
    done = totals.get("step", 0)
    yield announcement.start(config)
    if totals:
      yield f"{config.run.dir}: goes on after epoch {done}"
    session = session_lib.open_session(config)
    session_lib.check_files(session, totals)
    session.old_scores.load(config.run.dir)
    yield notices.opened(config, session.model, session.method)
    with jax.set_mesh(session.mesh):
      yield from _scores(session)
    yield from _forecast(session, done)
    yield "nothing was started: that does the same command without --check"


def _finished(config) -> dict[str, Any]:
  """What the run's newest checkpoint says of it; {} where there is none."""
  run_dir = config.run.dir
  run_folder.check_free(run_dir)
  run_folder.check_config(run_dir, config)
  if not (epath.Path(run_dir) / "checkpoints").exists():
    return {}
  with checkpoint.RunCheckpoints(run_dir, read_only=True) as checkpoints:
    newest = checkpoints.latest()
    run_folder.check_length(run_dir, config.train.epochs, newest)
    return {} if newest is None else checkpoints.extra()


def _scores(session):
  """One line of what the rewards say of one picture; one more of those that only evaluations report."""
  asked = {"rewards": session.reward_fn}
  if session.reported is not session.reward_fn:
    asked["rewards of evaluations"] = session.reported
  prompt = session.train_prompts[0]
  for name, reward_fn in asked.items():
    began = time.perf_counter()
    scores, shape = score_gray(session, reward_fn, prompt)
    yield (
      f"{name}, of a gray picture of {shape[1]} x {shape[0]} for {prompt.text!r}: "
      f"{evaluation.named(scores)}, in {time.perf_counter() - began:.1f} s"
    )


def score_gray(
  session: session_lib.Session, reward_fn: Any, prompt: types.Prompt
) -> tuple[dict[str, float], tuple[int, int]]:
  """(label -> score, (H, W)) of a gray picture, or of latents of zeros for rewards of latents.

  Args:
    session: of the run.
    reward_fn: as its `reward_fn`.
    prompt: of the picture.
  """
  model, mesh = session.model, session.mesh
  prompts = [prompt] * mesh_lib.batch_shards(mesh)  # as many as every mesh can divide
  latents = np.zeros((len(prompts), *model.pipeline.latent_shape), np.float32)
  sample = jax.ShapeDtypeStruct((1, *latents.shape[1:]), jnp.float32)
  height, width, _ = jax.eval_shape(model.pipeline.decode, model.pipeline.decoder, sample).shape[1:]
  condition = method_lib.positive(method_lib.build_condition(session.config, model, prompts))
  watched = evaluation.Watched(reward_fn)
  placed = processes.put_batch(mesh, (latents, condition))
  watched.look(*placed)
  images = np.full((len(prompts), height, width, 3), GRAY, np.uint8)
  shown = model.pipeline.show(prompts)
  scores, _ = evaluation.score(reward_fn, images, shown, looked=watched.scores(len(prompts)))
  return {label: float(each[0]) for label, each in scores.items()}, (height, width)


def _forecast(session, done):
  """Lines of FLOPs, memory and least time, from shapes alone."""
  config, is_known = local_config(session.config), session.old_scores.limit is None
  if session.old_scores.since is not None:  # the run has found it out
    own = dataclasses.replace(config.loss, old_log_prob="update")
    config, is_known = dataclasses.replace(config, loss=own), True
  devices: Sequence[Any] = list(session.mesh.devices.flat)
  chip = hardware.find_chip(devices[0])
  found = forecast.forecast(config, devices, chip=chip, margin=0.0, compiles=False)
  each = ", ".join(f"{phase.name} {phase.runs * phase.flops:.3g}" for phase in found.phases)
  last = config.train.epochs
  left = range(done, last)
  to_come = range(done + 1 if done else 0, last + 1)
  evaluations = sum(loop.is_due(config, epoch) for epoch in to_come)
  judged = len(session.unseen) * (3 if config.checkpoint.best else 2)
  pictures = evaluations * len(session.held_out) + judged
  picture = picture_flops(config, session.mesh)
  total = len(left) * found.flops + pictures * picture
  yield f"an epoch: {found.flops:.3g} FLOPs ({each})"
  others = config.train.updates_per_epoch - 1
  if others and not is_known:  # before the first update
    with jax.set_mesh(session.mesh):
      more = others * forecast.scoring_flops(lowering.open_plan(config, session.mesh))
    yield (
      f"{more:.3g} FLOPs more an epoch, if loss.old_log_prob='auto' finds that rollout and update round "
      "differently"
    )
  yield (
    f"the run: {len(left)} epochs, {evaluations} evaluations of {len(session.held_out)} held-out prompts and "
    f"{judged} pictures that judge it: {total:.3g} FLOPs"
  )
  uncounted = sorted({name for phase in found.phases for name in phase.uncounted})
  if uncounted:
    yield f"FLOPs not counted: those of {', '.join(uncounted)}"
  yield f"rewards: {found.rewards}"
  yield _memory(found)
  if found.seconds is None or chip is None:
    yield f"least time: not known, as the peak of these devices ({devices[0].device_kind}) is not"
  else:
    painting = pictures * picture / (len(devices) * chip.flops)
    run = len(left) * found.seconds + painting
    yield (
      f"least time, at the devices' peak and without rewards of the host: an epoch {found.seconds:.3g} s, "
      f"the run {run / 3600:.3g} h"
    )


def _memory(found) -> str:
  """What is known without compiling; raises ValueError where even that does not fit."""
  needs = f"memory of a device: {found.total / GIB:.2f} GiB of weights, states and batches"
  rest = "what the programs need meanwhile says tpgrpo aot, which compiles them"
  if found.room is None:
    return f"{needs}, and {rest}; how much these devices have is not known"
  if found.total > found.room:
    raise ValueError(
      f"mesh.fsdp={found.mesh['fsdp']}, train.microbatch={found.microbatch}: need {found.total / GIB:.2f} "
      f"GiB of each device, which has {found.room / GIB:.2f}. tpgrpo aot chooses a mesh and a microbatch."
    )
  return f"{needs}, of {found.room / GIB:.2f}; {rest}"


def picture_flops(config: config_lib.Config, mesh: jax.sharding.Mesh) -> float:
  """Of one picture of an evaluation: eval.num_steps evaluations of the model, and its decoding.

  Args:
    config: with a model.path that is a folder, or known to `lowering.load_sizes`.
    mesh: of the run.
  """
  model = lowering.abstract_model(config, mesh)
  count = mesh_lib.batch_shards(mesh)
  condition = method_lib.build_condition(config, model, ["A"] * count)
  x = jax.ShapeDtypeStruct((count, *model.pipeline.latent_shape), jnp.float32)
  sigma = jax.ShapeDtypeStruct((count,), jnp.float32)
  velocity_fn = method_lib.guide(config, model.velocity_fn)
  with jax.set_mesh(mesh):
    step = flops.count(velocity_fn, model.params(model.trainable), x, sigma, condition).total
    decoding = flops.count(model.pipeline.decode, model.pipeline.decoder, x).total
  return (config.eval.num_steps * step + decoding) / count


def local_config(config: config_lib.Config) -> config_lib.Config:
  """The config of a model that is open, with the folder that a hub id was fetched to in its place."""
  path = config.model.path
  if not path or pathlib.Path(path).is_dir():
    return config
  folder = hf.resolve(path, subfolder="transformer", weights=False)
  root = folder.parent if folder.name == "transformer" else folder
  return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(root)))
