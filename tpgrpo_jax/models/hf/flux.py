"""The names of diffusers' FluxTransformer2DModel."""

from collections.abc import Mapping

import numpy as np

from tpgrpo_jax.models import flux
from tpgrpo_jax.models.hf import authors, table
from tpgrpo_jax.models.hf.authors import Rename
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder|text_embedder)", r"time_text_embed.\1"),
  (r"\b(ff|ff_context)\.linear_1", r"\1.net.0.proj"),
  (r"\b(ff|ff_context)\.linear_2", r"\1.net.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)
# The authors' modules, which kohya, ai-toolkit and ComfyUI name; the final modulation as in flux2.py.
_DOUBLE, _INTO = r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."
_SINGLE, _INTO_SINGLE = r"^single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
AUTHORS = (
  Rename(rf"{_DOUBLE}img_attn\.qkv$", tuple(f"{_INTO}attn.to_{side}" for side in "qkv")),
  Rename(rf"{_DOUBLE}txt_attn\.qkv$", tuple(f"{_INTO}attn.add_{side}_proj" for side in "qkv")),
  Rename(rf"{_DOUBLE}img_attn\.proj$", (f"{_INTO}attn.to_out.0",)),
  Rename(rf"{_DOUBLE}txt_attn\.proj$", (f"{_INTO}attn.to_add_out",)),
  Rename(rf"{_DOUBLE}img_mlp\.0$", (f"{_INTO}ff.net.0.proj",)),
  Rename(rf"{_DOUBLE}img_mlp\.2$", (f"{_INTO}ff.net.2",)),
  Rename(rf"{_DOUBLE}txt_mlp\.0$", (f"{_INTO}ff_context.net.0.proj",)),
  Rename(rf"{_DOUBLE}txt_mlp\.2$", (f"{_INTO}ff_context.net.2",)),
  Rename(rf"{_DOUBLE}img_mod\.lin$", (f"{_INTO}norm1.linear",)),
  Rename(rf"{_DOUBLE}txt_mod\.lin$", (f"{_INTO}norm1_context.linear",)),
  Rename(
    rf"{_SINGLE}linear1$",
    (*(f"{_INTO_SINGLE}attn.to_{side}" for side in "qkv"), f"{_INTO_SINGLE}proj_mlp"),
    (1, 1, 1, 4),
  ),
  Rename(rf"{_SINGLE}linear2$", (f"{_INTO_SINGLE}proj_out",)),
  Rename(rf"{_SINGLE}modulation\.lin$", (f"{_INTO_SINGLE}norm.linear",)),
  Rename(r"^img_in$", ("x_embedder",)),
  Rename(r"^txt_in$", ("context_embedder",)),
  Rename(r"^final_layer\.linear$", ("proj_out",)),
  Rename(r"^time_in\.in_layer$", ("time_text_embed.timestep_embedder.linear_1",)),
  Rename(r"^time_in\.out_layer$", ("time_text_embed.timestep_embedder.linear_2",)),
  Rename(r"^guidance_in\.in_layer$", ("time_text_embed.guidance_embedder.linear_1",)),
  Rename(r"^guidance_in\.out_layer$", ("time_text_embed.guidance_embedder.linear_2",)),
  Rename(r"^vector_in\.in_layer$", ("time_text_embed.text_embedder.linear_1",)),
  Rename(r"^vector_in\.out_layer$", ("time_text_embed.text_embedder.linear_2",)),
)
STACKS = ("transformer_blocks", "single_transformer_blocks")


def names(config: flux.FluxConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a Flux: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes; no name or layout depends on them.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return table.stacked_names(shapes, STACKS, RENAMES)


def rename_adapters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As `authors.rename_adapters`, of FLUX.1."""
  return authors.rename_adapters(found, AUTHORS)
