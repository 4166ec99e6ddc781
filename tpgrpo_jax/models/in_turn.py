"""Several evaluations of a model, for which each block's weights are gathered once.

Where "fsdp" divides frozen weights, each evaluation gathers all of them, block by block. Evaluations that
stand side by side share it: a block gathers its weights, then serves one evaluation after the other,
each of the shape that it would have alone. What it costs is memory, for what lies between blocks is
kept for all of them.
"""

from collections.abc import Callable
import contextlib
import contextvars
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

_SIDE_BY_SIDE = contextvars.ContextVar("side_by_side", default=False)


def side_by_side(function: Callable[..., Any]) -> Callable[..., Any]:
  """jax.vmap of a function of evaluations, in which blocks and what is `alone` take them in turn."""

  def run(*args):
    with _marked():
      return jax.vmap(function)(*args)

  return run


@contextlib.contextmanager
def _marked():
  token = _SIDE_BY_SIDE.set(True)
  try:
    yield
  finally:
    _SIDE_BY_SIDE.reset(token)


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
  """Within `side_by_side` takes one evaluation after the other, outside the function as it is."""
  return _in_turn(function) if _SIDE_BY_SIDE.get() else function


def block(apply: Callable[..., Any], remat: Callable[..., Any]) -> Callable[..., Any]:
  """A block, rematerialised, which within `side_by_side` gathers its weights once.

  Args:
    apply: (weights, carry, terms) -> carry.
    remat: function -> the function that keeps less for its backward pass.
  """
  if not _SIDE_BY_SIDE.get():
    return remat(apply)
  # Rematerialised twice: the gathered weights are not kept, nor what several evaluations have within.
  turns = _in_turn(apply, remat)
  return remat(lambda weights, carry, terms: turns(_gathered(weights), carry, terms))


def _in_turn(function, remat=lambda function: function):
  """The function, of which jax.vmap makes a loop; arguments that all evaluations share stay out of it."""
  shared = jax.custom_batching.custom_vmap(function)

  @shared.def_vmap
  def _(size, is_batched, *args):
    del size
    leaves, tree = jax.tree.flatten(args)
    moves = jax.tree.leaves(is_batched)

    def one(moving):
      rest = iter(moving)
      filled = [next(rest) if moved else leaf for leaf, moved in zip(leaves, moves)]
      return function(*jax.tree.unflatten(tree, filled))  # and not `shared`, which has no gradient

    found = jax.lax.map(remat(one), [leaf for leaf, moved in zip(leaves, moves) if moved])
    return found, jax.tree.map(lambda _: True, found)

  return shared


def _gathered(weights):
  """On every device whole; as they are without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if all(n == 1 for name, n in mesh.shape.items() if name not in mesh.manual_axes):
    return weights
  return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, P()), weights)
