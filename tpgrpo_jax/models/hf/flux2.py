"""The names of diffusers' Flux2Transformer2DModel."""

from collections.abc import Mapping

import numpy as np

from tpgrpo_jax.models import flux2
from tpgrpo_jax.models.hf import authors, table
from tpgrpo_jax.models.hf.authors import Rename
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder)", r"time_guidance_embed.\1"),
  (r"^(transformer_blocks\..*)\bto_out\b", r"\1to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)
# The authors' modules, which ai-toolkit and ComfyUI name. (Their final modulation has shift and scale in the
# other order; an adapter of it is not read.)
_DOUBLE, _INTO = r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."
_SINGLE = r"^single_blocks\.(\d+)\."
AUTHORS = (
  Rename(rf"{_DOUBLE}img_attn\.qkv$", tuple(f"{_INTO}attn.to_{side}" for side in "qkv")),
  Rename(rf"{_DOUBLE}txt_attn\.qkv$", tuple(f"{_INTO}attn.add_{side}_proj" for side in "qkv")),
  Rename(rf"{_DOUBLE}img_attn\.proj$", (f"{_INTO}attn.to_out.0",)),
  Rename(rf"{_DOUBLE}txt_attn\.proj$", (f"{_INTO}attn.to_add_out",)),
  Rename(rf"{_DOUBLE}img_mlp\.0$", (f"{_INTO}ff.linear_in",)),
  Rename(rf"{_DOUBLE}img_mlp\.2$", (f"{_INTO}ff.linear_out",)),
  Rename(rf"{_DOUBLE}txt_mlp\.0$", (f"{_INTO}ff_context.linear_in",)),
  Rename(rf"{_DOUBLE}txt_mlp\.2$", (f"{_INTO}ff_context.linear_out",)),
  Rename(rf"{_SINGLE}linear1$", (r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj",)),
  Rename(rf"{_SINGLE}linear2$", (r"single_transformer_blocks.\1.attn.to_out",)),
  Rename(r"^img_in$", ("x_embedder",)),
  Rename(r"^txt_in$", ("context_embedder",)),
  Rename(r"^final_layer\.linear$", ("proj_out",)),
  Rename(r"^time_in\.in_layer$", ("time_guidance_embed.timestep_embedder.linear_1",)),
  Rename(r"^time_in\.out_layer$", ("time_guidance_embed.timestep_embedder.linear_2",)),
  Rename(r"^((double|single)_stream_modulation(_img|_txt)?)\.lin$", (r"\1.linear",)),
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
  """As `authors.rename_adapters`, of FLUX.2."""
  return authors.rename_adapters(found, AUTHORS)
