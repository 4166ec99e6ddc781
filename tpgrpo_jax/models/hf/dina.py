"""The names of DiNa-LRM: its backbone in the files of the transformer that it comes from, and its head."""

from collections.abc import Iterable, Mapping
import re

from tpgrpo_jax.models import dina
from tpgrpo_jax.models.hf import encoder, sd3
from tpgrpo_jax.models.hf.table import Entry, same_names, stacked_names

STACKS = ("layer_adapters_visual", "layer_adapters_text")
# (pattern of our path, replacement); the first match of each pattern is applied, in order.
RENAMES = (
  (r"\b(cond_mlp|ff|gate_vis|gate_text)\.linear_1\b", r"\1.0"),
  (r"\b(cond_mlp|ff|gate_vis|gate_text)\.linear_2\b", r"\1.2"),
  (r"\bto_out\b", "to_out.0"),
  (r"\.(kernel|scale)$", ".weight"),
)
HEAD = encoder.Table(lambda config, shapes: stacked_names(shapes, STACKS, RENAMES), same_names)


def names(config: dina.BackboneConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a dina.Backbone: our tensors {dotted path: shape} -> those of diffusers' transformer.

  Args:
    config: sizes.
    shapes: shape of every tensor of ours by dotted path.
  """
  ends = [end for _, end in config.runs]
  entries = []
  for path, shape in sorted(shapes.items()):
    stack = re.match(r"blocks_(\d+)\.(.*)", path)
    if not stack:
      entries.append(sd3.entry(config.transformer, path, None, path, shape))
      continue
    start = ends[int(stack[1])] - shape[0]
    for i in range(shape[0]):
      name = f"transformer_blocks.{start + i}.{stack[2]}"
      entries.append(sd3.entry(config.transformer, path, i, name, shape[1:]))
  return entries


def beginning(config: dina.BackboneConfig, found: Iterable[str]) -> dict[str, str]:
  """{name: name} of the tensors before the last tap; the rest of the transformer is not read."""
  block = lambda name: int((re.match(r"transformer_blocks\.(\d+)\.", name) or [0, -1])[1])
  last = config.taps[-1]
  return {
    name: name
    for name in found
    if block(name) < last and not name.startswith(("norm_out.", "proj_out."))
  }
