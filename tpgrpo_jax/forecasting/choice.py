"""Mesh and microbatch for a run on given devices, by what was compiled for others."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.forecasting import forecast, lowering
from tpgrpo_jax.training import mesh as mesh_lib

MOST_SAMPLES = 8  # of a microbatch on one device; more gain nothing once the matrix units are full


def choose(
  config: config_lib.Config, devices: Sequence[Any], measured: forecast.Forecast
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
  config: config_lib.Config, devices: Sequence[Any], given: forecast.Forecast, **options: Any
) -> forecast.Forecast | None:
  """Compiles what `choose` chose, which may turn out not to fit; None if nothing fits by estimate."""
  chosen = choose(config, devices, given)
  if chosen is None:
    return None
  mesh = mesh_lib.make_mesh(chosen.mesh, devices)
  if dict(mesh.shape) == given.mesh and chosen.train.microbatch == given.microbatch:
    return given
  return forecast.forecast(chosen, devices, **options)


def candidates(config: config_lib.Config, devices: int) -> Iterator[config_lib.Config]:
  """Meshes of data and fsdp (powers of two), each with the microbatches that divide an update, best first."""
  train = config.train
  share = train.prompts_per_epoch * train.group_size // train.updates_per_epoch
  part = train.update_microbatch  # stays as it is
  if part % devices:
    return
  for fsdp in (2**i for i in range(devices.bit_length())):
    if devices % fsdp:
      continue
    for samples in range(MOST_SAMPLES, 0, -1):
      size = samples * devices
      if share % size == 0 and size % (part or size) == 0:
        mesh = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp, tensor=1)
        sizes = dataclasses.replace(train, microbatch=size)
        yield dataclasses.replace(config, mesh=mesh, train=sizes)


def _estimate(config, mesh, measured):
  """Bytes of one device in the phase that takes most."""
  plan, totals, train = lowering.open_plan(config, mesh), [], config.train
  shards = mesh_lib.batch_shards(mesh) / (measured.mesh["data"] * measured.mesh["fsdp"])
  ratios = {
    "rollout": train.microbatch / measured.microbatch / shards,
  }
  ratios["update"] = 1 / shards if train.update_microbatch else ratios["rollout"]
  programs = {"rollout": lowering.rollout_program, "update": lowering.update_program}
  for phase in measured.phases:
    if phase.name not in programs:
      continue  # rewards: small beside the others
    _, args, kwargs = programs[phase.name](plan)
    scaled = ratios[phase.name] * (phase.results + phase.temporaries)
    held = forecast.held_bytes(plan, phase.name)
    totals.append(lowering.bytes_per_device((args, kwargs)) + scaled + held)
  return max(totals)


def render_choice(given: forecast.Forecast, chosen: forecast.Forecast | None) -> str:
  """What `confirm` found, and how to ask for it."""
  if chosen is None:
    return (
      "no mesh of data and fsdp with any microbatch fits, by estimate: take more devices, "
      "or --config.completion.lanes_per_chunk=1, --config.vae.images_per_chunk=1, --config.model.remat=full"
    )
  flags = f"--config.mesh.fsdp={chosen.mesh['fsdp']} --config.train.microbatch={chosen.microbatch}"
  if chosen is given:
    return f"choice: as it is ({flags})"
  return f"choice: {flags}\n{forecast.render(chosen)}"
