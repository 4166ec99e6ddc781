"""The names of diffusers' SD3Transformer2DModel."""

from collections.abc import Mapping
import re

import numpy as np

from tpgrpo_jax.models import mmdit
from tpgrpo_jax.models.hf.table import Entry, make_entry

# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"^(timestep_embedder|text_embedder)", r"time_text_embed.\1"),
  (r"\b(ff|ff_context)\.linear_1", r"\1.net.0.proj"),
  (r"\b(ff|ff_context)\.linear_2", r"\1.net.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)


def names(config: mmdit.MMDiTConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for an MMDiT: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes.
    shapes: shape of every tensor of ours by dotted path.
  """
  first = np.cumsum([0] + [count for _, _, count in mmdit.block_runs(config)])
  entries = []
  for path, shape in sorted(shapes.items()):
    stack = re.match(r"blocks_(\d+)\.(.*)", path)
    if not stack:
      entries.append(entry(config, path, None, path, shape))
      continue
    start = int(first[int(stack[1])])
    for i in range(shape[0]):
      name = f"transformer_blocks.{start + i}.{stack[2]}"
      entries.append(entry(config, path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> diffusers' name, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def entry(
  config: mmdit.MMDiTConfig, path: str, block: int | None, name: str, shape: tuple[int, ...]
) -> Entry:
  """The line of one tensor of ours, of one block of a stack or of all: `name` is renamed here."""
  name = rename(name)
  if path == "pos_embed.pos_embed":
    rows, columns, width = shape
    foreign = (1, rows * columns, width)
    return Entry(
      path, block, name, foreign, lambda x: x.reshape(foreign), lambda x: x.reshape(shape)
    )
  if path == "pos_embed.proj.kernel":
    p, c, d = config.patch_size, config.in_channels, config.width
    return Entry(
        path, block, name, (d, c, p, p),
        lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
    )  # fmt: skip
  return make_entry(path, block, name, shape)
