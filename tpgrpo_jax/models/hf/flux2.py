"""The names of diffusers' Flux2Transformer2DModel."""

from collections.abc import Mapping

import numpy as np

from tpgrpo_jax.models import flux2
from tpgrpo_jax.models.hf import authors, flux, table
from tpgrpo_jax.models.hf.authors import Rename
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder)", r"time_guidance_embed.\1"),
  (r"^(transformer_blocks\..*)\bto_out\b", r"\1to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)
# The authors' modules, which ai-toolkit and ComfyUI name.
AUTHORS = (
  *flux.SHARED_AUTHORS,
  Rename(rf"{flux.DOUBLE}img_mlp\.0$", (f"{flux.INTO}ff.linear_in",)),
  Rename(rf"{flux.DOUBLE}img_mlp\.2$", (f"{flux.INTO}ff.linear_out",)),
  Rename(rf"{flux.DOUBLE}txt_mlp\.0$", (f"{flux.INTO}ff_context.linear_in",)),
  Rename(rf"{flux.DOUBLE}txt_mlp\.2$", (f"{flux.INTO}ff_context.linear_out",)),
  Rename(rf"{flux.SINGLE}linear1$", (f"{flux.INTO_SINGLE}attn.to_qkv_mlp_proj",)),
  Rename(rf"{flux.SINGLE}linear2$", (f"{flux.INTO_SINGLE}attn.to_out",)),
  *flux.embedder("time_in", "time_guidance_embed.timestep_embedder"),
  Rename(r"^((double|single)_stream_modulation(_img|_txt)?)\.lin$", (r"\1.linear",)),
)

CONTAINERS = ("transformer_blocks.0.attn.to_out",)  # a list; in single blocks it is a module


def names(config: flux2.Flux2Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a Flux2: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes; no name or layout depends on them.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return table.stacked_names(shapes, flux.STACKS, RENAMES)


def rename_adapters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As `authors.rename_adapters`, of FLUX.2."""
  return authors.rename_adapters(found, AUTHORS)
