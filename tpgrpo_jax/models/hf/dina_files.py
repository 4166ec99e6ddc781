"""Reads DiNa-LRM from files: the beginning of its transformer, its adapters, and its head."""

import os
import pathlib
from typing import Any

from tpgrpo_jax.models import dina, mmdit
from tpgrpo_jax.models.hf import adapters, arrays, encoder, files
from tpgrpo_jax.models.hf import dina as names_lib
from tpgrpo_jax.models.hf.table import flatten, read_sizes

CONVERT = """
The public head, checkpoint/rm_head.pt of liuhuohuo/DiNa-LRM-SD35M-12layers, is a pickle. Convert it once,
where torch and safetensors are installed, with these lines of Python:
  import torch, safetensors.torch
  weights = torch.load("rm_head.pt", map_location="cpu", weights_only=True)
  weights = {k: v.clone().contiguous() for k, v in weights.items()}
  safetensors.torch.save_file(weights, "rm_head.safetensors")"""


def load_backbone(
  path: str | os.PathLike[str],
  lora_path: str | os.PathLike[str],
  taps: tuple[int, ...],
  *,
  dtype: Any,
  shardings: Any = None,
) -> encoder.Encoder:
  """Loads the first blocks of a transformer, and merges the reward's adapters into them.

  Args:
    path: a transformer in diffusers' layout, or a pipeline: a folder or hub id.
    lora_path: the adapters in PEFT's layout; "" where the weights at path have them in them.
    taps: as of dina.BackboneConfig.
    dtype: float32 or bfloat16, of the weights and of the computation.
    shardings: tree of shapes -> tree of shardings; by default the default device.

  Raises:
    ValueError: another kind of model, or weights or adapters that do not fit.
  """
  folder = files.resolve(path, subfolder="transformer", field="path")
  raw = encoder.load_json(folder)
  if raw.get("_class_name") != "SD3Transformer2DModel":
    raise ValueError(
      f"path={str(path)!r}: holds a {raw.get('_class_name')}, must hold the SD3Transformer2DModel that the "
      "reward was made from, stabilityai/stable-diffusion-3.5-medium."
    )
  read = mmdit.MMDiTConfig.from_diffusers
  sizes = read_sizes(mmdit.MMDiTConfig, read, raw, folder / files.CONFIG_FILE)
  config = dina.BackboneConfig(sizes, taps)
  create = lambda rngs: dina.Backbone(config, dtype=dtype, rngs=rngs)
  graphdef, abstract = encoder.outline(create, dtype)
  weights = arrays.read_params(
    folder,
    files.find_tensors(folder, field="path"),
    names_lib.names(config, {p: leaf.shape for p, leaf in flatten(abstract).items()}),
    abstract,
    shardings=None if shardings is None else shardings(abstract),
    aliases=lambda found: names_lib.beginning(config, found),
  )
  if lora_path:
    adapter = adapters.load_lora(lora_path, config, abstract)
    params = {"frozen": weights, "trainable": adapter.trainable}
    weights = adapters.merge_lora(params, rank=adapter.rank, alpha=adapter.alpha)
  return encoder.Encoder(config, graphdef, weights)


def load_head(
  path: str | os.PathLike[str], *, heads: int, dtype: Any, shardings: Any = None
) -> encoder.Encoder:
  """Loads a dina.Head; all of its sizes but the heads of its attention are those of its tensors.

  Args:
    path: a safetensors file with the names of the authors' code.
    heads: of its attention.
    dtype: float32 or bfloat16, of the weights and of the computation.
    shardings: tree of shapes -> tree of shardings; by default the default device.

  Raises:
    ValueError: no such file, a pickle, or another head.
  """
  file = pathlib.Path(path)
  if not file.is_file() or file.suffix != ".safetensors":
    what = "not a safetensors file" if file.exists() else "no such file"
    raise ValueError(f"head={str(path)!r}: {what}.{CONVERT}")
  tensors = files.find_tensors(file.parent, file=file.name, field="head")
  config = _head_config(file, tensors, heads)
  create = lambda rngs: dina.Head(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(
    file.parent, names_lib.HEAD, config, create, file=file.name, dtype=dtype, shardings=shardings,
    rule="DiNa-LRM's head",
  )  # fmt: skip


def _head_config(file, tensors, heads) -> dina.HeadConfig:
  """The sizes that the tensors have."""
  try:
    _, queries, width = tensors["query_tokens"].shape
    token_dim = tensors["layer_adapters_visual.0.cond_mlp.0.weight"].shape[1]
  except (KeyError, ValueError, IndexError) as error:
    raise ValueError(
      f"head={str(file)!r}: holds {', '.join(sorted(tensors)[:4])} ...: must hold DiNa-LRM's head, with "
      f"query_tokens [1, Q, D] and layer_adapters_visual.0.cond_mlp.0.weight.{CONVERT}"
    ) from error
  if heads < 1 or width % heads:
    raise ValueError(f"heads={heads}: must divide the head's width, {width}.")
  taps = len({name.split(".")[1] for name in tensors if name.startswith(names_lib.STACKS[0])})
  projects = "layer_adapters_visual.0.proj_in.weight" in tensors
  return dina.HeadConfig(token_dim, width, taps, queries, heads, projects)
