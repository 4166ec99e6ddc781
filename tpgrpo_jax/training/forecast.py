"""What a run would take on a topology: its programs compiled for it, and none of them run."""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import flops, rewards
from tpgrpo_jax.training import collectives, hardware, lowering
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training.hardware import GIB

MOST_SAMPLES = 8  # of a microbatch on one device; more gain nothing once the matrix units are full


@dataclasses.dataclass(frozen=True)
class Phase:
  """One compiled program; bytes are those of one device.

  Attributes:
    name: "rollout" (sampler, completions and decoding are one program here) or "update".
    runs: how often it runs in an epoch.
    arguments: bytes of weights, states and batch that it takes.
    results: bytes that it gives, but for those that take the place of arguments.
    temporaries: bytes that it needs meanwhile.
    held: bytes of the run beside it: what other programs of the epoch need or have left.
    flops: of all devices, of one run.
    uncounted: what `flops.count` could not count, and how often.
    traffic: of one run.
    bound: of one run; None on devices of unknown figures.
    compile_seconds: that lowering and compiling took.
  """

  name: str
  runs: int
  arguments: int
  results: int
  temporaries: int
  held: int
  flops: float
  uncounted: dict[str, int]
  traffic: collectives.Traffic
  bound: hardware.Bound | None
  compile_seconds: float

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
    return None if self.room is None else self.total <= self.room

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
) -> Forecast:
  """Compiles the programs of an epoch for the devices, which need not exist.

  Args:
    config: of the run.
    devices: as of `hardware.open_topology`.
    chip: their figures, where they are known.
    margin: share of the memory that must stay free, for what the runtime and the allocator take.

  Raises:
    ValueError: a mesh that does not divide devices or microbatch, a model of unknown sizes.
  """
  mesh = mesh_lib.make_mesh(config.mesh, devices)
  plan = lowering.open_plan(config, mesh)
  with jax.set_mesh(mesh):
    phases = (_rollout(plan, chip), _update(plan, chip))
  room = None if chip is None else chip.hbm * (1 - margin)
  return Forecast(dict(mesh.shape), config.train.microbatch, phases, _rewards(config), room)


def _rollout(plan, chip):
  read = plan.evaluations * lowering.bytes_read_per_pass(_weights(plan))
  program = lowering.rollout_program(plan)
  return _compile("rollout", plan, program, chip, runs=plan.microbatches, read=read)


def _update(plan, chip):
  """A pair of microbatch and step reads all weights forward and backward, and once more for remat."""
  train = plan.config.train
  pairs = plan.microbatches // train.updates_per_epoch * plan.method.window
  passes = pairs * (2 if plan.config.model.remat == "none" else 3)
  read = passes * lowering.bytes_read_per_pass(_weights(plan))
  program = lowering.update_program(plan)
  return _compile("update", plan, program, chip, runs=train.updates_per_epoch, read=read)


def _compile(name, plan, program, chip, *, runs, read):
  function, args, kwargs = program
  began = time.perf_counter()
  compiled = function.lower(*args, **kwargs).compile()
  took = time.perf_counter() - began
  memory = compiled.memory_analysis()
  work = flops.count(function, *args, **kwargs)
  traffic = collectives.read_traffic(compiled.as_text(), devices=plan.mesh.size)
  arguments = memory.argument_size_in_bytes
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  bound = chip and hardware.bound(
    chip,
    devices=plan.mesh.size,
    flops=work.total,
    memory_bytes=max(read, arguments + results),
    link_bytes=traffic.total,
  )
  return Phase(
    name,
    runs,
    arguments,
    results,
    memory.temp_size_in_bytes,
    held_bytes(plan, name),
    work.total,
    work.uncounted,
    traffic,
    bound,
    took,
  )


def held_bytes(plan: lowering.Plan, phase: str) -> int:
  """Bytes on one device that the run keeps beside a phase's own arguments.

  Beside a rollout: EMA and optimizer, the microbatches already sampled, the images of one whose rewards
  are not done. Beside an update: the decoder, the microbatches of the other updates, and what the
  update does not read of its own. The weights of rewards on the devices are not in it.
  """
  count = lowering.bytes_per_device
  piece = count((lowering.trajectory(plan), lowering.condition(plan)))
  if phase == "rollout":
    state = dataclasses.replace(plan.state, trainable={})
    images = _image_bytes(plan)
    return count((state, _extra(plan))) + (plan.microbatches - 1) * piece + images
  share = plan.microbatches // plan.config.train.updates_per_epoch
  unread = count((lowering.trajectory(plan).velocity, lowering.trajectory(plan).final))
  decoder = count(plan.model.pipeline.decoder)
  return decoder + (plan.microbatches - share) * piece + share * unread


def _extra(plan):
  """Weights of the reference that are not the model's own."""
  return plan.reference.get("trainable", {}) if plan.reference else {}


def _image_bytes(plan):
  """uint8 images of one microbatch, on one device."""
  height, width, _ = plan.model.pipeline.latent_shape
  states = 1 if plan.completions is None else plan.method.window + 1
  config, variant = plan.config, plan.config.model.variant
  scale = 1 if variant == "tiny" else 8
  samples = config.train.microbatch // mesh_lib.batch_shards(plan.mesh)
  return samples * states * height * width * scale**2 * 3


def _weights(plan):
  return (plan.model.frozen, plan.model.trainable)


def _rewards(config):
  names = {k: (v.get("make", k) if isinstance(v, dict) else k) for k, v in config.rewards.items()}
  on_devices = [name for name in names.values() if name in rewards.DEVICE_REWARDS]
  if not on_devices:
    return "run on the host: no device memory, no device time"
  return f"{', '.join(on_devices)}: on the devices, NOT counted here (weights, time)"


def choose(
  config: config_lib.Config, devices: Sequence[Any], measured: Forecast
) -> config_lib.Config | None:
  """The config with mesh and microbatch as this module would set them, by estimate; None if nothing fits.

  The least fsdp that fits (it costs collectives), then the largest microbatch, of at most MOST_SAMPLES on
  a device. Where the memory is unknown: the least fsdp. Arguments and what is held are counted exactly;
  temporaries are taken as proportional to the samples on a device, from what the compiler said for
  `measured`.
  """
  for candidate in candidates(config, len(devices)):
    mesh = mesh_lib.make_mesh(candidate.mesh, devices)
    estimate = _estimate(candidate, mesh, measured)
    if measured.room is None or estimate <= measured.room:
      return candidate
  return None


def confirm(
  config: config_lib.Config, devices: Sequence[Any], given: Forecast, **options: Any
) -> Forecast | None:
  """Compiles what `choose` chose, which may turn out not to fit; None if nothing fits by estimate."""
  chosen = choose(config, devices, given)
  if chosen is None:
    return None
  mesh = mesh_lib.make_mesh(chosen.mesh, devices)
  if dict(mesh.shape) == given.mesh and chosen.train.microbatch == given.microbatch:
    return given
  return forecast(chosen, devices, **options)


def candidates(config: config_lib.Config, devices: int) -> Iterator[config_lib.Config]:
  """Meshes of data and fsdp (powers of two), each with the microbatches that divide an update, best first."""
  train = config.train
  share = train.prompts_per_epoch * train.group_size // train.updates_per_epoch
  for fsdp in (2**i for i in range(devices.bit_length())):
    if devices % fsdp:
      continue
    for samples in range(MOST_SAMPLES, 0, -1):
      if share % (samples * devices) == 0:
        mesh = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp, tensor=1)
        sizes = dataclasses.replace(train, microbatch=samples * devices)
        yield dataclasses.replace(config, mesh=mesh, train=sizes)


def _estimate(config, mesh, measured):
  """Bytes of one device in the phase that takes most."""
  plan, totals = lowering.open_plan(config, mesh), []
  before = measured.microbatch / (measured.mesh["data"] * measured.mesh["fsdp"])
  ratio = config.train.microbatch / mesh_lib.batch_shards(mesh) / before
  for phase, program in zip(measured.phases, (lowering.rollout_program, lowering.update_program)):
    _, args, kwargs = program(plan)
    scaled = ratio * (phase.results + phase.temporaries)
    held = held_bytes(plan, phase.name)
    totals.append(lowering.bytes_per_device((args, kwargs)) + scaled + held)
  return max(totals)


def render(found: Forecast) -> str:
  """The forecast as a table."""
  axes = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
  lines = [
    f"mesh {axes}, microbatch {found.microbatch}",
    f"{'':10}{'runs':>6}{'GiB on a device:':>18}{'arguments':>11}{'results':>9}{'temporary':>11}{'held':>7}"
    f"{'all':>8}{'FLOPs':>10}{'received':>10}{'at best':>10}  compiled in",
  ]
  for phase in found.phases:
    gib = lambda n, width: f"{n / GIB:{width}.2f}"
    best = "-" if phase.bound is None else f"{phase.bound.seconds:.3g} s"
    lines.append(
      f"{phase.name:10}{phase.runs:6}{'':18}{gib(phase.arguments, 11)}{gib(phase.results, 9)}"
      f"{gib(phase.temporaries, 11)}{gib(phase.held, 7)}{gib(phase.total, 8)}{phase.flops:10.3g}"
      f"{gib(phase.traffic.total, 6)} GiB{best:>10}  {phase.compile_seconds:.0f} s"
    )
    if phase.bound:
      each = {k: f"{v:.3g} s" for k, v in dataclasses.asdict(phase.bound).items()}
      lines.append(f"{'':10}at best by {', '.join(f'{k} {v}' for k, v in each.items())}")
    if phase.traffic.unknown_loops:
      lines.append(f"{'':10}{phase.traffic.unknown_loops} loops of unknown length received once")
    if phase.uncounted:
      lines.append(f"{'':10}FLOPs not counted: {phase.uncounted}")
  lines.append(f"{'rewards':10}{found.rewards}")
  best = "" if found.seconds is None else f", at best {found.seconds:.3g} s"
  lines.append(f"an epoch: {found.flops:.3g} FLOPs{best}")
  if found.room is None:
    lines.append("memory of these devices is not known: not said whether it fits")
  else:
    verdict = "fits" if found.fits else "DOES NOT FIT"
    lines.append(f"{verdict}: {found.total / GIB:.2f} of {found.room / GIB:.2f} GiB")
  return "\n".join(lines)


def render_choice(given: Forecast, chosen: Forecast | None) -> str:
  """What `confirm` found, and how to ask for it."""
  if chosen is None:
    return (
      "no mesh of data and fsdp with any microbatch fits, by estimate: take more devices, "
      "or --config.completion.lanes_per_chunk=1, --config.vae.images_per_chunk=1, --config.model.remat=full"
    )
  flags = f"--config.mesh.fsdp={chosen.mesh['fsdp']} --config.train.microbatch={chosen.microbatch}"
  if chosen is given:
    return f"choice: as it is ({flags})"
  return f"choice: {flags}\n{render(chosen)}"


def to_json(found: Forecast) -> dict[str, Any]:
  """The forecast as what JSON can hold."""
  row = dataclasses.asdict(found)
  for phase, entry in zip(found.phases, row["phases"]):
    entry |= {"total": phase.total}
    entry["traffic"] |= {"total": phase.traffic.total}
    if phase.bound:
      entry["bound"] |= {"seconds": phase.bound.seconds}
  row |= {"total": found.total, "fits": found.fits, "flops": found.flops, "seconds": found.seconds}
  return json.loads(json.dumps(row, default=np.ndarray.tolist))
