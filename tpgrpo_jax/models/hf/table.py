"""What every table of foreign tensor names is made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import os
import re
import sys
import typing
from typing import Any, NamedTuple

import jax
import numpy as np


class Entry(NamedTuple):
  """One foreign tensor: where it lives here, what it is called there, its shape there, both layouts.

  Attributes:
    path: dotted path of our tensor.
    block: index on the leading axis of a stack, or None.
    name: the foreign name.
    shape: of the foreign tensor.
    to_foreign: our array (of one block) -> theirs.
    from_foreign: the inverse.
    axes: our axis i is their axis axes[i], so that a part of a tensor can be read alone; None when
      the layouts differ by more, and such a tensor is read whole.
  """

  path: str
  block: int | None
  name: str
  shape: tuple[int, ...]
  to_foreign: Callable[[np.ndarray], np.ndarray]
  from_foreign: Callable[[np.ndarray], np.ndarray]
  axes: tuple[int, ...] | None = None


def same_adapters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The adapters of a model that others call by the table's names."""
  return dict(found)


def same_names(found: Iterable[str]) -> dict[str, str]:
  """The aliases of a model whose files agree with its table."""
  return {name: name for name in found}


def shorten(problems: Sequence[str], most: int = 12) -> str:
  """At most so many lines of a list of what does not fit; each kind of line (`  kind: ...`) has some of them.

  A file of another model misfits in all its thousand names.
  """
  problems = list(problems)
  if len(problems) <= most:
    return "\n".join(problems)
  kinds: dict[str, list[str]] = {}
  for line in problems:
    kinds.setdefault(line.partition(":")[0] if ":" in line else "", []).append(line)
  room, lines = max(1, (most - len(kinds)) // len(kinds)), []
  for kind, those in kinds.items():
    lines += those[:room]
    if len(those) > room:
      lines.append(f"  ... and {len(those) - room} more lines of the kind {kind.strip()!r}")
  return "\n".join(lines[:most])


class Architecture(NamedTuple):
  """A foreign model class that can be read.

  Attributes:
    config: our class of its sizes.
    read_config: the content of config.json -> config; ValueError when it does not fit.
    names: (config, {dotted path: shape} of our tensors) -> the table; any subset of the paths will do.
    aliases: names in a file -> {the table's name: the file's name}; by default they are the same.
      What it leaves out is not needed.
    adapters: tensors of a file of adapters by name -> the same under the table's names, where other programs
      write them under the names of the model's authors; by default they are the same.
    containers: names, in a first block, of what only holds modules and ends as a module's name does in other
      blocks: PEFT, told such an end, would try to adapt it.
  """

  config: type
  read_config: Callable[[Mapping[str, Any]], Any]
  names: Callable[[Any, Mapping[str, tuple[int, ...]]], list[Entry]]
  aliases: Callable[[Iterable[str]], dict[str, str]] = same_names
  adapters: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = same_adapters
  containers: tuple[str, ...] = ()


_NULL_IS_DEFAULT = ("out_channels",)  # diffusers writes null for "as in_channels"
_ANY_SIGN = ("shift_factor",)  # floats that may be 0 or below


def is_finite(value: Any) -> typing.TypeGuard[float]:
  """Whether a value of a JSON file is a number that a float holds; true, NaN and 1e400 are none."""
  return type(value) in (int, float) and abs(value) <= sys.float_info.max


def read_sizes(
  cls: type,
  read: Callable[[Mapping[str, Any]], Any],
  raw: Mapping[str, Any],
  path: os.PathLike[str],
) -> Any:
  """read(raw) -> cls, the sizes of a model; ValueError with the file and the field if they are none."""
  _check_sizes(cls, raw, path)
  try:
    return read(raw)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _check_sizes(cls, raw, path):
  """Raises ValueError for a value in config.json of another type than the field, or no size at all."""
  hints = typing.get_type_hints(cls)
  for name in hints:
    if dataclasses.is_dataclass(hints[name]):
      _check_part(hints[name], name, raw, path)
  for name in hints.keys() & raw.keys():
    value, kinds = raw[name], typing.get_args(hints[name]) or (hints[name],)
    if dataclasses.is_dataclass(hints[name]) or (value is None and name in _NULL_IS_DEFAULT):
      continue
    lists = [k for k in (hints[name], *kinds) if typing.get_origin(k) is tuple]
    if lists:
      item = typing.get_args(lists[0])[0]
      fits = isinstance(value, list | tuple) and all(type(part) is item for part in value)
      fits = fits or (value is None and type(None) in kinds)
      rule = f"a list of {item.__name__}"
    else:
      fits = type(value) in kinds or (type(value) is int and float in kinds)
      rule = " or ".join(kind.__name__ for kind in kinds).replace("NoneType", "null")
    if fits and float in kinds and value is not None:
      above = "" if name in _ANY_SIGN else " above 0"
      fits, rule = is_finite(value) and (not above or value > 0), f"a finite number{above}"
    elif fits and type(value) is int:
      least = 0 if name.endswith("_id") else 1
      fits, rule = least <= value < 2**31, f"at least {least}, and below 2^31"
    if not fits:
      raise ValueError(f"{path}: {name}={value!r}: must be {rule}. Fetch the file again.")


def _check_part(cls, name, raw, path):
  """`_check_sizes` of a part of a model, which transformers has under "<name>_config"."""
  for field in (f"{name}_config", f"{name}_config_dict"):
    part = raw.get(field)
    if part is not None and not isinstance(part, Mapping):
      raise ValueError(f"{path}: {field}={part!r}: must be an object. Fetch the file again.")
    _check_sizes(cls, part or {}, path)


def make_entry(path: str, block: int | None, name: str, shape: tuple[int, ...]) -> Entry:
  """The entry of a tensor whose layout is the same, or a kernel [in, out] that torch has transposed."""
  axes = tuple(range(len(shape)))
  if path.endswith(".kernel"):
    return Entry(path, block, name, shape[::-1], lambda x: x.T, lambda x: x.T, axes[::-1])
  return Entry(path, block, name, shape, lambda x: x, lambda x: x, axes)


def stacked_names(
  shapes: Mapping[str, tuple[int, ...]],
  stacks: Sequence[str],
  renames: Sequence[tuple[str, str]],
) -> list[Entry]:
  """The table of a model whose stacks are called there as here: stack.rest -> stack.number.rest.

  Args:
    shapes: shape of every tensor of ours by dotted path.
    stacks: names of the stacks of blocks.
    renames: (pattern of our path, replacement); the first match of each is applied, in order.
  """

  def rename(name):
    for pattern, replacement in renames:
      name = re.sub(pattern, replacement, name, count=1)
    return name

  entries = []
  for path, shape in sorted(shapes.items()):
    stack, _, rest = path.partition(".")
    if stack not in stacks:
      entries.append(make_entry(path, None, rename(path), shape))
      continue
    for i in range(shape[0]):
      entries.append(make_entry(path, i, rename(f"{stack}.{i}.{rest}"), shape[1:]))
  return entries


def flatten(tree: Any) -> dict[str, Any]:
  """Nested dict -> {dotted path: leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{dotted path: leaf} -> nested dict."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split(".")
    node = tree
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = leaf
  return tree
