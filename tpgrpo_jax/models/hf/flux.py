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
# Where FLUX.2's authors name a module alike, diffusers does too. (Of the final modulation they have shift and
# scale in the other order; an adapter of it is not read.)
DOUBLE, INTO = r"^double_blocks\.(\d+)\.", r"transformer_blocks.\1."
SINGLE, INTO_SINGLE = r"^single_blocks\.(\d+)\.", r"single_transformer_blocks.\1."
SHARED_AUTHORS = (
  Rename(rf"{DOUBLE}img_attn\.qkv$", tuple(f"{INTO}attn.to_{side}" for side in "qkv")),
  Rename(rf"{DOUBLE}txt_attn\.qkv$", tuple(f"{INTO}attn.add_{side}_proj" for side in "qkv")),
  Rename(rf"{DOUBLE}img_attn\.proj$", (f"{INTO}attn.to_out.0",)),
  Rename(rf"{DOUBLE}txt_attn\.proj$", (f"{INTO}attn.to_add_out",)),
  Rename(r"^img_in$", ("x_embedder",)),
  Rename(r"^txt_in$", ("context_embedder",)),
  Rename(r"^final_layer\.linear$", ("proj_out",)),
)


def embedder(theirs: str, ours: str) -> tuple[Rename, Rename]:
  """The two layers of an embedder."""
  layers = ((r"\.in_layer$", ".linear_1"), (r"\.out_layer$", ".linear_2"))
  first, second = (Rename(f"^{theirs}{a}", (f"{ours}{b}",)) for a, b in layers)
  return first, second


# The authors' modules, which kohya, ai-toolkit and ComfyUI name.
AUTHORS = (
  *SHARED_AUTHORS,
  Rename(rf"{DOUBLE}img_mlp\.0$", (f"{INTO}ff.net.0.proj",)),
  Rename(rf"{DOUBLE}img_mlp\.2$", (f"{INTO}ff.net.2",)),
  Rename(rf"{DOUBLE}txt_mlp\.0$", (f"{INTO}ff_context.net.0.proj",)),
  Rename(rf"{DOUBLE}txt_mlp\.2$", (f"{INTO}ff_context.net.2",)),
  Rename(rf"{DOUBLE}img_mod\.lin$", (f"{INTO}norm1.linear",)),
  Rename(rf"{DOUBLE}txt_mod\.lin$", (f"{INTO}norm1_context.linear",)),
  Rename(
    rf"{SINGLE}linear1$",
    (*(f"{INTO_SINGLE}attn.to_{side}" for side in "qkv"), f"{INTO_SINGLE}proj_mlp"),
    (1, 1, 1, 4),
  ),
  Rename(rf"{SINGLE}linear2$", (f"{INTO_SINGLE}proj_out",)),
  Rename(rf"{SINGLE}modulation\.lin$", (f"{INTO_SINGLE}norm.linear",)),
  *embedder("time_in", "time_text_embed.timestep_embedder"),
  *embedder("guidance_in", "time_text_embed.guidance_embedder"),
  *embedder("vector_in", "time_text_embed.text_embedder"),
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
