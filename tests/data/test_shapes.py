import itertools
import json

import numpy as np
import pytest

from tpgrpo_jax.data import geneval, prompts, shapes


def every_prompt(split):
  return [row for tag in geneval.TAGS for row in shapes.prompts_of(tag, split)]


@pytest.fixture(scope="module")
def training_lessons():
  return shapes.draw_scenes(np.random.default_rng(0), 3000)


def test_split_of_a_combination_is_fixed_for_ever():
  # A change would put combinations that the shipped model was trained on into the test split.
  named = [
    "1 cross",
    "1 circle",
    "cross + square",
    "circle + square",
    "1 blue triangle",
    "3 red circle",
  ]
  splits = ["test", "train", "test", "train", "test", "train"]
  assert [shapes.split_of(c) for c in named] == splits


def test_no_prompt_is_in_both_splits_and_every_kind_is_in_each():
  train, test = ({row["prompt"] for row in every_prompt(split)} for split in shapes.SPLITS)
  assert not train & test
  for tag, split in itertools.product(geneval.TAGS, shapes.SPLITS):
    assert shapes.prompts_of(tag, split), (tag, split)


def test_no_training_prompt_asks_for_a_held_out_combination():
  for row in every_prompt("train"):
    assert {shapes.split_of(c) for c in shapes.asked_for(row)} <= {"train"}, row


def test_every_test_prompt_asks_for_a_held_out_combination():
  for row in every_prompt("test"):
    assert "test" in {shapes.split_of(c) for c in shapes.asked_for(row)}, row


def test_no_training_scene_shows_a_held_out_combination(training_lessons):
  rows, scenes = training_lessons
  for row, scene in zip(rows, scenes):
    assert {shapes.split_of(c) for c in shapes.shown(scene)} <= {"train"}, (row, scene)


def test_no_training_scene_fulfils_a_test_prompt(training_lessons):
  """Without the combinations' names: what each test prompt says is looked for in the scenes."""

  def objects(scene):
    return sorted((s.color, s.kind) for s in scene)

  alone, counted, placed = set(), set(), set()
  for scene in training_lessons[1]:
    counted.add(tuple(objects(scene)))
    if len(scene) == 1:
      alone.add(scene[0].kind)
    for a, b in itertools.permutations(scene, 2):
      placed |= {(a.color, a.kind, r, b.color, b.kind) for r in geneval.relations(a.box, b.box)}
  pairs = {tuple(sorted(kind for _, kind in scene)) for scene in counted if len(scene) == 2}
  for row in every_prompt("test"):
    words = row["prompt"].split()
    include = row["include"]
    if row["tag"] == "single_object":
      assert words[-1] not in alone
    elif row["tag"] == "two_object":
      assert tuple(sorted(c["class"] for c in include)) not in pairs
    elif row["tag"] == "position":
      assert (words[1], words[2], " ".join(words[3:-3]), words[-2], words[-1]) not in placed
    else:
      wanted = sorted((c["color"], c["class"]) for c in include for _ in range(c["count"]))
      assert tuple(wanted) not in counted, row


def test_combinations_of_a_scene_are_named_alike_from_either_side():
  left, right = (
    shapes.Shape(kind, color, x, 16.0, 4.0)
    for kind, color, x in (("circle", "red", 6.0), ("square", "blue", 24.0))
  )
  wanted = {"circle + square", "blue square + red circle", "red circle left of blue square"}
  assert shapes.shown((left, right)) == shapes.shown((right, left)) == wanted


def test_what_a_scene_shows_holds_what_its_prompt_asks_for(training_lessons):
  for row, scene in zip(*training_lessons):
    assert shapes.asked_for(row) <= shapes.shown(scene)


def test_shapes_of_a_scene_are_apart_and_inside(training_lessons):
  for scene in training_lessons[1]:
    for shape in scene:
      left, top, right, bottom = shape.box
      assert min(left, top) >= 0 and max(right, bottom) <= shapes.SIZE
      assert (shape.x, shape.y) in shapes.PLACES
    for a, b in itertools.combinations(scene, 2):
      assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 16


def test_a_kind_is_drawn_as_often_as_its_share(training_lessons):
  tags = [row["tag"] for row in training_lessons[0]]
  # 3000 draws: the standard deviation of a count is at most 25.
  for tag in geneval.TAGS:
    assert abs(tags.count(tag) - 3000 * shapes.SHARES[tag] / sum(shapes.SHARES.values())) < 100


def test_shapes_lie_mostly_in_the_order_of_their_names_but_where_a_prompt_places_them(
  training_lessons,
):
  ordered = {True: [], False: []}
  for row, scene in zip(*training_lessons):
    if len(scene) == 2:
      (a, b), placed = scene, row["tag"] == "position"
      ordered[placed].append((a.x, a.y) < (b.x, b.y))
  assert np.mean(ordered[False]) == pytest.approx(0.92, abs=0.03)  # .85, and half of the others
  assert np.mean(ordered[True]) == pytest.approx(0.5, abs=0.06)


def test_scenes_are_a_function_of_the_seed():
  draws = [shapes.draw_scenes(np.random.default_rng(5), 20) for _ in range(2)]
  assert draws[0] == draws[1]


def test_prompts_read_as_the_task_says():
  texts = {row["prompt"] for split in shapes.SPLITS for row in every_prompt(split)}
  for text in (
    "a circle", "a circle and a cross", "two red circles", "three blue crosses", "a green triangle",
    "a blue square left of a green triangle", "a red circle and a blue square",
  ):  # fmt: skip
    assert text in texts
  assert max(len(text.split()) for text in texts) == 8


def test_metadata_has_genevals_form_and_the_position_refers_to_the_second_object():
  rows = {row["prompt"]: row for split in shapes.SPLITS for row in every_prompt(split)}
  for text, row in rows.items():
    geneval.check_metadata(text, row)
  assert rows["two red circles"] == {
    "tag": "counting",
    "include": [{"class": "circle", "count": 2, "color": "red"}],
    "exclude": [{"class": "circle", "count": 3}],
    "prompt": "two red circles",
  }
  assert rows["a blue square left of a green triangle"]["include"] == [
    {"class": "triangle", "count": 1, "color": "green"},
    {"class": "square", "count": 1, "color": "blue", "position": ["left of", 0]},
  ]


@pytest.mark.parametrize("kind", shapes.CLASSES)
def test_coverage_of_a_shape_adds_up_to_its_area(kind):
  area = {
    "circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 2.56, "cup": 3.012, "tee": 2.56
  }[kind]  # fmt: skip
  for x, y, radius in ((16.0, 16.0, 6.0), (15.3, 17.8, 5.5), (9.6, 8.1, 4.25)):
    # The edge is one pixel wide, and a corner of it is round: a fiftieth of these areas at most.
    assert shapes.coverage(kind, x, y, radius).sum() == pytest.approx(area * radius**2, rel=0.03)


def test_pictures_are_black_but_for_the_shapes_in_their_colours():
  shape = shapes.Shape("square", "yellow", 16.0, 16.0, 5.0)
  (picture,) = shapes.render([(shape,)])
  assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
  assert (picture[11:21, 11:21] == shapes.COLORS["yellow"]).all()
  picture[11:21, 11:21] = 0
  assert not picture.any()


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_prompt_files_hold_one_split_and_all_kinds_alike(split, tmp_path):
  rows = prompts.load_prompts("shapes", "", split, data_dir=tmp_path)
  assert len(rows) == prompts.BUILT_IN_SHAPES[split]
  found = [rows[i] for i in range(len(rows))]
  assert {shapes.split_of_prompt(p.metadata) for p in found} == {split}
  assert [p.metadata["tag"] for p in found[:12]] == [*geneval.TAGS] * 2
  assert {p.text for p in found} >= {row["prompt"] for row in shapes.prompts_of("colors", split)}
  json.dumps(found[0].metadata)


def test_unknown_split_or_kind_is_refused_with_the_nearest_name():
  with pytest.raises(ValueError, match="split='tst'.*Did you mean 'test'"):
    shapes.draw_scenes(np.random.default_rng(0), 1, split="tst")
  with pytest.raises(ValueError, match="tag='color'.*Did you mean 'colors'"):
    shapes.prompts_of("color", "train")
