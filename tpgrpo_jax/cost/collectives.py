"""Bytes between devices, from a compiled program's text (HLO), bodies of loops as often as they run."""

import collections
import dataclasses
import re
from typing import Any

from tpgrpo_jax.cost import hlo

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]|replica_groups=\{\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the devices send each other.

  Attributes:
    received: kind of collective -> bytes that each device has to receive at the least.
    runs: kind -> how often one runs.
    unknown_loops: loops whose number of turns the text does not say; their bodies count once.
  """

  received: dict[str, float]
  runs: dict[str, int]
  unknown_loops: int

  @property
  def total(self) -> float:
    """Bytes that each device has to receive."""
    return sum(self.received.values())


def read_traffic(text: str, *, devices: int) -> Traffic:
  """Sums the collectives of a compiled program.

  With a result of n bytes on each of g devices, each device receives at the least: all-gather and
  all-to-all n (g - 1) / g, reduce-scatter n (g - 1), all-reduce 2 n (g - 1) / g (as a reduce-scatter and
  an all-gather, which no algorithm on point-to-point links beats), collective-permute and broadcast n.

  Args:
    text: of `compiled.as_text()`; its shapes are those of one device.
    devices: that the program runs on.
  """
  entry, computations = hlo.split(text)
  known: dict[str, collections.Counter] = {}

  def walk(name: str) -> collections.Counter:
    if name not in known:
      known[name] = tally = collections.Counter()
      for line in computations.get(name, ()):
        _count(line, tally, walk, devices, computations)
    return known[name]

  tally = walk(entry)
  named: Any = lambda kind: {name: n for (k, name), n in sorted(tally.items()) if k == kind}
  return Traffic(named("bytes"), named("runs"), tally["unknown", ""])


def _count(line, tally, walk, devices, computations):
  """Adds an instruction and what it calls."""
  name = hlo.opcode(line)
  if not name:
    return
  kind = name.removesuffix("-start")
  if kind in KINDS:
    tally["bytes", kind] += _received(kind, line, name != kind, devices)
    tally["runs", kind] += 1
  if name.endswith(("-done", "-update")):
    return  # its -start has been counted
  times = 1
  if name == "while":
    turns = hlo.trips(line, computations)
    times = turns or 1
    tally["unknown", ""] += turns is None
  branches = [walk(called) for called in hlo.calls(line)]
  if name == "conditional":
    branches = [max(branches, key=lambda t: sum(n for (k, _), n in t.items() if k == "bytes"))]
  for inner in branches:
    for key, count in inner.items():
      tally[key] += times * count


def _received(kind, line, started, devices):
  """Bytes that a device receives; a -start gives its operand back beside its result."""
  groups = _GROUPS.search(line)
  size = devices
  if groups:
    size = int(groups[2]) if groups[2] else len(groups[3].split(","))
  shapes = hlo.results(line)
  result = sum(hlo.size_of(*shape) for shape in shapes if shape[1] or not started)
  if started and kind == "all-gather":
    result *= size / (size + 1)
  elif started and kind == "reduce-scatter":
    result /= size + 1
  elif started and kind != "all-reduce":
    result /= 2
  share = (size - 1) / size
  return result * {
    "all-reduce": 2 * share,
    "reduce-scatter": size - 1,
    "collective-permute": 1,
    "collective-broadcast": 1,
  }.get(kind, share)
