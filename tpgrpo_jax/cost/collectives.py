"""Bytes between devices, from a compiled program's text (HLO), bodies of loops as often as they run."""

import collections
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
  "collective-permute", "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_LISTED = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
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
  entry, computations = _split(text)
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


def _split(text):
  """(name of the entry, name -> its instructions)."""
  entry, current, computations = "", [], {}
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      current = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    else:
      instruction = _INSTRUCTION.match(line)
      if instruction:
        current.append(instruction[1])
  return entry, computations


def _count(line, tally, walk, devices, computations):
  """Adds an instruction and what it calls."""
  opcode = _OPCODE.search(_without_layouts(line))
  if opcode is None:
    return
  name = opcode[1]
  kind = name.removesuffix("-start")
  if kind in KINDS:
    tally["bytes", kind] += _received(kind, line, name != kind, devices)
    tally["runs", kind] += 1
  if name.endswith(("-done", "-update")):
    return  # its -start has been counted
  times = 1
  if name == "while":
    trips = _trips(line, computations)
    times = trips or 1
    tally["unknown", ""] += trips is None
  branches = [walk(called) for called in _calls(line)]
  if name == "conditional":
    branches = [max(branches, key=lambda t: sum(n for (k, _), n in t.items() if k == "bytes"))]
  for inner in branches:
    for key, count in inner.items():
      tally[key] += times * count


def _trips(line, computations):
  """Turns of a loop, or None.

  The CPU's compiler says it. The TPU's does not, but leaves "counter < constant" as the condition; the
  counter of a JAX scan, as of XLA's own loops, begins with 0 and grows by 1.
  """
  said = _TRIPS.search(line)
  if said:
    return int(said[1])
  condition = _CONDITION.search(line)
  lines = computations.get(condition[1], ()) if condition else ()
  constants = [found[1] for found in map(_CONSTANT.search, lines) if found]
  counts = [line for line in lines if "compare(" in line and "direction=LT" in line]
  return int(constants[0]) if len(counts) == len(constants) == 1 else None


def _without_layouts(line):
  """Layouts, as {1,0:T(8,128)}, hold what looks like an opcode."""
  return re.sub(r"\{[^{}]*\}", "", line)


def _calls(line) -> Iterator[str]:
  yield from _CALLED.findall(line)
  for names in _LISTED.findall(line):
    yield from (name.strip().lstrip("%") for name in names.split(","))


def _received(kind, line, started, devices):
  """Bytes that a device receives; a -start gives its operand back beside its result."""
  groups = _GROUPS.search(line)
  size = devices
  if groups:
    size = int(groups[2]) if groups[2] else len(groups[3].split(","))
  bare = _without_layouts(line)
  opcode = _OPCODE.search(bare)
  shapes = _SHAPE.findall(bare[: opcode.start()] if opcode else bare)
  result = sum(_bytes(*shape) for shape in shapes if shape[1] or not started)
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


def _bytes(dtype, dims):
  bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
  return math.prod(int(d) for d in dims.split(",") if d) * bits / 8
