"""The names of diffusers' FluxTransformer2DModel."""

from collections.abc import Mapping
import re

from tpgrpo_jax.models import flux
from tpgrpo_jax.models.hf.table import Entry, make_entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|guidance_embedder|text_embedder)", r"time_text_embed.\1"),
  (r"\b(ff|ff_context)\.linear_1", r"\1.net.0.proj"),
  (r"\b(ff|ff_context)\.linear_2", r"\1.net.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)


def names(config: flux.FluxConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a Flux: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes; no name or layout depends on them.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  entries = []
  for path, shape in sorted(shapes.items()):
    stack = re.match(r"((?:single_)?transformer_blocks)\.(.*)", path)
    if not stack:
      entries.append(make_entry(path, None, rename(path), shape))
      continue
    for i in range(shape[0]):
      name = rename(f"{stack[1]}.{i}.{stack[2]}")
      entries.append(make_entry(path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> diffusers' name, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path
