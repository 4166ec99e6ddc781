"""Reads the weights of an encoder from a folder that transformers wrote."""

from collections.abc import Callable, Iterable
import json
import os
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from tpgrpo_jax.models.hf.table import Entry, flatten

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load_json(folder: str | os.PathLike[str], name: str = CONFIG_FILE) -> dict[str, Any]:
  """Reads folder/name.

  Raises:
    ValueError: no such folder or file, or not JSON.
  """
  path = pathlib.Path(folder) / name
  if not path.is_file():
    raise ValueError(f"{str(folder)!r}: no {name} in it. Point it at a complete folder of the hub.")
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error}). Fetch it again.") from error


class Encoder(NamedTuple):
  """A loaded encoder: nnx.merge(graphdef, weights) is the model.

  Attributes:
    config: its sizes.
    graphdef: its structure.
    weights: a nested dict of arrays.
  """

  config: Any
  graphdef: Any
  weights: Any


class Table(NamedTuple):
  """How a kind of encoder is stored.

  Attributes:
    names: (config, shapes of our tensors by dotted path) -> entries.
    aliases: names in a file -> {the table's name: the file's name}.
  """

  names: Callable[[Any, dict[str, tuple[int, ...]]], list[Entry]]
  aliases: Callable[[Iterable[str]], dict[str, str]]


def load_encoder(
  folder: str | os.PathLike[str],
  table: Table,
  config: Any,
  create: Callable[[nnx.Rngs], nnx.Module],
  *,
  dtype: Any = jnp.float32,
  shardings: Callable[[Any], Any] | None = None,
) -> Encoder:
  """Builds an encoder of a folder's weights, its tensors stored in `dtype`.

  Args:
    folder: holds model.safetensors, or an index and its shards.
    table: of this kind of encoder.
    config: its sizes.
    create: makes the model; only its shapes are asked for.
    dtype: of kernels and of token tables; the rest, which is small, is float32.
    shardings: tree of shapes -> tree of shardings; by default the default device.

  Raises:
    ValueError: a missing or unreadable file, or tensors that are missing, left over or misshapen; all
      are listed.
  """
  graphdef, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
  abstract = nnx.to_pure_dict(state)
  files = _open(pathlib.Path(folder))
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
  entries, found = table.names(config, shapes), table.aliases(files)
  _check(folder, entries, {name: files[old].get_slice(old) for name, old in found.items()})
  by_path: dict[str, list[Entry]] = {}
  for entry in entries:
    by_path.setdefault(entry.path, []).append(entry)

  def load(path, leaf, sharding):
    name = ".".join(str(key.key) for key in path)
    large = name.endswith((".kernel", "token_embedding"))
    whole = np.empty(leaf.shape, dtype if large else np.float32)
    for entry in by_path[name]:
      old = found[entry.name]
      value = entry.from_foreign(files[old].get_tensor(old))
      whole[... if entry.block is None else entry.block] = value
    return jax.device_put(whole, sharding)

  places = jax.tree.map(lambda _: None, abstract) if shardings is None else shardings(abstract)
  return Encoder(config, graphdef, jax.tree_util.tree_map_with_path(load, abstract, places))


def _open(folder):
  """{name in the file: the open file}, over all shards."""
  index = folder / f"{WEIGHTS_FILE}.index.json"
  shards = {WEIGHTS_FILE}
  if index.is_file() and not (folder / WEIGHTS_FILE).is_file():
    shards = set(load_json(folder, index.name)["weight_map"].values())
  files = {}
  for shard in sorted(shards):
    path = folder / shard
    if not path.is_file():
      raise ValueError(
        f"{str(folder)!r}: no {shard} in it. Point it at a complete folder of the hub."
      )
    try:
      opened = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
      raise ValueError(
        f"{path}: not a readable safetensors file ({error}). Fetch it again."
      ) from error
    files |= {name: opened for name in opened.keys()}
  return files


def _check(folder, entries, found):
  wanted = {entry.name: entry.shape for entry in entries}
  shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
  problems = [f"  missing: {n} {s}" for n, s in wanted.items() if n not in shapes]
  problems += [f"  not used: {n} {s}" for n, s in shapes.items() if n not in wanted]
  problems += [
    f"  misshapen: {n} is {shapes[n]}, must be {s}"
    for n, s in wanted.items()
    if n in shapes and shapes[n] != s
  ]
  if problems:
    raise ValueError(f"{folder}: the weights do not fit config.json:\n" + "\n".join(problems))
