import math

import pytest

from tpgrpo_jax.data import geneval

TARGET = (10.0, 10.0, 20.0, 20.0)


def box(x, y, side=10.0):
  return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


@pytest.mark.parametrize(
  "x, y, wanted",
  [
    (0.0, 15.0, {"left of"}),
    (30.0, 15.0, {"right of"}),
    (15.0, 0.0, {"above"}),
    (15.0, 30.0, {"below"}),
    (35.0, 35.0, {"right of", "below"}),
    (15.0, 15.0, set()),
    (16.5, 15.0, set()),  # offset 1.5 < 0.1 (10 + 10)
    (18.9, 15.0, set()),  # (3.9 - 2) / 3.9 < 1/2
    (19.1, 15.0, {"right of"}),  # (4.1 - 2) / 4.1 > 1/2
  ],
)
def test_relations_are_those_of_the_published_rule(x, y, wanted):
  assert geneval.relations(box(x, y), TARGET) == wanted


def test_relations_turn_round_with_the_boxes():
  opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
  for angle in range(0, 360, 7):
    for distance in (1.0, 3.0, 8.0, 20.0):
      dx, dy = (f(math.radians(angle)) * distance for f in (math.cos, math.sin))
      other = box(15 + dx, 15 + dy, side=6.0)
      there = geneval.relations(other, TARGET)
      assert {opposite[name] for name in there} == geneval.relations(TARGET, other)


def test_a_higher_threshold_only_takes_relations_away():
  for x in range(0, 40, 3):
    for y in range(0, 40, 3):
      loose = geneval.relations(box(x, y), TARGET, threshold=0.0)
      assert geneval.relations(box(x, y), TARGET, threshold=0.4) <= loose


COW = [{"class": "cow", "count": 1}]


@pytest.mark.parametrize(
  "metadata, part",
  [
    ({}, "include=None: must be a list"),
    ({"include": []}, r"include=\[\]: must be a list"),
    ({"include": [{"count": 1}]}, "must be an object with a \"class\""),
    ({"include": [{"class": "cow"}]}, "count must be an integer >= 1"),
    ({"include": [{"class": "cow", "count": True}]}, "count must be an integer >= 1"),
    ({"include": [{"class": "cow", "count": 1, "position": ["left of", 0]}]}, "an earlier clause"),
    (
      {"include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
      "position must be one of left of, right of, above, below",
    ),
    ({"include": [{"class": "cow", "count": 1, "colour": "red"}]}, "'colour' says .* mean 'color'"),
    ({"include": [{"class": "cow", "count": 1}], "exclude": [{"class": "cow"}]}, r"exclude\[0\]"),
    ({"include": [{"class": "cow", "count": 17}]}, "count must be at most 16"),
    ({"include": COW, "excude": COW}, "has 'excude'. Did you mean 'exclude'"),
    ({"include": COW, "tag": "countin"}, "tag='countin': .* Did you mean 'counting'"),
    ({"include": COW, "tag": 7}, "tag=7: must be a kind's name. Quote it"),
    ({"include": COW, "exclude": COW}, r"exclude\[0\].*: forbids the 1 that include asks"),
    *[
      ({"include": [{"class": "cow", "count": 1}], "exclude": bad}, f"exclude={bad!r}: must be a list")
      for bad in (None, 5, {})
    ],
  ],
)  # fmt: skip
def test_metadata_of_another_form_is_refused(metadata, part):
  with pytest.raises(ValueError, match=part):
    geneval.check_metadata("a cow", metadata)


def test_metadata_of_all_six_kinds_is_accepted():
  lamp, tree = {"class": "lamp", "count": 1}, {"class": "tree", "count": 1}
  includes = {
    "single_object": [lamp],
    "two_object": [lamp, tree],
    "counting": [{"class": "lamp", "count": 3}],
    "colors": [{**lamp, "color": "purple"}],
    "position": [lamp, {**tree, "position": ["right of", 0]}],
    "color_attr": [{**lamp, "color": "pink"}, {**tree, "color": "black"}],
  }
  assert tuple(includes) == geneval.TAGS
  for tag, include in includes.items():
    geneval.check_metadata("a lamp", {"tag": tag, "include": include})
  exclude = [{"class": "lamp", "count": 4}]
  geneval.check_metadata("three lamps", {"include": includes["counting"], "exclude": exclude})
  geneval.check_metadata("a lamp", {"include": [lamp], "tag": "lamps of mine", "note": "kept"})
