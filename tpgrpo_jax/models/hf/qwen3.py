"""The names of transformers' Qwen3Model and Qwen3ForCausalLM."""

from collections.abc import Iterable, Mapping
import functools
import os
import re
from typing import Any

import jax.numpy as jnp

from tpgrpo_jax.models import qwen3
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf.table import Entry, stacked_names

# (pattern of our path, replacement), applied in order.
RENAMES = (
  (r"^blocks_0\b", "layers"),
  (r"^token_embedding$", "embed_tokens.weight"),
  (r"\battention_norm\b", "input_layernorm"),
  (r"\bmlp_norm\b", "post_attention_layernorm"),
  (r"\battention\.to_(q|k|v)\b", r"self_attn.\1_proj"),
  (r"\battention\.to_out\b", "self_attn.o_proj"),
  (r"\battention\.norm_(q|k)\b", r"self_attn.\1_norm"),
  (r"\.(kernel|scale)$", ".weight"),
)
PREFIX = "model."  # of a Qwen3ForCausalLM's tensors
_UNUSED = ("norm.weight", "lm_head.weight")  # what comes after the last layer


def names(config: qwen3.Qwen3Config, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a Qwen3Encoder: our tensors {dotted path: shape} -> transformers' tensors.

  Args:
    config: sizes; the table follows from the shapes alone.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return stacked_names(shapes, ("blocks_0",), RENAMES)


def aliases(found: Iterable[str], *, layers: int, of: int) -> dict[str, str]:
  """{the table's name: the file's name} of a file's tensors, without those of layers `layers` ... `of` - 1.

  Layers beyond what the config knows stay, so that they are refused: state -2 would be another one.
  """
  short = {name.removeprefix(PREFIX): name for name in found}
  number = lambda name: re.match(r"layers\.(\d+)\.", name)
  return {
    name: full
    for name, full in short.items()
    if name not in _UNUSED and not ((match := number(name)) and layers <= int(match[1]) < of)
  }


def load_qwen3(
  folder: str | os.PathLike[str],
  states: tuple[int, ...],
  *,
  dtype: Any = jnp.float32,
  shardings: Any = None,
) -> encoder.Encoder:
  """Loads a qwen3.Qwen3Encoder from the folder of a Qwen3Model or Qwen3ForCausalLM.

  Args:
    folder: holds config.json and the weights.
    states: ascending, after how many layers the states are wanted; negative numbers count from the end as
      in transformers' hidden_states: -2 is the state before the last layer.
    dtype: float32 or bfloat16, of the weights and of the matrix products' terms.
    shardings: as of encoder.load_encoder.

  Raises:
    ValueError: another kind of model, one with too few layers, or weights that do not fit.
  """
  config = encoder.read_config(qwen3.Qwen3Config, folder)
  states = tuple(n if n > 0 else config.num_hidden_layers + 1 + n for n in states)
  if not 0 < states[0] <= states[-1] < config.num_hidden_layers:
    raise ValueError(
      f"{str(folder)!r}: num_hidden_layers={config.num_hidden_layers}: the pipeline reads the states after "
      f"{', '.join(map(str, states))} layers, and one more must follow. Fetch the folder again."
    )
  create = lambda rngs: qwen3.Qwen3Encoder(config, states, dtype=dtype, rngs=rngs)
  table = encoder.Table(
    names, functools.partial(aliases, layers=states[-1], of=config.num_hidden_layers)
  )
  return encoder.load_encoder(folder, table, config, create, dtype=dtype, shardings=shardings)
