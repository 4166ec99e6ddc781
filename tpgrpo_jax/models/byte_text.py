"""Text encoders without weights: UTF-8 bytes and their places, one-hot; a token a byte, or a word."""

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


HALF_BYTES = 32  # numbers a byte: its two halves, one-hot
# What a one counts for: with so much, a usual sentence has numbers of mean square 1, as learned embeddings
# have, in its tokens and in their pool. A twentieth of it, which one-hots would be, is learned slowly.
_ONE, _ONE_POOLED = 6.0, 3.0


def word_embedding_dim(words: int, letters: int) -> int:
  """Width of the sequence and of the pooled embedding of `encode_words`."""
  return letters * HALF_BYTES + words


def encode_words(texts: Sequence[str], words: int, letters: int) -> types.Condition:
  """Embeds each text as one token a word: [halves of its bytes, one-hot | place one-hot]; pools by the sum.

  A sentence takes a fifth of the tokens that `encode` needs, and the model need not learn to spell. A
  place without a byte is zero throughout, and so is a place without a word but for the place itself.

  Args:
    texts: N prompts; white space parts their words.
    words: W, tokens a prompt.
    letters: most bytes of a word.

  Returns:
    Condition(text [N, W, 32 letters + W], pooled [N, 32 letters + W]), float32.

  Raises:
    ValueError: a prompt of more words, or a word of more bytes.
  """
  text = np.zeros((len(texts), words, word_embedding_dim(words, letters)), np.float32)
  text[:, np.arange(words), letters * HALF_BYTES + np.arange(words)] = 1.0
  for rows, prompt in zip(text, texts):
    parts = [word.encode("utf-8") for word in prompt.split()]
    if len(parts) > words or max(map(len, parts), default=0) > letters:
      raise ValueError(
        f"prompt {prompt!r}: this model reads at most {words} words of {letters} bytes each. Shorten the "
        "prompt."
      )
    for row, raw in zip(rows, parts):
      codes, starts = np.frombuffer(raw, np.uint8), HALF_BYTES * np.arange(len(raw))
      row[starts + codes // 16] = row[starts + 16 + codes % 16] = 1.0
  pooled = _ONE_POOLED * text.sum(axis=1)
  return types.Condition(_ONE * text, pooled)  # pyright: ignore[reportArgumentType]
