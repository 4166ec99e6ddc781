"""GenEval's metadata as prompts: Flow-GRPO's pair of files, GenEval's one file, and what is held out."""

import json

import pytest

from tpgrpo_jax.data import geneval, prompts
from tpgrpo_jax.types import Prompt


def row(kind, tag="single_object", **clause):
  return {
    "tag": tag,
    "include": [{"class": kind, "count": 1, **clause}],
    "prompt": f"a photo of a {clause.get('color', '')} {kind}".replace("  ", " "),
  }


SINGLE = [row(kind) for kind in geneval.CLASSES[:12]]
COLORED = [row(kind, "colors", color=color) for kind in ("car", "bus") for color in geneval.COLORS]


def write(path, rows):
  path.write_text("".join(json.dumps(each) + "\n" for each in rows))
  return path


@pytest.fixture
def load(tmp_path):
  return lambda split, path=tmp_path: prompts.load_prompts(
    "geneval", str(path), split, data_dir=tmp_path / "cache"
  )


def test_no_prompt_of_the_test_file_is_trained_on_and_none_is_asked_twice(tmp_path, load):
  # As published: the test file has every prompt four times, shuffled.
  write(tmp_path / "test_metadata.jsonl", [*SINGLE[:3], *SINGLE[2::-1], *SINGLE[:3]])
  write(tmp_path / "train_metadata.jsonl", [SINGLE[5], SINGLE[1], SINGLE[5], *COLORED])
  test, train = list(load("test")), list(load("train"))
  assert [{"prompt": p.text, **p.metadata} for p in test] == SINGLE[:3]
  # Training keeps its repetitions, which weigh the tags, and loses what is held out.
  assert [{"prompt": p.text, **p.metadata} for p in train] == [SINGLE[5], SINGLE[5], *COLORED]


def test_a_fifth_of_each_tag_of_one_file_is_held_out_whatever_its_order(tmp_path, load):
  file = write(tmp_path / "evaluation_metadata.jsonl", [*SINGLE, *COLORED, *SINGLE])
  train, test = list(load("train", file)), list(load("test", file))
  assert len({p.text for p in train} | {p.text for p in test}) == len(train) + len(test) == 32
  assert [p.metadata["tag"] for p in test] == ["single_object"] * 3 + ["colors"] * 4
  other = write(tmp_path / "reversed.jsonl", [*COLORED, *SINGLE][::-1])
  assert {p.text for p in load("test", other)} == {p.text for p in test}


def test_distinct_keeps_the_first_of_each_text_in_order():
  given = [Prompt(text, {"n": n}) for n, text in enumerate("abacb")]
  assert geneval.distinct(given) == [given[0], given[1], given[3]]


@pytest.mark.parametrize(
  "bad, said",
  [
    ({"prompt": "a cow"}, "has include=None: must be a list"),
    (row("unicorn"), "class='unicorn', which the reward does not know"),
    (row("computer mose"), "Did you mean 'computer mouse'"),
    (
      row("car", color="gray"),
      "color='gray', which the reward does not know. .*Choices: black, blue",
    ),
    (
      row("car") | {"exclude": [{"class": "caar", "count": 2}]},
      r"exclude\[0\] has class='caar'.*Did you mean 'car'",
    ),
  ],
)
def test_metadata_that_cannot_be_judged_is_refused_with_its_line(tmp_path, load, bad, said):
  write(tmp_path / "train_metadata.jsonl", [SINGLE[0], bad])
  with pytest.raises(ValueError, match=f"train_metadata.jsonl:2: .*{said}"):
    load("train")


def test_a_path_without_metadata_is_refused(tmp_path, load):
  for path in ("", tmp_path / "none", tmp_path):
    with pytest.raises(ValueError, match="must be a folder with train_metadata.jsonl and test_"):
      load("train", path)
  write(tmp_path / "test_metadata.jsonl", SINGLE)
  assert len(load("test")) == 12
  with pytest.raises(ValueError, match="no train prompts. Add one of train_metadata.jsonl"):
    load("train")
  write(tmp_path / "train_metadata.jsonl", SINGLE)
  with pytest.raises(ValueError, match="every prompt of it is held out"):
    load("train")


def test_names_are_cocos_in_cocos_order():
  assert len(set(geneval.CLASSES)) == 80 and len(set(geneval.COLORS)) == 10
  # COCO's numbers of some, counted from 0 as detectors do.
  numbers = {"person": 0, "stop sign": 11, "zebra": 22, "kite": 33, "spoon": 44, "chair": 56,
             "computer mouse": 64, "tv remote": 65, "computer keyboard": 66, "toothbrush": 79}  # fmt: skip
  assert {name: geneval.CLASSES.index(name) for name in numbers} == numbers
