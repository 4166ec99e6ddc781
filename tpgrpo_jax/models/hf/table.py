"""What every table of foreign tensor names is made of."""

from collections.abc import Callable, Iterable, Mapping
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


def same_names(found: Iterable[str]) -> dict[str, str]:
  """The aliases of a model whose files agree with its table."""
  return {name: name for name in found}


class Architecture(NamedTuple):
  """A foreign model class that can be read.

  Attributes:
    config: our class of its sizes.
    read_config: the content of config.json -> config; ValueError when it does not fit.
    names: (config, {dotted path: shape} of our tensors) -> the table; any subset of the paths will do.
    aliases: names in a file -> {the table's name: the file's name}; by default they are the same.
      What it leaves out is not needed.
  """

  config: type
  read_config: Callable[[Mapping[str, Any]], Any]
  names: Callable[[Any, Mapping[str, tuple[int, ...]]], list[Entry]]
  aliases: Callable[[Iterable[str]], dict[str, str]] = same_names


def make_entry(path: str, block: int | None, name: str, shape: tuple[int, ...]) -> Entry:
  """The entry of a tensor whose layout is the same, or a kernel [in, out] that torch has transposed."""
  axes = tuple(range(len(shape)))
  if path.endswith(".kernel"):
    return Entry(path, block, name, shape[::-1], lambda x: x.T, lambda x: x.T, axes[::-1])
  return Entry(path, block, name, shape, lambda x: x, lambda x: x, axes)


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
