"""The names of diffusers' Flux2Transformer2DModel."""

from collections.abc import Mapping
import re

import numpy as np

from tpgrpo_jax.models import flux2
from tpgrpo_jax.models.hf import table
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder)", r"time_guidance_embed.\1"),
  (r"^(transformer_blocks\..*)\bto_out\b", r"\1to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)
# The authors' modules, which ai-toolkit and ComfyUI name: (pattern, diffusers' names). Where there are three,
# one matrix makes queries, keys and values.
_DOUBLE, _INTO = r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."
AUTHORS = (
  (rf"{_DOUBLE}img_attn\.qkv$", [f"{_INTO}attn.to_{side}" for side in "qkv"]),
  (rf"{_DOUBLE}txt_attn\.qkv$", [f"{_INTO}attn.add_{side}_proj" for side in "qkv"]),
  (rf"{_DOUBLE}img_attn\.proj$", [f"{_INTO}attn.to_out.0"]),
  (rf"{_DOUBLE}txt_attn\.proj$", [f"{_INTO}attn.to_add_out"]),
  (rf"{_DOUBLE}img_mlp\.0$", [f"{_INTO}ff.linear_in"]),
  (rf"{_DOUBLE}img_mlp\.2$", [f"{_INTO}ff.linear_out"]),
  (rf"{_DOUBLE}txt_mlp\.0$", [f"{_INTO}ff_context.linear_in"]),
  (rf"{_DOUBLE}txt_mlp\.2$", [f"{_INTO}ff_context.linear_out"]),
  (r"^single_blocks\.(\d+)\.linear1$", [r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj"]),
  (r"^single_blocks\.(\d+)\.linear2$", [r"single_transformer_blocks.\1.attn.to_out"]),
  (r"^img_in$", ["x_embedder"]),
  (r"^txt_in$", ["context_embedder"]),
  (r"^final_layer\.linear$", ["proj_out"]),
  (r"^time_in\.in_layer$", ["time_guidance_embed.timestep_embedder.linear_1"]),
  (r"^time_in\.out_layer$", ["time_guidance_embed.timestep_embedder.linear_2"]),
  (r"^((double|single)_stream_modulation(_img|_txt)?)\.lin$", [r"\1.linear"]),
)
STACKS = ("transformer_blocks", "single_transformer_blocks")


def names(config: flux2.Flux2Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a Flux2: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes; no name or layout depends on them.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return table.stacked_names(shapes, STACKS, RENAMES)


def rename_adapters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adapters under the authors' names -> the same under diffusers'; other names stay.

  An adapter of one matrix that makes queries, keys and values is one of each: A is theirs together, and B
  has a third of its rows for each. (The authors' final modulation has shift and scale in the other order;
  an adapter of it is not read.)
  """
  renamed = {}
  for name, tensor in found.items():
    short = re.sub(r"^diffusion_model\.", "", name)
    match = re.match(r"(.*)\.((?:lora_A|lora_B|lora_down|lora_up)\.weight|alpha)$", short)
    module, ending = match.groups() if match else (short, "")
    wanted = next(((p, n) for p, n in AUTHORS if re.match(p, module)), None)
    if wanted is None:
      renamed[name] = tensor
      continue
    pattern, names = wanted
    is_b = ending.startswith(("lora_B", "lora_up")) and len(names) > 1
    parts = np.split(tensor, len(names)) if is_b else [tensor] * len(names)
    for own, part in zip(names, parts):
      renamed[f"{re.sub(pattern, own, module)}.{ending}"] = part
  return renamed
