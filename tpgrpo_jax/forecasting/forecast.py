"""What a run would take on a topology: its programs compiled for it, and none of them run."""

from collections.abc import Sequence
import dataclasses
import json
import math
import re
import sys
import time
from typing import Any

import jax
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.cost import collectives, cycles, flops, hardware
from tpgrpo_jax.cost.hardware import GIB
from tpgrpo_jax.forecasting import lowering, reward_program
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import skipped, step


@dataclasses.dataclass(frozen=True)
class Phase:
  """One compiled program; bytes are those of one device.

  Attributes:
    name: "rollout" (sampler, completions and decoding are one program here), "reward ..." (one of those
      on the devices), "update" or "old_log_prob" (the update's program, forward alone).
    runs: how often it runs in an epoch.
    arguments: bytes of weights, states and batch that it takes.
    results: bytes that it gives, but for those that take the place of arguments.
    temporaries: bytes that it needs meanwhile.
    held: bytes of the run beside it: what other programs of the epoch need or have left.
    flops: of all devices, of one run.
    uncounted: what `flops.count` could not count, and how often.
    traffic: of one run; None where it is not known.
    bound: of one run; None on devices of unknown figures.
    compile_seconds: that lowering and compiling took.
    refused: what the compiler said of a program that the memory has no room for; what it receives and
      the split of its bytes are then not known.
    compiled: False leaves results, temporaries and traffic 0, as not known; they are shown as "-".
    schedule: of one run, as a TPU's compiler reckons; None of other devices.
  """

  name: str
  runs: int
  arguments: int
  results: int
  temporaries: int
  held: int
  flops: float
  uncounted: dict[str, int]
  traffic: collectives.Traffic | None
  bound: hardware.Bound | None
  compile_seconds: float
  refused: str = ""
  compiled: bool = True
  schedule: cycles.Schedule | None = None

  @property
  def total(self) -> int:
    """Bytes of one device while it runs."""
    return self.arguments + self.results + self.temporaries + self.held


@dataclasses.dataclass(frozen=True)
class Forecast:
  """The phases of an epoch on one mesh.

  Attributes:
    mesh: axis -> size.
    microbatch: samples.
    phases: of `Phase`.
    rewards: what is known of the rewards, in words.
    room: bytes of one device that may be used; None where they are unknown.
  """

  mesh: dict[str, int]
  microbatch: int
  phases: tuple[Phase, ...]
  rewards: str
  room: float | None

  @property
  def total(self) -> int:
    """Bytes of one device in the phase that takes most."""
    return max(phase.total for phase in self.phases)

  @property
  def fits(self) -> bool | None:
    """Whether every phase leaves the margin; None where the memory is unknown."""
    if any(phase.refused for phase in self.phases):
      return False
    if self.room is None or not (self.total > self.room or all(p.compiled for p in self.phases)):
      return None
    return self.total <= self.room

  @property
  def flops(self) -> float:
    """Of an epoch, all devices together."""
    return sum(phase.runs * phase.flops for phase in self.phases)

  @property
  def seconds(self) -> float | None:
    """That an epoch takes at the least; None on devices of unknown figures."""
    bounds = [phase.bound and phase.runs * phase.bound.seconds for phase in self.phases]
    known = [seconds for seconds in bounds if seconds is not None]
    return sum(known) if len(known) == len(bounds) else None


def forecast(
  config: config_lib.Config,
  devices: Sequence[Any],
  *,
  chip: hardware.Chip | None,
  margin: float,
  compiles: bool = True,
) -> Forecast:
  """Compiles the programs of an epoch for the devices, which need not exist.

  Args:
    config: of the run.
    devices: as of `hardware.open_topology`.
    chip: their figures, where they are known.
    margin: share of the memory that must stay free, for what the runtime and the allocator take.
    compiles: False counts what shapes alone tell: arguments, what is held, FLOPs; seconds of the latter.

  Raises:
    ValueError: a mesh that does not divide devices or microbatch, a model of unknown sizes.
  """
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  plan = lowering.open_plan(config, mesh)
  with jax.set_mesh(mesh):
    kw = dict(chip=chip, compiles=compiles)
    update = _update(plan, **kw)
    scores = _old_scores(plan, update, chip)
    phases = (_rollout(plan, **kw), *_reward_phases(plan, **kw), *scores, update)
  room = None if chip is None else chip.hbm * (1 - margin)
  return Forecast(dict(mesh.shape), config.train.microbatch, phases, _rewards(config), room)


def _rollout(plan, **options):
  read = plan.passes * lowering.bytes_read_per_pass(_weights(plan))
  function, args, kwargs = lowering.rollout_program(plan)
  left_out = skipped.evaluations(plan.config, plan.method) * plan.config.train.microbatch
  if left_out:
    latents = (plan.states, *plan.model.pipeline.latent_shape)
    left_out *= skipped.flops_of_one(plan.config, plan.method, args[0], args[4], latents)
  options |= {"runs": plan.microbatches, "read": read, "left_out": left_out}
  return _compile("rollout", plan, (function, args, kwargs), **options)


def _update(plan, **options):
  """A pair of microbatch and step reads all weights forward and backward, and once more for remat."""
  train = plan.config.train
  parts = train.microbatch // (train.update_microbatch or train.microbatch)
  pairs = plan.microbatches * parts * plan.method.window // train.updates_per_epoch
  passes = pairs * (2 if plan.config.model.remat == "none" else 3)
  read = passes * lowering.bytes_read_per_pass(_weights(plan))
  program = lowering.update_program(plan)
  return _compile("update", plan, program, runs=train.updates_per_epoch, read=read, **options)


def _old_scores(plan, update, chip):
  """The update's program once more for each update after the first, forward alone, where it scores itself."""
  others = plan.config.train.updates_per_epoch - 1
  if lowering.scores_itself(plan.config) and others:
    work = scoring_flops(plan)
    bound = chip and hardware.bound(
      chip, devices=plan.mesh.size, flops=work, memory_bytes=update.arguments, link_bytes=0
    )
    yield dataclasses.replace(
      update,
      name="old_log_prob",
      runs=others,
      flops=work,
      traffic=None,  # not known apart from that of the gradients
      bound=bound,
      schedule=None,
      compile_seconds=0.0,
    )


def scoring_flops(plan: lowering.Plan) -> float:
  """Operations of one update's old log-probs by the update's own program."""
  _, args, _ = lowering.update_program(plan)
  return flops.count(step.make_scores(plan.config, plan.method), *args).total


def _compile(name, plan, program, *, runs, read, chip, compiles, left_out=0.0):
  function, args, kwargs = program
  given = lowering.bytes_per_device((args, kwargs))
  began, refused = time.perf_counter(), ""
  arguments, results, temporaries = given, 0, 0
  traffic, reckoned = collectives.Traffic({}, {}, 0), None
  if compiles:
    print(f"compiling: {name} ...", file=sys.stderr, flush=True)
    lowered = function.lower(*args, **kwargs)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      refused, temporaries = read_refusal(error, arguments)
    else:
      memory = compiled.memory_analysis()
      arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
      results = memory.output_size_in_bytes - memory.alias_size_in_bytes
      text = compiled.as_text()
      traffic = collectives.read_traffic(text, devices=plan.mesh.size)
      reckoned = chip and cycles.read_schedule(text, chip, devices=plan.mesh.size)
  took = time.perf_counter() - began
  work = flops.count(function, *args, **kwargs)
  done = work.total - left_out
  bound = chip and hardware.bound(
    chip,
    devices=plan.mesh.size,
    flops=done,
    memory_bytes=max(read, arguments + results),
    link_bytes=traffic.total,
  )
  return Phase(
    name,
    runs,
    arguments,
    results,
    temporaries,
    held_bytes(plan, name) + max(0, given - arguments),  # and what it is given but does not read
    done,
    work.uncounted,
    traffic,
    bound,
    took,
    refused,
    compiles,
    reckoned,
  )


def read_refusal(error: Exception, arguments: int) -> tuple[str, int]:
  """(what the compiler says, temporaries) of a program that it refuses for want of memory."""
  used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+[KMGT]) hbm", str(error))
  if "RESOURCE_EXHAUSTED" not in str(error) or not used:
    raise error
  size = float(used[1]) * 2 ** (10 * ("KMGT".index(used[2]) + 1))
  return used[0], max(0, round(size) - arguments)


def held_bytes(plan: lowering.Plan, phase: str) -> int:
  """Bytes on one device that the run keeps beside a phase's own arguments.

  Beside a rollout: EMA and optimizer, the microbatches already sampled, the images of one whose rewards
  are not done. Beside an update: the decoders, the batches of the other updates. Beside a reward: all
  weights and states but its own, and all microbatches. Beside rollout and update: the rewards' weights.
  """
  count = lowering.bytes_per_device
  piece = count((lowering.transitions(plan), lowering.condition(plan)))
  scorers = {
    f"reward {options['make']}": count(reward_program.program(plan, options)[1][0])
    for options in reward_program.on_devices(plan.config)[0]
  }
  if phase in scorers:
    params = plan.model.params(plan.state)
    others = sum(scorers.values()) - scorers[phase]
    return count((params, _extra(plan))) + plan.microbatches * piece + others
  if phase == "rollout":
    state = dataclasses.replace(plan.state, trainable={})
    images = _image_bytes(plan)
    pieces = (plan.microbatches - 1) * piece
    return count((state, _extra(plan))) + pieces + images + sum(scorers.values())
  around = plan.model.pipeline
  decoders = count((around.decoder, around.completion_decoder))
  batch = lowering.update_program(plan)[1][3]
  each = count((batch.transitions, batch.conditions))
  if plan.config.train.updates_by == "steps":  # they have the rest together
    each -= count((batch.transitions.final, batch.conditions))
  others = (plan.config.train.updates_per_epoch - 1) * each
  return decoders + others + sum(scorers.values())


def _extra(plan):
  """Weights of the reference that are not the model's own."""
  return plan.reference.get("trainable", {}) if plan.reference else {}


def _image_bytes(plan):
  """What rewards of one microbatch look at, on one device: uint8 images, and float32 latents."""
  latents = plan.latents if rewards.reads(plan.config.rewards).latents else 0
  each = 4 * latents * math.prod(plan.model.pipeline.latent_shape)
  return (each + plan.images * math.prod(plan.image_shape)) // mesh_lib.batch_shards(plan.mesh)


def _weights(plan):
  return (plan.model.frozen, plan.model.trainable)


def _rewards(config):
  """What the phases do not say of the rewards."""
  able, unable = reward_program.on_devices(config)
  if unable:
    return f"{', '.join(unable)}: on the devices, NOT counted here (sizes not known: weights, time)"
  if not able:
    return "run on the host: no device memory, no device time"
  return "on the devices, as above" + (", the rest on the host" * (len(able) < len(config.rewards)))


def _reward_phases(plan, **options):
  """Each reward of the devices reads its weights once for every chunk of images; once is counted."""
  for reward in reward_program.on_devices(plan.config)[0]:
    program = reward_program.program(plan, reward)
    name = f"reward {reward['make']}"
    read = lowering.bytes_read_per_pass(program[1][0])
    yield _compile(name, plan, program, runs=plan.microbatches, read=read, **options)


def render(found: Forecast) -> str:
  """The forecast as a table."""
  axes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
  lines = [
    f"mesh {axes}, microbatch {found.microbatch}",
    f"{'':18}{'runs':>6}{'GiB on a device:':>18}{'arguments':>11}{'results':>9}{'temporary':>11}{'held':>7}"
    f"{'all':>8}{'FLOPs':>11}{'received':>12}{'at best':>11}  compiled in",
  ]
  gib = lambda n, width: f"{'-':>{width}}" if n is None else f"{n / GIB:{width}.2f}"
  for phase in found.phases:
    traffic = phase.traffic if phase.compiled else None
    results, temporaries = (
      n if phase.compiled else None for n in (phase.results, phase.temporaries)
    )
    took = f"{phase.compile_seconds:.0f} s" if traffic else "-"
    best = "-" if phase.bound is None else f"{phase.bound.seconds:.3g} s"
    lines.append(
      f"{phase.name:18}{phase.runs:6}{'':18}{gib(phase.arguments, 11)}{gib(results, 9)}"
      f"{gib(temporaries, 11)}{gib(phase.held, 7)}{gib(phase.total, 8)}"
      f"{phase.flops:11.3g}{gib(traffic and traffic.total, 8)} GiB{best:>11}  {took}"
    )
    if phase.bound:
      each = {
        k: f"{v:.3g} s"
        for k, v in dataclasses.asdict(phase.bound).items()
        if traffic or k != "links"
      }
      lines.append(f"{'':10}at best by {', '.join(f'{k} {v}' for k, v in each.items())}")
    if phase.schedule:
      lines += [f"{'':10}{line}" for line in cycles.render(phase.schedule)]
    if phase.refused:
      lines.append(f"{'':10}refused by the compiler: {phase.refused}; received bytes not known")
    if traffic and traffic.unknown_loops:
      lines.append(f"{'':10}{traffic.unknown_loops} loops of unknown length received once")
    if phase.uncounted:
      lines.append(f"{'':10}FLOPs not counted: {phase.uncounted}")
  lines.append(f"{'rewards':10}{found.rewards}")
  best = "" if found.seconds is None else f", at best {found.seconds:.3g} s"
  lines.append(f"an epoch: {found.flops:.3g} FLOPs{best}")
  if not all(phase.compiled for phase in found.phases):
    lines.append(
      "not compiled: results, temporaries and received bytes are not known, and not in it"
    )
  if found.room is None:
    lines.append("memory of these devices is not known: not said whether it fits")
  else:
    verdict = {True: "fits", False: "DOES NOT FIT", None: "may fit"}[found.fits]
    lines.append(f"{verdict}: {found.total / GIB:.2f} of {found.room / GIB:.2f} GiB")
  return "\n".join(lines)


def to_json(found: Forecast) -> dict[str, Any]:
  """The forecast as what JSON can hold."""
  row = dataclasses.asdict(found)
  for phase, entry in zip(found.phases, row["phases"]):
    entry |= {"total": phase.total}
    if phase.traffic:
      entry["traffic"] |= {"total": phase.traffic.total}
    else:
      entry["compile_seconds"] = None
    if not phase.compiled:
      entry |= {"results": None, "temporaries": None, "traffic": None, "compile_seconds": None}
    if phase.bound:
      entry["bound"] |= {"seconds": phase.bound.seconds}
  row |= {"total": found.total, "fits": found.fits, "flops": found.flops, "seconds": found.seconds}
  return json.loads(json.dumps(row, default=np.ndarray.tolist))
