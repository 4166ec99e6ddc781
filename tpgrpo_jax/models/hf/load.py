"""The weights of any known model from its folder straight into device arrays."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from tpgrpo_jax.models.hf import architectures, arrays, files
from tpgrpo_jax.models.hf.table import flatten


def load_params(
  folder: str | os.PathLike[str],
  abstract: Any,
  *,
  shardings: Any = None,
  dtype: Any = None,
  subfolder: str = "",
  file: str = "",
  field: str = "model.path",
) -> Any:
  """Reads the weights of any model in ARCHITECTURES onto the devices.

  Every process reads the parts that its own devices hold, one tensor at a time, and stacks of blocks
  are filled in place on the devices. The host holds a tensor, or as much of it as its devices need,
  and no more, whatever the model's size.

  Args:
    folder: holds config.json and safetensors, single or in shards; a pipeline; or a hub id.
    abstract: the wanted params, a nested dict of things with shape and dtype.
    shardings: the same tree of shardings; by default those of `abstract`, or else the first device.
    dtype: of all weights that are floating-point; by default those of `abstract`.
    subfolder: the part of a pipeline; not used where there is no such subfolder.
    file: a safetensors file or index in the folder; by default the usual names are tried.
    field: the config field that holds `folder`, for messages.

  Raises:
    ValueError: a folder or file that cannot be read, or tensors that are missing, left over or
      misshapen; all are listed.
  """
  root = files.resolve(folder, subfolder=subfolder, field=field)
  architecture, config = architectures.read_architecture(root, field)
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
  entries = architecture.names(config, shapes)
  if dtype is not None:
    cast = lambda x: x.update(dtype=dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    abstract = jax.tree.map(lambda x: cast(_abstract(x)), abstract)
  tensors = files.find_tensors(root, file=file, field=field)
  return arrays.read_params(
    root, tensors, entries, abstract, shardings=shardings, aliases=architecture.aliases
  )


def load_transformer(folder: str | os.PathLike[str], abstract: Any) -> Any:
  """`load_params` with everything by default."""
  return load_params(folder, abstract)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and, if it has one, sharding of an array or of a thing like one."""
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
