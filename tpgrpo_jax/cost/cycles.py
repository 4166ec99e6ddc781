"""Where a TPU's time goes, as its compiler reckons: from a compiled program's text (HLO).

libtpu writes the cycles that it expects beside each fusion, product and copy. It has none for Pallas kernels,
for collectives and for copies that run beside the rest. Splash attention is taken at the peak of the matrix
units and collectives at the bandwidth of the links, so their shares are at the least.
"""

import collections
from collections.abc import Iterator
import dataclasses
import math
import re

from tpgrpo_jax.cost import collectives, hlo
from tpgrpo_jax.cost.hardware import Chip

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
_TOLD = re.compile(r"kernel_metadata=\{\n[^\n]*\n\}\}")  # by a kernel, within an instruction
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of a block of queries and keys
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?)\}, [a-z_]+=")
_MATMULS = {"dot", "convolution"}  # the TPU's compiler writes products as convolutions
_MOVES = {
  "bitcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "get-tuple-element",
  "pad", "parameter", "reshape", "slice", "transpose", "tuple",
}  # fmt: skip
_MOST = 10  # copies that are named
_ROW = re.compile(r"^(\d+) (.*)$", re.M)
_NUMBERS = re.compile(r"(\w+)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Copy:
  """An instruction that moves data and computes nothing.

  Attributes:
    seconds: of all its runs.
    runs: how often.
    shape: of what it gives, such as "bf16[8,1024,1536]".
    source: "file:line" of the package that asked for it; "" where the compiler did.
  """

  seconds: float
  runs: int
  shape: str
  source: str


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Seconds of one run on a device.

  Attributes:
    seconds: kind -> "matmul", "attention", "copies" (transposes, slices and padding too), "collectives" and
      "other".
    copies: the dearest, first.
  """

  seconds: dict[str, float]
  copies: tuple[Copy, ...]


def read_schedule(text: str, chip: Chip, *, devices: int) -> Schedule | None:
  """Sums what the compiler says, bodies of loops as often as they turn; None where it says nothing.

  Args:
    text: of `compiled.as_text()`.
    chip: that it was compiled for.
    devices: that the program runs on.
  """
  if not chip.clock or not _CYCLES.search(text):
    return None
  entry, computations = hlo.split(_TOLD.sub("kernel_metadata={}}", text))
  seconds: dict[str, float] = collections.defaultdict(float)
  copies = []
  frames = _frames(text)
  for line, runs in _instructions(entry, computations):
    cycles, kernel = _CYCLES.search(line), _KERNEL.search(line)
    if kernel and hlo.opcode(line) == "custom-call":
      seconds["attention"] += runs * _attention(line, _PRODUCTS[kernel[1]]) / chip.flops
    elif cycles:
      kind, spent = _kind(line, computations), runs * int(cycles[1]) / chip.clock
      seconds[kind] += spent
      if kind == "copies":
        shapes = ", ".join(f"{dtype}[{dims}]" for dtype, dims in hlo.results(line))
        copies.append(Copy(spent, runs, shapes, _source(line, frames)))
  traffic = collectives.read_traffic(text, devices=devices)
  seconds["collectives"] = traffic.total / chip.link_bandwidth
  copies.sort(key=lambda copy: -copy.seconds)
  return Schedule(dict(seconds), tuple(copies[:_MOST]))


def render(schedule: Schedule) -> Iterator[str]:
  """Lines of a table."""
  total = sum(schedule.seconds.values()) or 1.0
  kinds = sorted(schedule.seconds.items(), key=lambda item: -item[1])
  shares = ", ".join(f"{kind} {seconds / total:.1%}" for kind, seconds in kinds)
  yield f"as the compiler reckons {total:.3g} s: {shares}"
  for copy in schedule.copies:
    yield f"  copy {copy.seconds / total:6.2%} {copy.runs:6} x {copy.shape} {copy.source or '(the compiler)'}"


def _instructions(name, computations, runs=1) -> Iterator[tuple[str, int]]:
  """(instruction, how often it runs), those of fusions as one."""
  for line in computations.get(name, ()):
    yield line, runs
    opcode = hlo.opcode(line)
    if opcode in ("while", "conditional", "call"):
      turns = hlo.trips(line, computations) or 1 if opcode == "while" else 1
      within = [[*_instructions(called, computations, runs * turns)] for called in hlo.calls(line)]
      yield from max(within, key=_cycles, default=[])  # the dearest branch


def _cycles(instructions):
  found = ((_CYCLES.search(line), runs) for line, runs in instructions)
  return sum(int(cycles[1]) * runs for cycles, runs in found if cycles)


def _kind(line, computations):
  within = {hlo.opcode(line)}
  if "fusion" in within:
    within = _within(line, computations)
  if within & _MATMULS:
    return "matmul"
  return "copies" if within <= _MOVES else "other"


def _within(line, computations):
  """Opcodes of a fusion, and of those in it."""
  found = set()
  for called in hlo.calls(line):
    for inner in computations.get(called, ()):
      opcode = hlo.opcode(inner)
      found |= _within(inner, computations) if opcode == "fusion" else {opcode}
  return found


def _attention(line, products):
  """Operations of a kernel whose operands are q [B, heads, N, d], k and v, and tables of lower rank."""
  told = _OPERANDS.search(line)
  operands = re.findall(r"\w+\[([\d,]+)\]", told[1] if told else "")
  wide = [shape for shape in ([*map(int, dims.split(","))] for dims in operands) if len(shape) == 4]
  if len(wide) < 2:
    return 0.0
  return products * 2 * math.prod(wide[0]) * wide[1][2]


def _frames(text):
  """Number of a stack frame -> (file, line, number of the frame that called it)."""
  table = {}
  for name in ("FileNames", "FileLocations", "StackFrames"):
    _, _, rest = text.partition(f"\n{name}\n")
    rows = rest.split("\n\n", 1)[0]
    table[name] = {int(number): row for number, row in _ROW.findall(rows)}
  numbers = lambda row: {key: int(value) for key, value in _NUMBERS.findall(row)}
  places = {n: numbers(row) for n, row in table["FileLocations"].items()}
  frames = {}
  for number, row in table["StackFrames"].items():
    frame = numbers(row)
    place = places.get(frame["file_location_id"], {})
    file = table["FileNames"].get(place.get("file_name_id", 0), "").strip('"')
    frames[number] = file, place.get("line", 0), frame.get("parent_frame_id", 1) - 1
  return frames


def _source(line, frames):
  """The innermost place in this package."""
  found = re.search(r"stack_frame_id=(\d+)", line)
  number = int(found[1]) if found else 0
  while number in frames:
    file, row, number = frames[number]
    _, package, path = file.rpartition("tpgrpo_jax/")
    if package:
      return f"{path}:{row}"
  return ""
