"""Accelerators by their public figures, and topologies that exist without the machine."""

import dataclasses
import os
from typing import Any

import jax

from tpgrpo_jax import version

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one device can do, by its maker's figures.

  Attributes:
    hbm: bytes of memory.
    flops: bfloat16 operations a second, a multiply and an add being two.
    hbm_bandwidth: bytes a second.
    link_bandwidth: bytes a second that all its links to other devices take in (half of what the makers
      call bidirectional).
    clock: cycles a second of a TPU's matrix units: flops over what they do in one; 0 where it is not needed.
  """

  hbm: float
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  clock: float = 0.0


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "key specifications" (bfloat16, no sparsity); of the GPUs
# NVIDIA's data sheets of the SXM modules, without sparsity.
CHIPS = {
  "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 1.05e9),
  "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 1.5e9),
  "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 1.75e9),
  "v6e": Chip(32 * GIB, 918e12, 1638e9, 400e9, 1.75e9),
  "a100": Chip(80 * GIB, 312e12, 2039e9, 300e9),
  "h100": Chip(80 * GIB, 989e12, 3350e9, 450e9),
  "h200": Chip(141e9, 989e12, 4800e9, 450e9),
}
# How JAX calls some of them (device_kind, lower case) -> ours.
_KINDS = {
  "tpu v5 lite": "v5e",
  "tpu v5e": "v5e",
  "tpu v5p": "v5p",
  "tpu v5": "v5p",
  "tpu v6": "v6e",
}

MOST_DEVICES = 1024  # virtual ones

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
"""Chips in each dimension of a slice, for each TPU; v5e:4x4 and v5p:2x2x4 have been compiled for."""

GPUS = ("a100", "h100", "h200")
"""Of CHIPS; "h100:8" is eight of one machine. Nothing compiles for them where they are not."""

KNOWN = "\n".join(f"  {tpu}:{', '.join(shapes)}" for tpu, shapes in TOPOLOGIES.items())


def check_topology(name: str) -> None:
  """Raises ValueError, with the known ones, unless `name` is "local", "cpu:N", of GPUS or TOPOLOGIES."""
  kind, _, shape = name.partition(":")
  counted = kind in ("cpu", *GPUS) and shape.isdecimal() and 0 < int(shape) <= MOST_DEVICES
  if name != "local" and not counted and shape not in TOPOLOGIES.get(kind, ()):
    raise ValueError(
      f"--topology={name!r}: no such topology. Give 'local' (the devices at hand), 'cpu:N' (N virtual CPU "
      f"devices, {MOST_DEVICES} at most), {', '.join(f'{gpu}:N' for gpu in GPUS)} (with --nocompile), or the "
      f"chips of a TPU slice:\n{KNOWN}"
    )


def open_topology(name: str, slices: int = 1) -> list[Any]:
  """The devices of a topology, before JAX has started any other; TPUs are only described.

  Args:
    name: "local", "cpu:N", GPUs that virtual CPU devices stand for, as "h100:8", or a TPU with its
      shape, as "v5e:4x4".
    slices: how many such TPU slices.

  Raises:
    ValueError: as `check_topology`, slices of what is no TPU, or more CPU devices than this process has.
    ImportError: a TPU without libtpu, its compiler.
  """
  check_topology(name)
  kind, _, shape = name.partition(":")
  if slices > 1 and kind not in TOPOLOGIES:
    raise ValueError(
      f"--slices={slices}: only TPUs come in slices. Leave it out of --topology={name}."
    )
  if name == "local":
    return jax.devices()
  jax.config.update("jax_platforms", "cpu")  # a described TPU must not be looked for
  if kind in TOPOLOGIES:
    return _described(name, slices)
  try:
    jax.config.update("jax_num_cpu_devices", int(shape))
  except RuntimeError:
    pass  # JAX runs already; it may have enough
  devices = jax.devices("cpu")
  if len(devices) < int(shape):
    raise ValueError(f"--topology={name!r}: this process has {len(devices)} CPU devices.")
  return devices[: int(shape)]


def _described(name, slices):
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a TPU host's own server
  # libtpu lets one process in at a time, for the TPU's sake; whoever only compiles touches none.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    import libtpu  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(
      f"--topology={name!r} needs libtpu, the TPU's compiler, but no TPU ({error}). Run: "
      f"{version.install('tpu')}"
    ) from error
  del libtpu
  described = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices)
  return list(described.devices)


def find_chip(device: Any, topology: str = "") -> Chip | None:
  """The figures of a device; None for one that is not in CHIPS (CPUs)."""
  kind = topology.partition(":")[0]
  if kind in CHIPS:
    return CHIPS[kind]
  words = device.device_kind.lower()
  named = {**_KINDS, **{name: name for name in CHIPS}}
  return next((CHIPS[chip] for word, chip in named.items() if word in words), None)


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds that a program takes at the least, on each ground alone.

  Attributes:
    compute: all operations at the peak of all devices.
    memory: bytes that must be read or written, at the memory's bandwidth.
    links: bytes that a device must receive, at the bandwidth of its links.
  """

  compute: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """Where all three overlap wholly."""
    return max(self.compute, self.memory, self.links)


def bound(
  chip: Chip, *, devices: int, flops: float, memory_bytes: float, link_bytes: float
) -> Bound:
  """The least time of a program.

  Args:
    chip: of every device.
    devices: how many.
    flops: of all devices together.
    memory_bytes: of one device.
    link_bytes: that one device receives.
  """
  return Bound(
    flops / (devices * chip.flops),
    memory_bytes / chip.hbm_bandwidth,
    link_bytes / chip.link_bandwidth,
  )
