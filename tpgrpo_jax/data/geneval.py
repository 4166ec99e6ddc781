"""GenEval's terms: classes and colours, where a box lies relative to another, how metadata is written.

    {"tag": "position", "include": [{"class": "cow", "count": 1},
     {"class": "dog", "count": 1, "position": ["left of", 0]}], "exclude": [...], "prompt": ...}

"include" clauses must all hold, and a position refers to an earlier one by its number; of
"exclude" clauses none may.
"""

from collections.abc import Collection, Mapping, Sequence
import difflib
import hashlib
import math
from typing import Any

from tpgrpo_jax import registry
from tpgrpo_jax.types import Prompt

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
_KEYS = ("class", "count", "color", "position")  # of a clause
MAX_OBJECTS = 16  # of a class, that are looked at
POSITION_THRESHOLD = 0.1  # evaluate_images.py's default
COLORS = (
  "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
# COCO's 80, in COCO's order and with GenEval's names (object_names.txt).
CLASSES = (
  "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
  "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
  "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
  "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
  "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
  "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
  "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
  "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock",
  "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

Box = tuple[float, float, float, float]  # left, top, right, bottom


def relations(box: Box, other: Box, *, threshold: float = POSITION_THRESHOLD) -> set[str]:
  """Where `box` lies relative to `other`: none, one or two of RELATIONS.

  offset = centre - other centre, of which threshold (size + other size) is taken off on each axis,
  but never beyond 0; divided by the offset's length it must exceed 1/2 in the relation's direction.

  Source: relative_position of GenEval's evaluate_images.py (arXiv 2310.11513).
  """
  offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
  length = math.hypot(*offset)
  if not length:
    return set()
  shares = []
  for i in (0, 1):
    sizes = abs(box[i + 2] - box[i]) + abs(other[i + 2] - other[i])
    left_over = max(abs(offset[i]) - threshold * sizes, 0.0)
    # GenEval counts what is left over below a thousandth of a pixel, on both axes, as nothing.
    shares.append(math.copysign(left_over / length, offset[i]) if left_over >= 1e-3 else 0.0)
  right, down = shares
  found = ((right < -0.5, "left of"), (right > 0.5, "right of"))
  found += ((down < -0.5, "above"), (down > 0.5, "below"))
  return {name for holds, name in found if holds}


def check_metadata(prompt: str, metadata: Mapping[str, Any]) -> None:
  """Raises ValueError unless a prompt's metadata has GenEval's form and a picture can fulfil it."""
  for name in map(str, metadata):
    if (meant := _meant(name, ("include", "exclude", "tag"))) and meant not in metadata:
      raise ValueError(f"prompt={prompt!r}: its metadata has {name!r}. Did you mean {meant!r}?")
  tag = metadata.get("tag", "")
  if not isinstance(tag, str) or _meant(tag, TAGS):
    fix = f"Did you mean {_meant(str(tag), TAGS)!r}?" if isinstance(tag, str) else "Quote it."
    raise ValueError(
      f"prompt={prompt!r}: its metadata has tag={tag!r}: must be a kind's name. {fix}"
    )
  include = metadata.get("include")
  if not isinstance(include, list) or not include:
    raise ValueError(
      f'prompt={prompt!r}: its metadata has include={include!r}: must be a list such as [{{"class": '
      '"circle", "count": 1}]. Write GenEval\'s metadata beside the prompt.'
    )
  exclude = metadata.get("exclude", [])
  if not isinstance(exclude, list):
    raise ValueError(
      f"prompt={prompt!r}: its metadata has exclude={exclude!r}: must be a list, as include. Leave it out "
      "where nothing is forbidden."
    )
  for key, clauses in (("include", include), ("exclude", exclude)):
    for number, clause in enumerate(clauses):
      where = f"prompt={prompt!r}: {key}[{number}]={clause!r}"
      if not isinstance(clause, Mapping) or not isinstance(clause.get("class"), str):
        raise ValueError(f'{where}: must be an object with a "class". Name one.')
      count = clause.get("count")
      if type(count) is not int or count < 1:
        raise ValueError(f"{where}: count must be an integer >= 1. Write 1 for one object.")
      if key == "include" and count > MAX_OBJECTS:
        raise ValueError(
          f"{where}: count must be at most {MAX_OBJECTS}: no more of a class are looked at. Ask for fewer."
        )
      for name in sorted(map(str, {*clause} - {*_KEYS})):
        raise ValueError(
          f"{where}: {name!r} says nothing to the rules.{registry.nearest(name, _KEYS)}"
        )
      if "position" in clause:
        _check_position(where, clause["position"], number)
  for number, clause in enumerate(exclude):
    asked = [c["count"] for c in include if c["class"] == clause["class"]]
    if clause["count"] <= max(asked, default=0):
      raise ValueError(
        f"prompt={prompt!r}: exclude[{number}]={clause!r}: forbids the {max(asked)} that include asks for. "
        f'Write "count": {max(asked) + 1}, or leave it out.'
      )


def _meant(name, known):
  """The one of `known` that a misspelt name means; None for one of them, and for one unlike all."""
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
  return near[0] if near and name not in known else None


def check_names(
  prompt: str,
  metadata: Mapping[str, Any],
  *,
  classes: Collection[str] = CLASSES,
  colors: Collection[str] = COLORS,
) -> None:
  """Raises ValueError where checked metadata names another class or colour than these."""
  for part in ("include", "exclude"):
    for number, clause in enumerate(metadata.get(part, ())):
      where = f"prompt={prompt!r}: {part}[{number}]"
      for key, known in (("class", classes), ("color", colors)):
        if key in clause and clause[key] not in [*known]:
          raise ValueError(
            f"{where} has {key}={clause[key]!r}, which the reward does not know."
            f"{registry.nearest(clause[key], known)}"
          )


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
  """Each text once, in order: the published test set has every prompt as often as it has images."""
  first: dict[str, Prompt] = {}
  for prompt in prompts:
    first.setdefault(prompt.text, prompt)
  return [*first.values()]


def hold_out(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
  """Splits one list of prompts into (train, test), with no text in both and each of them once.

  Of each tag the fifth whose texts have the lowest SHA-256, rounded up, is test: whatever the order.
  """
  once = distinct(prompts)
  tags: dict[str, list[str]] = {}
  for prompt in once:
    tags.setdefault(str(prompt.metadata.get("tag")), []).append(prompt.text)
  rank = lambda text: hashlib.sha256(text.encode()).digest()
  held = {t for texts in tags.values() for t in sorted(texts, key=rank)[: -(-len(texts) // 5)]}
  train = [prompt for prompt in once if prompt.text not in held]
  return train, [prompt for prompt in once if prompt.text in held]


def _check_position(where, position, number):
  named = isinstance(position, list | tuple) and len(position) == 2 and position[0] in RELATIONS
  if not named or type(position[1]) is not int or not 0 <= position[1] < number:
    raise ValueError(
      f"{where}: position must be one of {', '.join(RELATIONS)} and the number of an earlier clause, "
      'such as ["left of", 0].'
    )
