"""Arrays between the host and a mesh that may span several processes.

Every process makes the same calls of `put_batch`, `fetch`, `from_first`, `on_first` and `sum_over` in the
same order, from its main thread; the other functions concern one process alone.
"""

from collections.abc import Callable
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks for all."""
  return jax.process_index() == 0


def put_batch(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """Arrays with leading axis B -> the same divided along B; those with leading axis 1 are copied.

  Of arrays of the host, every process passes the whole batch and moves the rows of its own devices.
  """
  divided = NamedSharding(mesh, P(tuple(name for name in mesh.axis_names if name != "tensor")))
  copied = NamedSharding(mesh, P())

  def put(array):
    sharding = copied if len(array) == 1 else divided
    if isinstance(array, jax.Array):
      return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(put, tree)


def own_rows(array: jax.Array) -> np.ndarray:
  """Which rows of axis 0 are this process's: bool [N]; each row is exactly one process's."""
  own = np.zeros(len(array), bool)
  for shard in array.addressable_shards:
    if shard.replica_id == 0:
      own[shard.index[0] if shard.index else slice(None)] = True
  return own


def fetch_rows(array: np.ndarray | jax.Array, own: np.ndarray) -> np.ndarray:
  """The rows of axis 0 that `own` marks, which are this process's; waits for the devices."""
  if isinstance(array, np.ndarray) or array.is_fully_addressable:
    return np.asarray(array)[own]
  rows = np.zeros(array.shape, array.dtype)
  for shard in array.addressable_shards:
    rows[shard.index] = np.asarray(shard.data)
  return rows[own]


def replicate(array: jax.Array) -> jax.Array:
  """The same on every device, so that each process can read it; dispatched and not waited for."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return array
  whole = NamedSharding(array.sharding.mesh, P())  # pyright: ignore[reportAttributeAccessIssue]
  return jax.jit(lambda x: x, out_shardings=whole)(array)


def fetch(array: jax.Array) -> np.ndarray:
  """The whole array on every host."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def from_first(value: Any) -> Any:
  """What process 0 has, anything that JSON can hold, for every process."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  padded = np.resize(text, length)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def on_first(function: Callable[[], Any]) -> None:
  """Calls the function in process 0 alone; its ValueError is raised in all processes.

  Every process calls this at the same place.
  """
  if jax.process_count() == 1:
    function()
    return
  problem = ""
  if is_first():
    try:
      function()
    except ValueError as error:
      problem = str(error)
  if problem := from_first(problem):
    raise ValueError(problem)


def sum_over(tree: Any) -> Any:
  """The sum over processes of host arrays of one shape."""
  if jax.process_count() == 1:
    return tree
  gathered = multihost_utils.process_allgather(tree)
  return jax.tree.map(lambda a: np.asarray(a).sum(axis=0, dtype=a.dtype), gathered)
