"""Prompts that are odd are told of at a run's start, and others are not."""

import pytest

from tpgrpo_jax.data import survey
from tpgrpo_jax.types import Prompt


def told(train, held_out):
  prompts = lambda texts: [t if isinstance(t, Prompt) else Prompt(t, {}) for t in texts]
  return list(survey.survey(prompts(train), prompts(held_out)))


def test_plain_prompts_are_not_spoken_of():
  assert (
    told(["a cat", "ein süßer Hund", "猫", "👩‍🎨 at work", "a  b"], ["a dog", "5\u00a0cm"]) == []
  )


def test_held_out_prompts_that_are_trained_on_are_counted():
  (line,) = told(["cat", "dog"], ["cow", "dog", "cat"])
  assert line.startswith("2 of 3 held-out prompts are trained on too, such as 'dog'")


def test_one_text_with_other_metadata_is_another_prompt():
  pictures = [Prompt("make it red", {"image": name}) for name in ("a.png", "b.png")]
  assert told(pictures[:1], pictures[1:]) == told(pictures, []) == []


def test_repetitions_are_counted():
  (line,) = told(["cat", "cat", "cat", "dog"], ["cow"])
  assert line.startswith("2 of 4 training prompts are repetitions")


@pytest.mark.parametrize(
  "text, name",
  [("cat\tdog", "U+0009"), ("cat\0", "U+0000"), ("\x1b[31mcat", "U+001B"), ("\u200bcat", "U+200B")],
)
def test_characters_that_nobody_sees_are_named(text, name):
  (line,) = told(["dog", text], ["cow"])
  assert line.startswith(f"1 of 3 prompts hold characters that nobody sees ({name}), such as ")
  assert text not in line  # a terminal would obey it
