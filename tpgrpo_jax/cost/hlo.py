"""The text of a compiled program (HLO): its computations, their instructions, and how often loops turn."""

from collections.abc import Iterator
import math
import re

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


def split(text: str) -> tuple[str, dict[str, list[str]]]:
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


def trips(line: str, computations: dict[str, list[str]]) -> int | None:
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


def opcode(line: str) -> str:
  """Of an instruction; "" where there is none."""
  found = _OPCODE.search(without_layouts(line))
  return found[1] if found else ""


def results(line: str) -> list[tuple[str, str]]:
  """(dtype, dimensions) of each array that an instruction gives."""
  bare = without_layouts(line)
  found = _OPCODE.search(bare)
  return _SHAPE.findall(bare[: found.start()] if found else bare)


def without_layouts(line: str) -> str:
  """Layouts, as {1,0:T(8,128)}, hold what looks like an opcode."""
  return re.sub(r"\{[^{}]*\}", "", line)


def calls(line: str) -> Iterator[str]:
  """Names of the computations that an instruction calls."""
  yield from _CALLED.findall(line)
  for names in _LISTED.findall(line):
    yield from (name.strip().lstrip("%") for name in names.split(","))


def size_of(dtype: str, dims: str) -> float:
  """Bytes of one of the `results`."""
  bits = _BITS.get(dtype) or int((re.search(r"\d+", dtype) or ["0"])[0])
  return math.prod(int(d) for d in dims.split(",") if d) * bits / 8
