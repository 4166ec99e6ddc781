"""Tensors of safetensors files into device arrays, one at a time."""

from collections.abc import Callable, Iterable, Mapping
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models.hf import files
from tpgrpo_jax.models.hf.table import Entry, flatten, same_names, shorten


def read_params(
  folder: pathlib.Path,
  tensors: Mapping[str, files.Tensor],
  entries: list[Entry],
  abstract: Any,
  *,
  shardings: Any = None,
  aliases: Callable[[Iterable[str]], dict[str, str]] = same_names,
  rule: str = "its config.json",
) -> Any:
  """Reads the tensors of a table; how, and how much memory it takes, is said in `load.load_params`.

  Args:
    folder: for messages.
    tensors: as of files.find_tensors.
    entries: the table of all leaves of `abstract`.
    abstract: the wanted params, a nested dict of things with shape and dtype.
    shardings: the same tree of shardings; by default those of `abstract`, or else the first device.
    aliases: names in the file -> {the table's name: the file's name}.
    rule: what the tensors must fit, for messages.

  Raises:
    ValueError: tensors that are missing, left over or misshapen; all are listed.
  """
  sources = _match(folder, entries, tensors, aliases, rule)
  wanted = flatten(abstract)
  _check_kinds(entries, sources, tensors, wanted)
  if shardings is None:
    layouts = {path: _own_sharding(leaf) for path, leaf in wanted.items()}
  else:
    layouts = flatten(shardings)
  arrays: dict[str, jax.Array] = {}
  for path in sorted({tensors[name].file for name in sources.values()}):
    with files.Reader(path) as reader:
      for entry in entries:
        name = sources[entry.name]
        if tensors[name].file != path:
          continue
        leaf, sharding = wanted[entry.path], layouts[entry.path]
        shape, dtype = leaf.shape, np.dtype(leaf.dtype)
        read = functools.partial(_read, reader, entry, name, dtype)
        if entry.block is None:
          arrays[entry.path] = _place(read, shape, sharding)
          continue
        block = _place(read, shape[1:], _block_sharding(sharding))
        if entry.path not in arrays:
          arrays[entry.path] = jnp.zeros(shape, dtype, device=sharding)
        stack = _insert(sharding)(arrays.pop(entry.path), block, entry.block)
        # Otherwise blocks would queue up faster than they are copied.
        arrays[entry.path] = jax.block_until_ready(stack)
  return jax.tree_util.tree_map_with_path(
    lambda p, _: arrays[".".join(str(k.key) for k in p)], abstract
  )


def _check_kinds(entries, sources, tensors, wanted):
  """Raises ValueError where integers are stored and floating-point numbers wanted: codes, not weights."""
  for entry in entries:
    tensor, dtype = tensors[sources[entry.name]], wanted[entry.path].dtype
    if files.is_floating(tensor.dtype) or not jnp.issubdtype(dtype, jnp.floating):
      continue
    raise ValueError(
      f"{tensor.file}: {sources[entry.name]} is stored as {tensor.dtype}: weights must be floating-point "
      "numbers. A file that another program has quantised is not read: take the model's own files, and set "
      "model.quantize for fewer bits."
    )


def _own_sharding(leaf):
  """Where an abstract leaf, or an array that was put somewhere, wants to lie; None is anywhere."""
  return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _block_sharding(sharding):
  """How one block of a stack lies: as the stack without its leading axis."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    return sharding.update(spec=jax.sharding.PartitionSpec(*sharding.spec[1:]))
  return sharding


def _place(read, shape, sharding):
  """One array on the devices; parts that several devices hold are read once."""
  parts: dict[Any, np.ndarray] = {}

  def callback(index):
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape))
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      parts[key] = read(index)
    return parts[key]

  if sharding is None:  # uncommitted, so that a computation on any mesh takes it
    array = jax.device_put(read(tuple(slice(0, n, 1) for n in shape)))
  else:
    array = jax.make_array_from_callback(tuple(shape), sharding, callback)
  return jax.block_until_ready(array)


def _read(reader, entry, name, dtype, index):
  """The part `index` of our tensor (of one block) as a contiguous NumPy array."""
  if entry.axes is None:
    value = entry.from_foreign(reader.read(name))[index]
  else:
    foreign = [slice(None)] * len(index)
    for axis, part in zip(entry.axes, index):
      foreign[axis] = part
    value = reader.read(name, tuple(foreign)).transpose(entry.axes)
  value = np.asarray(value, dtype, order="C")
  files.check_finite(value, name, reader.path)
  return value


@functools.lru_cache
def _insert(sharding):
  """(stack, block, index) -> the stack with that block; the old one's memory is used again."""

  def insert(stack, block, index):
    return jax.lax.dynamic_update_index_in_dim(stack, block, index, 0)

  return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _match(
  folder: os.PathLike[str],
  entries: list[Entry],
  tensors: Mapping[str, files.Tensor],
  aliases: Callable[[Iterable[str]], dict[str, str]],
  rule: str,
) -> dict[str, str]:
  """{name in the table: name in the file}; all that does not fit is one error."""
  sources = aliases(tensors)
  wanted = {entry.name: entry.shape for entry in entries}
  problems = [f"  missing: {n} {s}" for n, s in wanted.items() if n not in sources]
  problems += [f"  not used: {f} {tensors[f].shape}" for n, f in sources.items() if n not in wanted]
  problems += [
    f"  misshapen: {n} is {tensors[sources[n]].shape}, must be {s}"
    for n, s in wanted.items()
    if n in sources and tensors[sources[n]].shape != s
  ]
  if problems:
    where = sorted({tensor.file.name for tensor in tensors.values()})
    shown = ", ".join(where) if len(where) < 4 else f"{where[0]} and {len(where) - 1} more"
    raise ValueError(f"{folder} ({shown}) does not fit {rule}:\n" + shorten(problems))
  return sources
