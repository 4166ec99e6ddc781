"""The second built-in task, GenEval in small: prompts that ask for coloured shapes, and scenes of them.

A combination is what a scene shows or a prompt asks for: a shape alone, so many of one colour, two
shapes together, in their colours, in their places. Which split it belongs to is a property of the
combination itself. A prompt or scene belongs to "train" if all its combinations do, so whatever draws
training prompts or scenes (pretraining, RL) can never meet a held-out combination.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple
import zlib

from jaxtyping import Float, UInt8
import numpy as np

from tpgrpo_jax import registry
from tpgrpo_jax.data import geneval

SIZE = 32  # pixels a side
CLASSES = ("circle", "square", "triangle", "cross", "cup", "tee")
COLORS = {
  "red": (235, 40, 40),
  "green": (40, 200, 60),
  "blue": (50, 80, 245),
  "yellow": (245, 225, 40),
}
SPLITS = ("train", "test")
LARGEST_COUNT = 4
LONGEST = 44  # bytes of a prompt; none is longer
_TEST_SHARE = 6  # one combination in so many is held out
_SALT = "shapes 35 "  # chosen so that every kind of combination has some of both splits
_NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
_PLURALS = {"cross": "crosses"}
RADIUS = 4.0  # half a side of a shape in a scene, in pixels
# The middles of the places that a shape of a scene may have: the corners. From left to right, then down.
PLACES = tuple(itertools.product((RADIUS, SIZE - RADIUS), repeat=2))
_IN_ORDER = 0.85  # of scenes in which shapes lie in the order of their names, as in most captions
# How often a kind is drawn, next to the others: what is hard to learn more often.
SHARES = {
  "single_object": 1,
  "two_object": 3,
  "counting": 3,
  "colors": 1,
  "position": 6,
  "color_attr": 6,
}
ARM = 0.4  # half the width of a cross's arms and a tee's stem, in radii
NOTCH = (0.38, 0.3)  # of a cup: half its width, and how deep it goes, from above; in radii
BAR = -0.2  # where the bar of a tee ends; in radii


class Shape(NamedTuple):
  """A shape in a scene; x to the right, y down, in pixels, `radius` half its side."""

  kind: str
  color: str
  x: float
  y: float
  radius: float

  @property
  def box(self) -> geneval.Box:
    """(left, top, right, bottom)."""
    x, y, r = self.x, self.y, self.radius
    return x - r, y - r, x + r, y + r


Scene = tuple[Shape, ...]


def split_of(combination: str) -> str:
  """The split ("train" or "test") that a combination belongs to, for ever: a hash of its text."""
  return "test" if zlib.crc32((_SALT + combination).encode()) % _TEST_SHARE == 0 else "train"


def split_of_prompt(metadata: Mapping[str, Any]) -> str:
  """The split of a prompt: "test" if one combination that it asks for is held out."""
  return _split_of_all(asked_for(metadata))


def asked_for(metadata: Mapping[str, Any]) -> set[str]:
  """The combinations that GenEval metadata asks for, such as {"2 red circle"}.

  A prompt also asks for what its combinations hold: "a red circle" for a circle alone, and a pair in
  colours or places for the pair.
  """
  include = metadata["include"]
  places = [(clause["position"][1], clause["position"][0], i)
            for i, clause in enumerate(include) if "position" in clause]  # fmt: skip
  groups = [(clause["count"], clause.get("color"), clause["class"]) for clause in include]
  return _combinations(groups, [(after, name, before) for before, name, after in places])


def shown(scene: Scene) -> set[str]:
  """The combinations that a scene shows, in every way that a prompt could ask for them."""
  counted: dict[tuple[str, str], list[int]] = {}
  for i, shape in enumerate(scene):
    counted.setdefault((shape.color, shape.kind), []).append(i)
  groups = [(len(members), *key) for key, members in counted.items()]
  pairs = itertools.permutations(range(len(groups)), 2)
  firsts = [scene[members[0]].box for members in counted.values()]
  places = [(a, name, b) for a, b in pairs for name in geneval.relations(firsts[a], firsts[b])]
  return _combinations(groups, places)


def prompts_of(tag: str, split: str) -> list[dict[str, Any]]:
  """All prompts of a kind in a split, as GenEval writes them; the order is fixed.

  Args:
    tag: a name of geneval.TAGS.
    split: "train" or "test".

  Raises:
    ValueError: an unknown name.
  """
  registry.check(tag, geneval.TAGS, field="tag")
  registry.check(split, SPLITS, field="split")
  return [row for row in _PROMPTS[tag]() if split_of_prompt(row) == split]


def task_prompts(split: str, count: int) -> list[dict[str, Any]]:
  """`count` prompts in which the six kinds take turns; a kind that is used up begins again."""
  kinds = [prompts_of(tag, split) for tag in geneval.TAGS]
  rng = np.random.default_rng(0)
  orders = [rng.permutation(len(rows)) for rows in kinds]
  turns = (divmod(i, len(kinds)) for i in range(count))
  return [kinds[k][orders[k][turn % len(kinds[k])]] for turn, k in turns]


def draw_scenes(
  rng: np.random.Generator, count: int, *, split: str = "train"
) -> tuple[list[dict[str, Any]], list[Scene]]:
  """Draws prompts, each kind as often as SHARES says, and a scene that fulfils each.

  A training scene shows no held-out combination, even where its prompt leaves open what it shows.

  Args:
    rng: source of randomness.
    count: how many.
    split: of the prompts.

  Raises:
    ValueError: an unknown split.
  """
  registry.check(split, SPLITS, field="split")
  prompts, scenes = [], []
  shares = np.asarray([SHARES[tag] for tag in geneval.TAGS])
  for tag in rng.choice(geneval.TAGS, size=count, p=shares / shares.sum()).tolist():
    rows = _prompts_once(tag, split)
    prompts.append(rows[rng.integers(len(rows))])
    scenes.append(_draw_scene(rng, prompts[-1], split))
  return prompts, scenes


def _draw_scene(rng, metadata, split):
  placed = any("position" in clause for clause in metadata["include"])
  while True:
    kinds = []
    for clause in metadata["include"]:
      color = clause.get("color") or list(COLORS)[rng.integers(len(COLORS))]
      kinds += [(clause["class"], color)] * clause["count"]
    places = rng.permutation(len(PLACES))[: len(kinds)]
    if not placed and rng.random() < _IN_ORDER:
      places = np.sort(places)
    at = [PLACES[place] for place in places]
    scene = tuple(Shape(kind, color, x, y, RADIUS) for (kind, color), (x, y) in zip(kinds, at))
    if _fulfils(scene, metadata):
      if split == "test" or _split_of_all(shown(scene)) == "train":
        return scene


def _fulfils(scene, metadata):
  """Whether the one relation that a prompt may ask for is the only one there."""
  for clause in metadata["include"]:
    if "position" in clause:
      return geneval.relations(scene[1].box, scene[0].box) == {clause["position"][0]}
  return True


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "scenes 32 32 3"]:
  """Paints scenes on black, edges smoothed over one pixel; shapes that overlap add up."""
  pictures = np.zeros((len(scenes), SIZE, SIZE, 3), np.float32)
  for picture, scene in zip(pictures, scenes):
    for shape in scene:
      mask = coverage(shape.kind, shape.x, shape.y, shape.radius)
      picture += mask[..., None] * np.asarray(COLORS[shape.color], np.float32)
  return np.round(np.minimum(pictures, 255.0)).astype(np.uint8)


def coverage(kind: str, x: float, y: float, radius: float) -> Float[np.ndarray, "32 32"]:
  """The share of each pixel that a shape covers, from its distance to the edge; in [0, 1]."""
  across = np.arange(SIZE, dtype=np.float32) + 0.5
  inside = DISTANCES[kind](np.abs(across[None, :] - x), across[:, None] - y, radius)
  return np.clip(0.5 - inside, 0.0, 1.0)


def _circle(x, y, r):
  return np.hypot(x, y) - r


def _square(x, y, r):
  return np.maximum(x, np.abs(y)) - r


def _triangle(x, y, r):
  """Its tip above the middle of its base, as wide as high."""
  return np.maximum(y - r, (2 * x - y - r) / 5**0.5)


def _cross(x, y, r):
  y, arm = np.abs(y), ARM * r
  return np.minimum(np.maximum(x - r, y - arm), np.maximum(x - arm, y - r))


def _cup(x, y, r):
  width, depth = NOTCH
  return np.maximum(_square(x, y, r), -np.maximum(x - width * r, y - depth * r))


def _tee(x, y, r):
  bar = np.maximum(x - r, np.maximum(y - BAR * r, -r - y))
  return np.minimum(bar, np.maximum(x - ARM * r, np.abs(y) - r))


# Kind -> (|x|, y, radius) -> distance to the edge, negative inside.
DISTANCES: dict[str, Callable[..., np.ndarray]] = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "cross": _cross,
  "cup": _cup,
  "tee": _tee,
}


def _combinations(groups, places) -> set[str]:
  """Of groups (count, color or None, class) and places (group, relation, other group)."""
  if len(groups) == 1:
    ((count, color, kind),) = groups
    colored = {f"{count} {color} {kind}"} if color else set()
    return colored | ({f"1 {kind}"} if count == 1 else set())
  found = set()
  for a, b in itertools.combinations(range(len(groups)), 2):
    found.add(" + ".join(sorted(groups[i][2] for i in (a, b))))
    if groups[a][1] and groups[b][1]:
      found.add(" + ".join(sorted(_named(groups[i]) for i in (a, b))))
  for a, relation, b in places:
    if relation in ("right of", "below"):  # the same thing, seen from the other
      a, b, relation = b, a, {"right of": "left of", "below": "above"}[relation]
    found.add(f"{_named(groups[a])} {relation} {_named(groups[b])}")
  return found


def _named(group):
  return " ".join(word for word in group[1:] if word)


def _split_of_all(combinations: Iterable[str]) -> str:
  return "test" if any(split_of(c) == "test" for c in combinations) else "train"


@functools.lru_cache
def _prompts_once(tag, split):
  return prompts_of(tag, split)


def _prompt(tag, text, include):
  """A row of GenEval's, and stricter: but in counting, a picture shows nothing that was not asked for."""
  counts = {clause["class"]: clause["count"] for clause in include}
  judged = counts if tag == "counting" else CLASSES
  exclude = [{"class": kind, "count": counts.get(kind, 0) + 1} for kind in judged]
  return {"tag": tag, "include": include, "exclude": exclude, "prompt": text}


def _single_object() -> Iterator[dict[str, Any]]:
  for kind in CLASSES:
    yield _prompt("single_object", f"a {kind}", [{"class": kind, "count": 1}])


def _two_object() -> Iterator[dict[str, Any]]:
  for pair in itertools.permutations(CLASSES, 2):
    include = [{"class": kind, "count": 1} for kind in pair]
    yield _prompt("two_object", "a {} and a {}".format(*pair), include)


def _counting() -> Iterator[dict[str, Any]]:
  counts = range(2, LARGEST_COUNT + 1)
  for count, color, kind in itertools.product(counts, COLORS, CLASSES):
    text = f"{_NUMBERS[count]} {color} {_PLURALS.get(kind, kind + 's')}"
    include = [{"class": kind, "count": count, "color": color}]
    yield _prompt("counting", text, include)


def _colors() -> Iterator[dict[str, Any]]:
  for color, kind in itertools.product(COLORS, CLASSES):
    include = [{"class": kind, "count": 1, "color": color}]
    yield _prompt("colors", f"a {color} {kind}", include)


def _position() -> Iterator[dict[str, Any]]:
  pairs = itertools.permutations(CLASSES, 2)
  colors = itertools.product(COLORS, repeat=2)
  for pair, (first, second), relation in itertools.product(pairs, colors, geneval.RELATIONS):
    target = {"class": pair[1], "count": 1, "color": second}
    moved = {"class": pair[0], "count": 1, "color": first, "position": [relation, 0]}
    text = f"a {first} {pair[0]} {relation} a {second} {pair[1]}"
    yield _prompt("position", text, [target, moved])


def _color_attr() -> Iterator[dict[str, Any]]:
  pairs = itertools.permutations(CLASSES, 2)
  for pair, colors in itertools.product(pairs, itertools.permutations(COLORS, 2)):
    include = [{"class": k, "count": 1, "color": c} for k, c in zip(pair, colors)]
    text = f"a {colors[0]} {pair[0]} and a {colors[1]} {pair[1]}"
    yield _prompt("color_attr", text, include)


_PROMPTS = {
  "single_object": _single_object,
  "two_object": _two_object,
  "counting": _counting,
  "colors": _colors,
  "position": _position,
  "color_attr": _color_attr,
}
