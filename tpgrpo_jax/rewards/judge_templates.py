"""What a judge is asked, and how its answer is read."""

from collections.abc import Callable, Mapping
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from tpgrpo_jax import registry


class Unreadable(ValueError):
  """An answer in which no score is."""


class Template(NamedTuple):
  """A question and the reading of its answer.

  Attributes:
    text: with {prompt}, and {metadata} where it is wanted, in place of which a picture's own are put. With
      {image}, which becomes "the first picture", the judge sees the one to edit before the painted one.
    read: a choice of the completion -> (score, what else it says); Unreadable where there is none.
    low: the lowest score that can be.
    high: the highest.
    options: of the request, beside those of all.
  """

  text: str
  read: Callable[[Mapping[str, Any]], tuple[float, dict[str, float]]]
  low: float
  high: float
  options: Mapping[str, Any] = {}


def fill(template: Template, prompt: str, metadata: Mapping[str, Any]) -> str:
  """The question about one picture."""
  # Not str.format: braces in a prompt or in the template's own JSON are not placeholders.
  pieces = re.split(r"(\{prompt\}|\{metadata\}|\{image\})", template.text)
  plain = {name: value for name, value in metadata.items() if not isinstance(value, np.ndarray)}
  known = {"{prompt}": prompt, "{metadata}": json.dumps(plain, ensure_ascii=False)}
  known["{image}"] = "the first picture"
  return "".join(known.get(piece, piece) for piece in pieces)


def sees_both(template: Template) -> bool:
  """Whether the question is about two pictures: the one that was to be edited, and the painted one."""
  return "{image}" in template.text


def text_of(choice: Mapping[str, Any]) -> str:
  """What a choice says."""
  message = choice.get("message")
  content = message.get("content") if isinstance(message, Mapping) else None
  if not isinstance(content, str):
    raise Unreadable("no text")
  return content


def make_pattern_reader(pattern: str) -> Callable[..., tuple[float, dict[str, float]]]:
  """Reads the number of the last match: judges reason first, and score at the end.

  With one group, that is the score. With several named groups it is their mean, and each is told too.

  Raises:
    ValueError: no regular expression, or one without a group.
  """
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise ValueError(f"pattern={pattern!r}: is no regular expression ({error}).") from error
  if not compiled.groups or (compiled.groups > 1 and len(compiled.groupindex) < compiled.groups):
    raise ValueError(
      f"pattern={pattern!r}: must have one group, which is the score, or several with names. Put the "
      r"number in parentheses: 'Score: (\d+)'."
    )

  def read(choice):
    text = text_of(choice)
    matches = list(compiled.finditer(text))
    if not matches:
      raise Unreadable(text)
    numbers = [_number(group, text) for group in matches[-1].groups()]
    return sum(numbers) / len(numbers), dict(zip(compiled.groupindex, numbers))

  return read


def make_json_reader(path: str) -> Callable[..., tuple[float, dict[str, float]]]:
  """Reads the number at a path, such as "scores.quality" or "axes.0", of the JSON in an answer.

  Raises:
    ValueError: an empty step in the path.
  """
  steps = path.split(".")
  if not all(steps):
    raise ValueError(
      f"json_path={path!r}: must be names and numbers between dots, 'scores.quality'."
    )

  def read(choice):
    text = text_of(choice)
    value = _last_object(text)
    for step in steps:
      try:
        value = value[int(step)] if isinstance(value, list) else value[step]
      except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(text) from error
    if isinstance(value, bool) or not isinstance(value, int | float | str):
      raise Unreadable(text)
    return _number(value, text), {}

  return read


def read_yes(choice: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
  """P(Yes) / (P(Yes) + P(No)) of the first token, over all spellings among the likeliest tokens.

  Source: VQAScore (arXiv 2404.01291), which takes P(Yes) alone; the quotient does not fall when the judge
  would rather begin with another word.
  """
  listed = choice.get("logprobs")
  try:
    first = listed["content"][0]["top_logprobs"]  # pyright: ignore[reportOptionalSubscript]
    pairs = [(str(each["token"]), float(each["logprob"])) for each in first]
  except (TypeError, KeyError, IndexError, ValueError, OverflowError) as error:
    raise Unreadable("no top_logprobs: does the server give them?") from error
  sums = {"yes": 0.0, "no": 0.0}
  for token, logprob in pairs:
    word = token.strip().strip("▁Ġ\"'.").lower()
    if word in sums and not math.isnan(logprob):
      sums[word] += math.exp(min(logprob, 0.0))
  if not sum(sums.values()):
    raise Unreadable(f"neither Yes nor No among {[token for token, _ in pairs]}")
  return sums["yes"] / sum(sums.values()), {}


def _number(text, answer):
  try:
    number = float(text)
  except (TypeError, ValueError, OverflowError) as error:
    raise Unreadable(answer) from error
  if not math.isfinite(number):
    raise Unreadable(answer)
  return number


def _last_object(text):
  """The last JSON object or list that stands in a text, such as behind a judge's reasoning."""
  decoder = json.JSONDecoder()
  found, place, tries = None, 0, 0
  while (match := re.compile(r"[{\[]").search(text, place)) is not None and tries < 1000:
    tries += 1
    try:
      found, place = decoder.raw_decode(text, match.start())
    except (ValueError, RecursionError):
      place = match.start() + 1
  if found is None:
    raise Unreadable(text)
  return found


# All of what stands for a number, so that 45 is not read as 4, nor "2,5" as 2, nor "3-4" and "3 to 4" as 3.
_NUMBER = r"-?\d(?:[\d.,–-]*\d)?(?:[ \t]*(?:[–-]|to)[ \t]*\d+)?"
_ALIGNMENT = rf"Alignment Score \(1-5\):\s*(?P<alignment>{_NUMBER})"
_COHERENCE = rf"Coherence Score \(1-5\):\s*(?P<coherence>{_NUMBER})"
_STYLE = rf"Style Score \(1-5\):\s*(?P<style>{_NUMBER})"

# The questions that these models were trained on, word for word: they answer no others as well.
TEMPLATES: dict[str, Template] = {
  # UnifiedReward (arXiv 2503.05236), its repository's scripts for point scores.
  "unified_reward": Template(
    "<image>\nYou are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess how well this "
    "image aligns with the provided caption. Consider the accuracy of depicted objects, their relationships, "
    "and attributes as described in the caption.\n2. Overall Image Quality: Examine the visual quality of "
    "this image, including clarity, detail preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]",
    make_pattern_reader(rf"Final Score:\s*({_NUMBER})"),
    1.0,
    5.0,
  ),
  # UnifiedReward 2.0, likewise.
  "unified_reward_2": Template(
    "You are presented with a generated image and its associated text caption. Your task is to analyze the "
    "image across multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]",
    make_pattern_reader(rf"{_ALIGNMENT}\s+{_COHERENCE}\s+{_STYLE}"),
    1.0,
    5.0,
  ),
  # VQAScore's question.
  "yes_no": Template(
    'Does this figure show "{prompt}"? Please answer yes or no.',
    read_yes,
    0.0,
    1.0,
    {"max_tokens": 1, "logprobs": True, "top_logprobs": 20},
  ),
}


def choose(template: str, pattern: str, json_path: str, low: Any, high: Any) -> Template:
  """One of TEMPLATES, or that of a file with the user's own reading.

  Args:
    template: a name, or the path of a text file with {prompt} in it.
    pattern: regular expression of the score in the answer.
    json_path: where it is in the JSON of the answer, instead.
    low: the lowest score; needed with a file.
    high: the highest.

  Raises:
    ValueError: no such template or file, a file without {prompt}, or not exactly one way to read.
  """
  own = bool(pattern) + bool(json_path)
  if template in TEMPLATES:
    if own:
      raise ValueError(
        f"template={template!r}: is read in its own way. Leave pattern and json_path out, or put a question "
        "of your own in a file."
      )
    chosen = TEMPLATES[template]
    low, high = chosen.low if low is None else low, chosen.high if high is None else high
    _check_range(template, low, high)
    return chosen._replace(low=low, high=high)
  file = pathlib.Path(template).expanduser()
  if not file.is_file():
    registry.check(template, TEMPLATES, field="template")
  try:
    text = file.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f"template={template!r}: is no text in UTF-8 that can be read ({error}). Save it as UTF-8."
    ) from error
  if "{prompt}" not in text:
    raise ValueError(
      f"template={template!r}: has no {{prompt}}. Write {{prompt}} where the prompt goes."
    )
  if own != 1:
    raise ValueError(
      f"template={template!r}: set one of pattern and json_path, which says where the score is in an answer."
    )
  if low is None or high is None:
    raise ValueError(
      f"template={template!r}: low={low!r} and high={high!r} must say between which a score lies."
    )
  _check_range(template, low, high)
  read = make_pattern_reader(pattern) if pattern else make_json_reader(json_path)
  return Template(text, read, low, high)


def _check_range(template, low, high):
  numbers = all(isinstance(each, int | float) and type(each) is not bool for each in (low, high))
  if not numbers or not low < high:
    raise ValueError(
      f"template={template!r}: low={low!r} and high={high!r} must say between which a score lies: two "
      "numbers, the lower one first."
    )
