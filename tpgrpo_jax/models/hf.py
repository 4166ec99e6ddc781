"""Weights in diffusers' layout: the only file that knows foreign tensor names.

One table (`names`) gives, for every tensor of ours, its foreign name and the change of layout; loading
and saving both read it.
"""

from collections.abc import Callable, Mapping
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from tpgrpo_jax.models import mmdit

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|text_embedder)", r"time_text_embed.\1"),
  (r"\b(ff|ff_context)\.linear_1", r"\1.net.0.proj"),
  (r"\b(ff|ff_context)\.linear_2", r"\1.net.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)


class Entry(NamedTuple):
  """One foreign tensor: where it lives here, what it is called there, its shape there, both layouts."""

  path: str
  block: int | None  # index on the leading axis of a stack
  name: str
  shape: tuple[int, ...]
  to_foreign: Callable[[np.ndarray], np.ndarray]
  from_foreign: Callable[[np.ndarray], np.ndarray]


def names(config: mmdit.MMDiTConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for an MMDiT: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes.
    shapes: shape of every tensor of ours by dotted path.
  """
  first = np.cumsum([0] + [count for _, _, count in mmdit.block_runs(config)])
  entries = []
  for path, shape in sorted(shapes.items()):
    stack = re.match(r"blocks_(\d+)\.(.*)", path)
    if not stack:
      entries.append(_entry(config, path, None, path, shape))
      continue
    start = int(first[int(stack[1])])
    for i in range(shape[0]):
      name = f"transformer_blocks.{start + i}.{stack[2]}"
      entries.append(_entry(config, path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> diffusers' name, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def _entry(config, path, block, name, shape):
  name = rename(name)
  if path == "pos_embed.pos_embed":
    rows, columns, width = shape
    foreign = (1, rows * columns, width)
    return Entry(
      path, block, name, foreign, lambda x: x.reshape(foreign), lambda x: x.reshape(shape)
    )
  if path == "pos_embed.proj.kernel":
    p, c, d = config.patch_size, config.in_channels, config.width
    return Entry(
        path, block, name, (d, c, p, p),
        lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
    )  # fmt: skip
  if path.endswith(".kernel"):
    return Entry(path, block, name, shape[::-1], lambda x: x.T, lambda x: x.T)
  return Entry(path, block, name, shape, lambda x: x, lambda x: x)


def flatten(tree: Any) -> dict[str, Any]:
  """Nested dict -> {dotted path: leaf}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def load_config(folder: str | os.PathLike[str]) -> mmdit.MMDiTConfig:
  """Reads folder/config.json.

  Raises:
    ValueError: no such folder or file, or a config of another architecture.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  if not path.is_file():
    raise ValueError(
      f"model.path={str(folder)!r}: no {CONFIG_FILE} in it. Point it at a transformer folder in "
      "diffusers' layout, or leave it empty for the weights that ship with the variant."
    )
  raw = json.loads(path.read_text())
  if raw.get("_class_name", "SD3Transformer2DModel") != "SD3Transformer2DModel":
    raise ValueError(f"{path}: is a {raw['_class_name']}; this loader reads SD3Transformer2DModel.")
  return mmdit.MMDiTConfig.from_diffusers(raw)


def load_transformer(folder: str | os.PathLike[str], abstract: Any) -> Any:
  """Reads the weights of an MMDiT as NumPy arrays.

  Args:
    folder: holds config.json and diffusion_pytorch_model.safetensors.
    abstract: the wanted params, a nested dict of things with a shape.

  Raises:
    ValueError: a missing file, or tensors that are missing, left over or misshapen; all are listed.
  """
  config = load_config(folder)
  path = pathlib.Path(folder) / WEIGHTS_FILE
  if not path.is_file():
    raise ValueError(f"model.path={str(folder)!r}: no {WEIGHTS_FILE} in it.")
  try:
    tensors = safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path}: not a readable safetensors file ({error}). Fetch it again."
    ) from error
  wanted = flatten(abstract)
  entries = names(config, {k: tuple(v.shape) for k, v in wanted.items()})
  _check(path, entries, tensors)
  loaded: dict[str, np.ndarray] = {}
  for entry in entries:
    value = entry.from_foreign(tensors[entry.name])
    if entry.block is None:
      loaded[entry.path] = np.ascontiguousarray(value)
    else:
      stack = loaded.setdefault(entry.path, np.empty(wanted[entry.path].shape, value.dtype))
      stack[entry.block] = value
  return jax.tree_util.tree_map_with_path(
    lambda p, _: loaded[".".join(str(k.key) for k in p)], abstract
  )


def _check(path, entries, tensors):
  wanted = {e.name: e.shape for e in entries}
  problems = [f"  missing: {n} {s}" for n, s in wanted.items() if n not in tensors]
  problems += [f"  not used: {n} {tuple(t.shape)}" for n, t in tensors.items() if n not in wanted]
  problems += [
    f"  misshapen: {n} is {tuple(tensors[n].shape)}, must be {s}"
    for n, s in wanted.items()
    if n in tensors and tuple(tensors[n].shape) != s
  ]
  if problems:
    raise ValueError(f"{path} does not fit its config.json:\n" + "\n".join(problems))


def save_transformer(
  folder: str | os.PathLike[str], config: mmdit.MMDiTConfig, params: Any
) -> None:
  """Writes config.json and safetensors that diffusers' SD3Transformer2DModel.from_pretrained reads.

  Args:
    folder: made when it does not exist.
    config: sizes.
    params: all weights, a nested dict without adapters.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tree = flatten(params)
  tensors = {}
  for entry in names(config, {k: tuple(v.shape) for k, v in tree.items()}):
    value = np.asarray(tree[entry.path])
    value = value if entry.block is None else value[entry.block]
    tensors[entry.name] = np.ascontiguousarray(entry.to_foreign(value))
  safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
  raw = {"_class_name": "SD3Transformer2DModel", **config.__dict__}
  (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2) + "\n")
