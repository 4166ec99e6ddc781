"""Prompts become one-hots of their bytes and places; nothing of them is lost."""

import numpy as np
import pytest

from tpgrpo_jax.models import byte_text


def decode(text):
  """The bytes that an embedding holds, without its padding."""
  return bytes(text[:, : byte_text.BYTES].argmax(axis=-1).astype(np.uint8)).rstrip(b"\0")


@pytest.mark.parametrize("prompt", ["", "CAT", "abc 12", "é†", "六"])
def test_a_prompt_can_be_read_back(prompt):
  condition = byte_text.encode([prompt], 6)
  assert decode(condition.text[0]).decode() == prompt


def test_shapes_are_those_that_embedding_dim_promises():
  condition = byte_text.encode(["CAT", "A"], 5)
  width = byte_text.embedding_dim(5)
  assert condition.text.shape == (2, 5, width)
  assert condition.pooled.shape == (2, width)
  assert condition.text.dtype == condition.pooled.dtype == np.float32


def test_every_token_carries_its_place():
  places = byte_text.encode(["AA"], 4).text[0, :, byte_text.BYTES :]
  np.testing.assert_array_equal(places, np.eye(4))


def test_pooled_embedding_ignores_the_order_of_the_characters():
  pooled = byte_text.encode(["TAC", "CAT"], 4).pooled
  np.testing.assert_array_equal(pooled[0], pooled[1])


def test_embedding_does_not_depend_on_the_batch():
  alone, among = byte_text.encode(["CAT"], 4), byte_text.encode(["DOG", "CAT"], 4)
  np.testing.assert_array_equal(alone.text[0], among.text[1])


@pytest.mark.parametrize("prompt, size", [("LONGER", 6), ("ééé", 6)])
def test_prompt_of_too_many_bytes_is_refused(prompt, size):
  with pytest.raises(ValueError) as caught:
    byte_text.encode(["CAT", prompt], 5)
  message = str(caught.value)
  assert f"{prompt!r}: {size} bytes" in message
  assert "at most 5" in message
  assert "Shorten the prompt" in message


def decode_words(text, letters):
  """The words that an embedding of `encode_words` holds."""
  halves = text[:, : letters * byte_text.HALF_BYTES].reshape(len(text), letters, 2, 16)
  codes = halves.argmax(axis=-1) @ [16, 1]
  return [
    bytes(row[used].astype(np.uint8)).decode() for row, used in zip(codes, halves.any((2, 3)))
  ]


@pytest.mark.parametrize("prompt", ["", "a red circle", "é† \t 六 B2", "one two  three four"])
def test_words_can_be_read_back(prompt):
  condition = byte_text.encode_words([prompt, "xx"], 4, 6)
  width = byte_text.word_embedding_dim(4, 6)
  assert condition.text.shape == (2, 4, width) and condition.pooled.shape == (2, width)
  found = decode_words(condition.text[0], 6)
  assert found == prompt.split() + [""] * (4 - len(prompt.split()))
  one = condition.text.max()
  np.testing.assert_array_equal(condition.text[0, :, -4:], one * np.eye(4))
  np.testing.assert_allclose(condition.pooled[0], condition.text[0].sum(axis=0) / 2)


def test_words_of_a_usual_sentence_have_mean_square_one():
  condition = byte_text.encode_words(["a blue square left of a green triangle"], 8, 10)
  assert 0.5 < np.mean(condition.text**2) < 2 and 0.5 < np.mean(condition.pooled**2) < 5


@pytest.mark.parametrize("prompt", ["a b c d e", "triangle"])
def test_prompt_of_too_many_or_too_long_words_is_refused(prompt):
  with pytest.raises(ValueError, match=f"prompt '{prompt}': .* at most 4 words of 6 bytes"):
    byte_text.encode_words([prompt], 4, 6)
