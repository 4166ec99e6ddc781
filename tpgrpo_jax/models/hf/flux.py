"""The names of diffusers' FluxTransformer2DModel."""

from collections.abc import Mapping

from tpgrpo_jax.models import flux
from tpgrpo_jax.models.hf import table
from tpgrpo_jax.models.hf.table import Entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder|text_embedder)", r"time_text_embed.\1"),
  (r"\b(ff|ff_context)\.linear_1", r"\1.net.0.proj"),
  (r"\b(ff|ff_context)\.linear_2", r"\1.net.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
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
