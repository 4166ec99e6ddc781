"""What every table of foreign tensor names is made of."""

from collections.abc import Callable
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
  """

  path: str
  block: int | None
  name: str
  shape: tuple[int, ...]
  to_foreign: Callable[[np.ndarray], np.ndarray]
  from_foreign: Callable[[np.ndarray], np.ndarray]


def make_entry(path: str, block: int | None, name: str, shape: tuple[int, ...]) -> Entry:
  """The entry of a tensor whose layout is the same, or a kernel [in, out] that torch has transposed."""
  if path.endswith(".kernel"):
    return Entry(path, block, name, shape[::-1], lambda x: x.T, lambda x: x.T)
  return Entry(path, block, name, shape, lambda x: x, lambda x: x)


def flatten(tree: Any) -> dict[str, Any]:
  """Nested dict -> {dotted path: leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}
