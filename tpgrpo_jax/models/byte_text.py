"""A text encoder without weights: UTF-8 bytes and their places, one-hot."""

from collections.abc import Sequence

import numpy as np

from tpgrpo_jax import types

BYTES = 256


def embedding_dim(length: int) -> int:
  """Width of the sequence and of the pooled embedding for prompts of `length` bytes."""
  return BYTES + length


def encode(texts: Sequence[str], length: int) -> types.Condition:
  """Embeds each text as [byte one-hot | place one-hot] tokens, and pools by their mean.

  Byte 0 pads. The transformer's own input projections turn the one-hots into learned embeddings,
  so nothing is lost by not having weights here.

  Args:
    texts: N prompts.
    length: L, tokens a prompt.

  Returns:
    Condition(text [N, L, 256 + L], pooled [N, 256 + L]), float32.

  Raises:
    ValueError: a prompt of more than L bytes.
  """
  codes = np.zeros((len(texts), length), np.int64)
  for row, text in zip(codes, texts):
    raw = text.encode("utf-8")
    if len(raw) > length:
      raise ValueError(
        f"prompt {text!r}: {len(raw)} bytes, but this model reads at most {length}. "
        "Shorten the prompt, or use a model with a longer text_length."
      )
    row[: len(raw)] = np.frombuffer(raw, np.uint8)
  text = np.zeros((*codes.shape, embedding_dim(length)), np.float32)
  np.put_along_axis(text, codes[..., None], 1.0, axis=-1)
  text[:, np.arange(length), BYTES + np.arange(length)] = 1.0
  return types.Condition(text, text.mean(axis=1))  # pyright: ignore[reportArgumentType]
