"""The names of diffusers' Flux2Transformer2DModel."""

from collections.abc import Mapping

from tpgrpo_jax.models import flux2
from tpgrpo_jax.models.hf import table
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder)", r"time_guidance_embed.\1"),
  (r"^(transformer_blocks\..*)\bto_out\b", r"\1to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
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
