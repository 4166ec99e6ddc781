"""Weights to safetensors in diffusers' layout, tensor by tensor."""

from collections.abc import Callable, Iterable
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models.hf import architectures, files
from tpgrpo_jax.models.hf.table import flatten

MAX_SHARD_BYTES = 5 * 10**9
_CODES = {name: code for code, name in files.DTYPES.items()}


class Pending(NamedTuple):
  """A tensor to be written; `make` returns it as a NumPy array when its turn comes."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape)) * self.dtype.itemsize


def save_transformer(
  folder: str | os.PathLike[str],
  config: Any,
  params: Any,
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors that diffusers' from_pretrained reads; process 0 only.

  Every process must call it. The host holds one tensor at a time. Weights of the same file names
  that were in the folder before are removed.

  Args:
    folder: made when it does not exist.
    config: sizes, of a class in ARCHITECTURES.
    params: all weights, a nested dict without adapters, NumPy or on any mesh.
    max_shard_bytes: above it the weights are divided into files with an index.
  """
  folder = pathlib.Path(folder)
  tree = flatten(params)
  pending = []
  for entry in architectures.names(config, {k: tuple(v.shape) for k, v in tree.items()}):
    leaf = tree[entry.path]
    make = lambda e=entry, x=leaf: e.to_foreign(to_host(x, e.block))
    pending.append(Pending(entry.name, entry.shape, np.dtype(leaf.dtype), make))
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.CONFIG_FILE).write_text(architectures.config_text(config))
  write_shards(folder, pending, files.STEMS[0], max_shard_bytes)


def write_shards(
  folder: pathlib.Path, pending: Iterable[Pending], stem: str, max_shard_bytes: int
) -> None:
  """Writes stem.safetensors, or several files of that name and an index, in place of what was there.

  Process 0 writes, but every process must call it.
  """
  shards = _divide(sorted(pending, key=lambda p: p.name), max_shard_bytes)
  paths = [folder / f"{stem}.safetensors"]
  if len(shards) > 1:
    count = len(shards)
    paths = [folder / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}*.safetensors*"):
      old.unlink()
  for path, shard in zip(paths, shards):
    write_safetensors(path, shard)
  if len(shards) > 1 and jax.process_index() == 0:
    index = {
      "metadata": {"total_size": sum(p.nbytes for shard in shards for p in shard)},
      "weight_map": {p.name: path.name for path, shard in zip(paths, shards) for p in shard},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _divide(pending, limit):
  shards, size = [[]], 0
  for tensor in pending:
    if shards[-1] and size + tensor.nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.nbytes
  return shards


def write_safetensors(
  path: pathlib.Path, tensors: Iterable[Pending], *, metadata: dict[str, str] | None = None
) -> None:
  """Writes one file, tensor by tensor, whole or not at all; process 0 only, but all must call it.

  The format (huggingface.co/docs/safetensors): the header's length as 8 bytes little-endian, the
  header in JSON padded with spaces to a multiple of 8, the data. safetensors' own `save_file` takes
  all arrays at once.
  """
  tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # keeps every tensor aligned
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
  end = 0
  for tensor in tensors:
    begin, end = end, end + tensor.nbytes
    header[tensor.name] = {
      "dtype": _CODES[tensor.dtype.name],
      "shape": list(tensor.shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  if jax.process_index() != 0:
    for tensor in tensors:  # gathering takes all processes
      tensor.make()
    return
  beside = path.with_name(f".{path.name}.tmp")
  with open(beside, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      value = np.asarray(tensor.make(), tensor.dtype)
      if value.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: is {value.shape}, must be {tensor.shape}.")
      stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
  beside.replace(path)


@jax.jit
def _block(stack, index):
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def to_host(leaf: Any, block: int | None) -> np.ndarray:
  """A weight, or one block of a stack, as a NumPy array, wherever its parts lie."""
  if isinstance(leaf, jax.Array):
    leaf = leaf if block is None else _block(leaf, jnp.int32(block))
    if not leaf.is_fully_addressable:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
  leaf = np.asarray(leaf)
  return leaf if block is None else leaf[block]
