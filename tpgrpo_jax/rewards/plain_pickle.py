"""Reads pickles that hold data and nothing else; no part of them is ever run or imported.

Flow-GRPO's reward servers speak pickle. A pickle is a program, and Python's own reader runs it. This one
walks over its instructions and knows only those that build None, numbers, text, bytes, lists, tuples, dicts
and NumPy arrays of numbers or text. Whatever else there is, it refuses before anything was made of it.
"""

from collections.abc import Callable
import dataclasses
import io
import math
import pickletools
import re
from typing import Any, NamedTuple

import numpy as np


class Limits(NamedTuple):
  """What a pickle may hold at most.

  Attributes:
    size: bytes of the pickle, and of its text and arrays when all that is shared is counted as often as it
      is used. Its calls may make twice as many: old protocols write an array as text, then bytes.
    items: values in it, counted likewise.
    depth: of containers within containers.
  """

  size: int = 256 * 2**20
  items: int = 50_000
  depth: int = 16


class Refused(ValueError):
  """The pickle holds what is not plain data, or too much of it."""


def loads(data: bytes, limits: Limits = Limits()) -> Any:
  """The plain data in a pickle, of any protocol.

  Args:
    data: the pickle.
    limits: of its size.

  Raises:
    Refused: an instruction, a name or a type that plain data does not need, more than the limits allow,
      or bytes that are no pickle.
  """
  if len(data) > limits.size:
    raise Refused(f"a pickle of {len(data)} bytes: at most {limits.size} are read.")
  reader = _Reader(limits)
  try:
    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
      reader.step(opcode.name, argument)
  except Refused:
    raise
  except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
    said = f"{type(error).__name__}: {str(error)[:200]}"
    raise Refused(f"is no pickle of plain data ({said}).") from error
  return reader.result()


class _Mark:
  """Where the items of a container begin on the stack."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
  """A global that is known, and never imported."""

  name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _DtypeDraft:
  """A dtype whose byte order comes later."""

  code: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Dtype:
  """A finished one."""

  dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class _ArrayDraft:
  """An array whose content comes later."""


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_GLOBALS = {
  ("numpy", "dtype"): "dtype",
  ("numpy", "ndarray"): "ndarray",
  ("_codecs", "encode"): "encode",
  ("__builtin__", "bytes"): "empty",
  **{(module, "_reconstruct"): "reconstruct" for module in _NUMPY},
  **{(module, "scalar"): "scalar" for module in _NUMPY},
  ("numpy.core.numeric", "_frombuffer"): "frombuffer",
  ("numpy._core.numeric", "_frombuffer"): "frombuffer",
}
_MARK = _Mark()
_CONTAINERS = (list, tuple, dict)
_DATA = (type(None), bool, int, float, str, bytes, np.ndarray, np.generic, *_CONTAINERS)
_PUSH = {
  "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE",
  "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
  "STRING", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_CODE = re.compile(r"[biuf][1248]|[US][0-9]{0,8}")  # numbers, text and bytes, all of a fixed size


class _Reader:
  """A stack and a memo, as the pickle machine has them."""

  def __init__(self, limits):
    self.limits = limits
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    # id -> (items, bytes, depth), all that is shared counted
    self.weights: dict[int, tuple[int, int, int]] = {}
    self.kept: list[Any] = []  # so that no id is used twice
    self.shared: set[int] = set()
    self.unfinished: set[int] = set()  # tuples with names or drafts in them
    self.finished: dict[int, Any] = {}  # id of a draft -> what became of it
    self.steps = 0
    self.made = 0  # bytes that calls were given, whatever became of them
    self.stopped = False

  def result(self):
    if not self.stopped or len(self.stack) != 1:
      raise Refused("is cut short.")
    (value,) = self.stack
    self.add([], [value])
    return value

  def step(self, name, argument):
    """One instruction."""
    self.steps += 1
    if self.steps > 4 * self.limits.items:
      raise Refused(f"has more than {4 * self.limits.items} instructions.")
    if name in _PUSH:
      self._push(bytes(argument) if isinstance(argument, bytearray) else argument)
    elif name in _CONSTANTS:
      self._push(_CONSTANTS[name])
    elif name in ("PROTO", "FRAME"):
      pass
    elif name == "STOP":
      self.stopped = True
    elif name == "MARK":
      self.stack.append(_MARK)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
      self._remember(int(argument))
    elif name == "MEMOIZE":
      self._remember(len(self.memo))
    elif name in ("GET", "BINGET", "LONG_BINGET"):
      self._recall(int(argument))
    elif step := _STEPS.get(name):
      step(self, argument)
    else:
      raise Refused(f"holds the instruction {name}, which plain data does not need.")

  def spend(self, values):
    """Counts what a call is given, before anything is made of it: what it makes is as large."""
    self.made += sum(map(_size, values))
    if self.made > 2 * self.limits.size:
      raise Refused(f"makes more than {2 * self.limits.size} bytes.")

  def _push(self, value):
    if isinstance(value, int) and value.bit_length() > 64:
      raise Refused("holds an integer of more than 64 bits.")
    self.stack.append(value)

  def pop(self):
    value = self.stack.pop()
    if value is _MARK:
      raise Refused("has a mark where a value should be.")
    return value

  def pop_to_mark(self):
    """All values above the newest mark, which goes too."""
    values = []
    while (value := self.stack.pop()) is not _MARK:
      values.append(value)
    return values[::-1]

  def _remember(self, key):
    value = self.stack[-1]
    if value is _MARK or len(self.memo) >= self.limits.items:
      raise Refused("remembers what cannot be remembered.")
    self.memo[key] = value

  def _recall(self, key):
    value = self.memo[key]
    value = self.finished.get(id(value), value)
    if isinstance(value, list | dict):
      self.shared.add(id(value))  # and grows no more: so no value is ever within itself
    self.stack.append(value)

  def add(self, container, values):
    """Weighs `values` as they are put into the container."""
    items, size, depth = self.weights.get(id(container), (1, 0, 1))
    if id(container) in self.shared:
      raise Refused("holds a value that is within itself.")
    for value in values:
      plain = isinstance(value, _DATA) and id(value) not in self.unfinished
      if not plain and not isinstance(container, tuple):
        raise Refused("holds a name or an unfinished value where data should be.")
      if not plain:
        self.unfinished.add(id(container))
      below = 1 if isinstance(value, _CONTAINERS) else 0
      more, length, below = self.weights.get(id(value), (1, _size(value), below))
      items, size, depth = items + more, size + length, max(depth, below + 1)
    for amount, limit, what in (
      (items, self.limits.items, "values"),
      (size, self.limits.size, "bytes"),
      (depth, self.limits.depth, "containers within each other"),
    ):
      if amount > limit:
        raise Refused(f"unfolds to more than {limit} {what}.")
    if id(container) not in self.weights:
      self.kept.append(container)
    self.weights[id(container)] = (items, size, depth)


def _size(value):
  if isinstance(value, str | bytes):
    return len(value)
  return value.nbytes if isinstance(value, np.ndarray) else 0


def _shown(value):
  return value[:80] if isinstance(value, str) else type(value).__name__


def _new(kind: type) -> Callable[[_Reader, Any], None]:
  return lambda reader, _: reader.stack.append(kind())


def _from_mark(reader, make):
  values = reader.pop_to_mark()
  made = make(values)
  reader.add(made, values)
  reader.stack.append(made)


def _tuple_of(count: int) -> Callable[[_Reader, Any], None]:
  def step(reader, _):
    values = [reader.pop() for _ in range(count)][::-1]
    made = tuple(values)
    reader.add(made, values)
    reader.stack.append(made)

  return step


def _extend(reader, values):
  target = reader.stack[-1]
  if not isinstance(target, list):
    raise Refused("appends to what is no list.")
  reader.add(target, values)
  target.extend(values)


def _set_items(reader, values):
  target, keys = reader.stack[-1], values[::2]
  if not isinstance(target, dict) or len(values) % 2:
    raise Refused("sets items of what is no dict.")
  if not all(isinstance(key, str | int) for key in keys):
    raise Refused("has a dict with keys that are neither text nor integers.")
  reader.add(target, values)
  target.update(zip(keys, values[1::2]))


def _dict(reader, _):
  values = reader.pop_to_mark()
  reader.stack.append({})
  _set_items(reader, values)


def _name(reader, module, name):
  texts = isinstance(module, str) and isinstance(name, str)
  known = _GLOBALS.get((module, name)) if texts else None
  if known is None:
    raise Refused(f"names {_shown(module)}.{_shown(name)}, which could run code.")
  reader.stack.append(_Name(known))


def _stack_global(reader, _):
  name, module = reader.pop(), reader.pop()
  _name(reader, module, name)


def _reduce(reader, _):
  arguments, function = reader.pop(), reader.pop()
  if not isinstance(function, _Name) or not isinstance(arguments, tuple):
    raise Refused("calls what is no function of plain data.")
  reader.spend(arguments)
  reader.stack.append(_MAKERS[function.name](*arguments))


def _build(reader, _):
  state, draft = reader.pop(), reader.pop()
  if isinstance(draft, _DtypeDraft):
    value = _finished_dtype(draft, state)
  elif isinstance(draft, _ArrayDraft) and isinstance(state, tuple):
    reader.spend(state)
    _, shape, dtype, fortran, content = state
    value = _array(content, dtype, shape, "F" if fortran is True else "C")
  else:
    raise Refused("sets the state of what has none.")
  reader.finished[id(draft)] = value
  reader.kept.append(draft)
  reader.stack.append(value)


def _make_dtype(code, align=False, copy=True):
  del align, copy
  if not isinstance(code, str) or not _CODE.fullmatch(code):
    raise Refused(f"has an array of {_shown(code)!r}: numbers and text alone are read.")
  return _DtypeDraft(code)


def _finished_dtype(draft, state):
  order = state[1]
  if order not in ("<", ">", "|", "="):
    raise Refused("has a dtype without a byte order.")
  dtype = np.dtype(draft.code)
  if dtype.kind == "U" and isinstance(state[5], int):  # the code of text says "U", or how much
    dtype = np.dtype(f"U{state[5] // 4}")
  elif dtype.kind == "S" and isinstance(state[5], int) and state[5] > 0:
    dtype = np.dtype(f"S{state[5]}")
  return _Dtype(dtype if order in "|=" else dtype.newbyteorder(order))


def _make_array(*_):
  return _ArrayDraft()


def _array(content, dtype, shape, order):
  """The array of these bytes, when they are exactly as many as its shape needs."""
  if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
    raise Refused("has an array of objects.")
  if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
    raise Refused("has an array of no shape.")
  if len(shape) > 8:
    raise Refused(f"has an array of {len(shape)} dimensions: at most 8 are read.")
  if math.prod(shape) * dtype.dtype.itemsize != len(content):
    raise Refused(f"has {len(content)} bytes for an array of shape {shape} and {dtype.dtype}.")
  flat = np.frombuffer(content, dtype.dtype) if content else np.zeros(0, dtype.dtype)
  return flat.reshape(shape, order=order).copy()


def _make_scalar(dtype, content):
  return _array(content, dtype, (), "C")[()]


def _from_buffer(content, dtype, shape, order):
  if order not in ("C", "F"):
    raise Refused("has an array of no order.")
  return _array(content, dtype, shape, order)


def _encode(text, encoding):
  """How protocols below 3 write bytes; none at all they write as a call of `bytes`."""
  if encoding != "latin1" or not isinstance(text, str):
    raise Refused("encodes text in another way than bytes are written.")
  return text.encode("latin1")


_MAKERS: dict[str, Callable[..., Any]] = {
  "dtype": _make_dtype,
  "reconstruct": _make_array,
  "scalar": _make_scalar,
  "frombuffer": _from_buffer,
  "encode": _encode,
  "empty": lambda: b"",
}
_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
  "EMPTY_LIST": _new(list),
  "EMPTY_DICT": _new(dict),
  "EMPTY_TUPLE": _new(tuple),
  "LIST": lambda reader, _: _from_mark(reader, list),
  "TUPLE": lambda reader, _: _from_mark(reader, tuple),
  "DICT": _dict,
  "TUPLE1": _tuple_of(1),
  "TUPLE2": _tuple_of(2),
  "TUPLE3": _tuple_of(3),
  "APPEND": lambda reader, _: _extend(reader, [reader.pop()]),
  "APPENDS": lambda reader, _: _extend(reader, reader.pop_to_mark()),
  "SETITEM": lambda reader, _: _set_items(reader, [reader.pop(), reader.pop()][::-1]),
  "SETITEMS": lambda reader, _: _set_items(reader, reader.pop_to_mark()),
  "GLOBAL": lambda reader, argument: _name(reader, *argument.split(" ", 1)),
  "STACK_GLOBAL": _stack_global,
  "REDUCE": _reduce,
  "BUILD": _build,
}
