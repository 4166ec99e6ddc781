"""Weights in diffusers' layout: the only place that knows foreign tensor names.

One table (`names` of sd3.py) gives, for every tensor of ours, its foreign name and the change of
layout; loading and saving both read it.
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from tpgrpo_jax.models import mmdit
from tpgrpo_jax.models.hf.sd3 import names, rename
from tpgrpo_jax.models.hf.table import Entry, flatten

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


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


__all__ = [
  "CONFIG_FILE",
  "WEIGHTS_FILE",
  "Entry",
  "flatten",
  "load_config",
  "load_transformer",
  "names",
  "rename",
  "save_transformer",
]
