"""The names of diffusers' ZImageTransformer2DModel."""

from collections.abc import Mapping

import numpy as np

from tpgrpo_jax.models import z_image
from tpgrpo_jax.models.hf import authors, table
from tpgrpo_jax.models.hf.authors import Rename
from tpgrpo_jax.models.hf.table import Entry

STACKS = ("layers", "noise_refiner", "context_refiner")
# The authors' modules, which kohya and ComfyUI name; other modules are called alike.
_ATTENTION, _INTO = rf"^({'|'.join(STACKS)})\.(\d+)\.attention", r"\1.\2.attention"
AUTHORS = (
  Rename(rf"{_ATTENTION}\.qkv$", tuple(f"{_INTO}.to_{side}" for side in "qkv")),
  Rename(rf"{_ATTENTION}\.out$", (f"{_INTO}.to_out.0",)),
  Rename(r"^x_embedder$", ("all_x_embedder.2-1",)),
  Rename(r"^final_layer\.linear$", ("all_final_layer.2-1.linear",)),
  Rename(r"^final_layer\.adaLN_modulation\.1$", ("all_final_layer.2-1.adaLN_modulation.1",)),
)


def names(config: z_image.ZImageConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a ZImage: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes.
    shapes: shape of every tensor of ours by dotted path.
  """
  size = f"{config.patch}-1"  # a patch of latents x a patch of frames
  # (pattern of our path, replacement); the first match of each pattern is applied, in order.
  renames = (
    (r"^x_embedder\b", f"all_x_embedder.{size}"),
    (r"^final_linear\b", f"all_final_layer.{size}.linear"),
    (r"^final_modulation\b", f"all_final_layer.{size}.adaLN_modulation.1"),
    (r"^t_embedder\.linear_1\b", "t_embedder.mlp.0"),
    (r"^t_embedder\.linear_2\b", "t_embedder.mlp.2"),
    (r"^cap_norm\b", "cap_embedder.0"),
    (r"^cap_embedder\.(kernel|bias)", r"cap_embedder.1.\1"),
    (r"\bmodulation\b", "adaLN_modulation.0"),
    (r"\bto_out\b", "to_out.0"),
    (r"\.(kernel|scale)$", ".weight"),
  )
  return table.stacked_names(shapes, STACKS, renames)


def rename_adapters(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As `authors.rename_adapters`, of Z-Image."""
  return authors.rename_adapters(found, AUTHORS)
