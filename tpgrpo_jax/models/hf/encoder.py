"""Reads the weights of an encoder from a folder that transformers wrote."""

from collections.abc import Callable, Iterable
import os
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models.hf import arrays, files
from tpgrpo_jax.models.hf.table import Entry, flatten, read_sizes

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
  return files.read_json(path)


def read_config(cls: Any, folder: str | os.PathLike[str]) -> Any:
  """The sizes in folder/config.json, of a class with `from_transformers`; raises as `load_json`."""
  path = pathlib.Path(folder) / CONFIG_FILE
  return read_sizes(cls, cls.from_transformers, load_json(folder), path)


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


def outline(create: Callable[[nnx.Rngs], nnx.Module], dtype: Any) -> tuple[Any, Any]:
  """(graphdef, shapes of the weights as `load_encoder` stores them); nothing is computed."""
  graphdef, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

  def stored(path, leaf):
    large = path[-1].key in ("kernel", "token_embedding")
    return jax.ShapeDtypeStruct(leaf.shape, dtype if large else jnp.float32)

  return graphdef, jax.tree_util.tree_map_with_path(stored, nnx.to_pure_dict(state))


def load_encoder(
  folder: str | os.PathLike[str],
  table: Table,
  config: Any,
  create: Callable[[nnx.Rngs], nnx.Module],
  *,
  file: str = "",
  dtype: Any = jnp.float32,
  shardings: Callable[[Any], Any] | None = None,
  rule: str = "its config.json",
) -> Encoder:
  """Builds an encoder of a folder's weights, its tensors stored in `dtype`.

  Args:
    folder: holds model.safetensors, or an index and its shards.
    table: of this kind of encoder.
    config: its sizes.
    create: makes the model; only its shapes are asked for.
    file: a safetensors file or index in the folder; by default the usual names are tried.
    dtype: of kernels and of token tables; the rest, which is small, is float32.
    shardings: tree of shapes -> tree of shardings; by default the default device.
    rule: what the tensors must fit, for messages.

  Raises:
    ValueError: a missing or unreadable file, or tensors that are missing, left over or misshapen; all
      are listed.
  """
  graphdef, abstract = outline(create, dtype)
  entries = table.names(config, {path: leaf.shape for path, leaf in flatten(abstract).items()})
  root = pathlib.Path(folder)
  weights = arrays.read_params(
    root,
    files.find_tensors(root, file=file, field=""),
    entries,
    abstract,
    shardings=None if shardings is None else shardings(abstract),
    aliases=table.aliases,
    rule=rule,
  )
  return Encoder(config, graphdef, weights)
