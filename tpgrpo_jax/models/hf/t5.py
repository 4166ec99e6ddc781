"""The names of transformers' T5EncoderModel."""

from collections.abc import Iterable, Mapping
import os
from typing import Any

import jax.numpy as jnp

from tpgrpo_jax.models import t5
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf.table import Entry, stacked_names

# (pattern of our path, replacement), applied in order.
RENAMES = (
  (r"^blocks_0\b", "encoder.block"),
  (r"^token_embedding$", "shared.weight"),
  (r"^relative_bias$", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
  (r"^final_layer_norm\b", "encoder.final_layer_norm"),
  (r"\battention_norm\b", "layer.0.layer_norm"),
  (r"\bff_norm\b", "layer.1.layer_norm"),
  (r"\battention\.to_(q|k|v)\b", r"layer.0.SelfAttention.\1"),
  (r"\battention\.to_out\b", "layer.0.SelfAttention.o"),
  (r"\bff\.", "layer.1.DenseReluDense."),
  (r"\.(kernel|scale)$", ".weight"),
)
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight


def names(config: t5.T5Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a T5Encoder: our tensors {dotted path: shape} -> transformers' tensors.

  Args:
    config: sizes; the table follows from the shapes alone.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return stacked_names(shapes, ("blocks_0",), RENAMES)


def aliases(found: Iterable[str]) -> dict[str, str]:
  """{the table's name: the file's name} of the tensors in a file.

  The token embedding is stored under either of its two names, or under both.
  """
  found = set(found)
  renamed = {name: name for name in found - {TIED}}
  if TIED in found:
    renamed.setdefault("shared.weight", TIED)
  return renamed


TABLE = encoder.Table(names, aliases)


def load_t5(
  folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """Loads a t5.T5Encoder from the folder of a T5EncoderModel.

  Args:
    folder: holds config.json and the weights.
    dtype: float32 or bfloat16, of the weights and of the matrix products' terms.
    shardings: as of encoder.load_encoder.

  Raises:
    ValueError: another kind of model, or weights that do not fit.
  """
  config = encoder.read_config(t5.T5Config, folder)
  create = lambda rngs: t5.T5Encoder(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(folder, TABLE, config, create, dtype=dtype, shardings=shardings)
