"""What is odd about the prompts of a run, and no error: told at its start."""

from collections.abc import Iterator, Sequence
import json
import unicodedata

from tpgrpo_jax.types import Prompt

_UNSEEN = ("Cc", "Cf", "Co", "Cn")  # control, format, private use, unassigned
_JOINERS = "\u200c\u200d"  # which some scripts and emoji are written with


def survey(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> Iterator[str]:
  """One line of each thing.

  Args:
    train: the prompts that the run trains on.
    held_out: those that evaluate and judge it.
  """
  trained = [_key(prompt) for prompt in train]
  known = set(trained)
  shared = [prompt for prompt in held_out if _key(prompt) in known]
  if shared:
    yield (
      f"{len(shared):,} of {len(held_out):,} held-out prompts are trained on too, such as "
      f"{shared[0].text[:60]!r}: scores of those say nothing about new prompts"
    )
  if repeated := len(trained) - len(known):
    yield (
      f"{repeated:,} of {len(trained):,} training prompts are repetitions: each counts as often as it "
      "stands there"
    )
  prompts = [*train, *held_out]
  odd = [(prompt, found) for prompt in prompts if (found := _unseen(prompt.text))]
  if odd:
    prompt, names = odd[0][0], sorted({name for _, names in odd for name in names})
    yield (
      f"{len(odd):,} of {len(prompts):,} prompts hold characters that nobody sees ({', '.join(names[:5])}), "
      f"such as {prompt.text[:60]!r}: the model reads them"
    )


def _key(prompt):
  return prompt.text, json.dumps(prompt.metadata, sort_keys=True)


def _unseen(text):
  """The names of the characters that are neither printed nor a space."""
  return [
    f"U+{ord(c):04X}"
    for c in text
    if not c.isprintable() and c not in _JOINERS and unicodedata.category(c) in _UNSEEN
  ]
