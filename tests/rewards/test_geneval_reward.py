"""GenEval's reward without its models: what it asks of folders and metadata, and objects cut out by hand."""

import json
import pickle
import sys

import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import rewards
from tpgrpo_jax.data import geneval as terms
from tpgrpo_jax.rewards import (
  canary,
  flow_grpo_wire,
  geneval,
  geneval_colors,
  geneval_detector,
  geneval_rules,
)

RED, BLUE, GROUND = (230, 20, 20), (20, 20, 230), (40, 90, 40)


def scene(*objects):
  """(picture, detections) of rectangles (kind, color, left, top, right, bottom), the first the surest."""
  image = np.empty((48, 64, 3), np.uint8)
  image[:] = GROUND
  found = []
  for i, (kind, color, left, top, right, bottom) in enumerate(objects):
    mask = np.zeros(image.shape[:2], bool)
    mask[top:bottom, left:right] = True
    mask[top, left] = False  # a corner of the box that is not the object's
    image[mask] = color
    box = (float(left), float(top), float(right), float(bottom))
    found.append(geneval_rules.Detection(kind, 0.99 - i / 100, box, "", mask))
  return image, found


def red_or_blue(crops):
  """A namer that sees the object's own pixels, and that all others are grey."""
  names = []
  for crop in crops:
    grey = (crop.picture == geneval_colors.GREY).all(-1)
    assert grey.sum() == 1 and grey[0, 0]
    mean = crop.picture[~grey].mean(0)
    names.append("red" if mean[0] > mean[2] else "blue")
  asked.append([crop.kind for crop in crops])
  return names


asked = []


@pytest.mark.parametrize(
  "objects, include, strict, parts, flow_grpo",
  [
    # Colours, with an object of the same class that nobody asks for.
    ([("car", RED, 4, 4, 20, 20), ("car", BLUE, 40, 4, 60, 20)],
     [{"class": "car", "count": 1, "color": "red"}], 1, (1, 1), (0, 0)),
    ([("car", BLUE, 4, 4, 20, 20), ("car", RED, 40, 4, 60, 20)],
     [{"class": "car", "count": 1, "color": "red"}], 0, (1, 0), (0, 0)),
    # Attribution: each its own.
    ([("car", RED, 4, 4, 20, 20), ("dog", BLUE, 40, 4, 60, 20)],
     [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
     1, (1, 1, 1, 1), (1, 1, 1, 1)),
    ([("car", BLUE, 4, 4, 20, 20), ("dog", RED, 40, 4, 60, 20)],
     [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
     0, (1, 0, 1, 0), (1, 0, 1, 0)),
    # Position; no colour is asked for, so none is named.
    ([("car", RED, 4, 4, 20, 20), ("dog", BLUE, 40, 4, 60, 20)],
     [{"class": "car", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
     1, (1, 1, 1), (1, 1, 1)),
    ([("car", RED, 4, 4, 20, 20), ("dog", BLUE, 40, 4, 60, 20)],
     [{"class": "car", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
     0, (1, 1, 0), (1, 1, 0, 1)),
    # Counting, where Flow-GRPO takes off for those too many, down to below 0.
    ([("dog", RED, 4, 4, 20, 20)], [{"class": "dog", "count": 2}], 0, (1 / 2,), (1 / 2,)),
    ([("dog", RED, x, 4, x + 4, 20) for x in (4, 12, 20)], [{"class": "dog", "count": 1}], 1, (1,), (-1,)),
  ],
)  # fmt: skip
def test_hand_made_masks_are_judged(objects, include, strict, parts, flow_grpo):
  image, detections = scene(*objects)
  found = geneval_rules.confident(detections)
  metadata = {"tag": "any", "include": include}
  asked.clear()
  geneval.name_colors(red_or_blue, image[None], [found], [metadata])
  wanted = [c["class"] for c in include if "color" in c]
  assert asked == [wanted]  # only the surest are named, and only where a colour is asked for
  verdicts = geneval.judge(found, metadata, terms.POSITION_THRESHOLD)
  assert verdicts.own.parts == pytest.approx(parts)
  assert verdicts.flow_grpo.parts == pytest.approx(flow_grpo)
  scores = {name: rule(verdicts) for name, rule in geneval.RULES.items()}
  assert scores == pytest.approx(
    {"strict": strict, "graded": np.mean(parts), "flow_grpo": np.mean(flow_grpo)}
  )
  said = geneval.describe(found, verdicts.own)
  assert ("expected" in said) == (not strict) and objects[0][0] in said


def test_colors_of_many_pictures_are_named_at_once_and_none_is_swapped():
  scenes = [scene(("car", color, 4, 4, 20, 20)) for color in (RED, BLUE, RED)]
  found = [geneval_rules.confident(detections) for _, detections in scenes]
  metadata = [{"include": [{"class": "car", "count": 1, "color": "red"}]}] * 3
  asked.clear()
  geneval.name_colors(red_or_blue, np.stack([image for image, _ in scenes]), found, metadata)
  assert [each["car"][0].color for each in found] == ["red", "blue", "red"] and len(asked) == 1


@pytest.fixture
def folders(tmp_path):
  """Folders with all that is looked at before torch starts."""
  configs = {
    "detector": {"model_type": "mask2former", "id2label": dict(enumerate(terms.CLASSES))},
    "classifier": {"model_type": "clip"},
  }
  for name, config in configs.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(
      {"w": np.zeros(1, np.float32)}, tmp_path / name / "model.safetensors"
    )
  return {name: str(tmp_path / name) for name in configs}


def rewrite(folder, **changes):
  file = f"{folder}/config.json"
  with open(file) as opened:
    config = json.load(opened)
  with open(file, "w") as opened:
    json.dump(config | changes, opened)


@pytest.mark.parametrize(
  "folder, changes, said",
  [
    ("detector", {"model_type": "detr"}, "detector='.*': holds a 'detr' model, must be 'mask2former'"),
    ("detector", {"model_type": None}, "holds a None model, must be 'mask2former', as facebook/mask2former"),
    ("classifier", {"model_type": "siglip"}, "classifier='.*': holds a 'siglip' model, must be 'clip'"),
    ("detector", {"id2label": {"0": "LABEL_0"}}, "not all of COCO's 80 names; person, bicycle, .* are not"),
    ("detector", {"id2label": dict(enumerate(terms.CLASSES[:79]))}, "; toothbrush is not there. Give"),
    ("detector", {"id2label": None}, "not all of COCO's 80 names"),
  ],
)  # fmt: skip
def test_a_folder_of_another_model_is_refused(folders, folder, changes, said):
  rewrite(folders[folder], **changes)
  with pytest.raises(ValueError, match=said) as caught:
    geneval.make(**folders)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "options, said",
  [
    ({"detector": "nowhere"}, "detector='nowhere': no such folder"),
    ({"rule": "lenient"}, "rule='lenient': unknown name. .*Choices: flow_grpo, graded, strict"),
    ({"size": -1}, "size=-1: must be an integer >= 0"),
    ({"batch": 0}, "batch=0: must be an integer >= 1"),
    ({"threshold": 1.5}, r"threshold=1.5: must be in \[0, 1\)"),
    ({"position_threshold": -0.1}, "position_threshold=-0.1: must be in"),
    ({"canary": "nobody"}, "canary='nobody': unknown name"),
  ],
)
def test_options_that_cannot_be_are_named(folders, options, said):
  with pytest.raises(ValueError, match=said):
    geneval.make(**folders | options)


@pytest.mark.parametrize("value", [None, "0.3", True, [0.3], float("nan"), 1])
def test_a_threshold_that_is_no_share_is_named(value):
  with pytest.raises(ValueError, match=r"threshold=.*: must be in \[0, 1\)"):
    geneval._check_shares({"threshold": value})


def test_weights_in_a_pickle_are_refused(folders, tmp_path):
  (tmp_path / "detector" / "model.safetensors").rename(tmp_path / "detector" / "pytorch_model.bin")
  with pytest.raises(ValueError, match="holds pytorch_model.bin and no safetensors"):
    geneval.make(**folders)


def test_without_torch_the_extra_is_named(folders, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ImportError, match="pip install 'torch>=2.6'"):
    geneval.make(**folders)


def test_labels_have_geneval_s_names_whatever_the_words_of_the_folder(folders):
  words = {"couch": "sofa", "computer mouse": "mouse", "tv": "TVmonitor", "airplane": "aeroplane"}
  labels = [words.get(name, name) for name in terms.CLASSES]
  rewrite(folders["detector"], id2label=dict(enumerate([*labels, "sky"])))
  read = geneval_detector.read_labels(geneval_detector.pathlib.Path(folders["detector"]))
  assert [read[i] for i in range(80)] == list(terms.CLASSES) and read[80] == "sky"


def test_the_reward_is_in_the_table_and_its_canary_is_a_person():
  assert rewards.HOST_REWARDS["geneval"] is geneval.make
  pair = canary.load("person")
  terms.check_metadata(pair.prompt, pair.metadata)
  assert pair.better.shape == pair.worse.shape == (512, 512, 3)
  assert pair.better.std() > 30 and pair.worse.std() == 0


def test_flow_grpos_client_is_told_all_three_scores():
  info = {"exact": np.asarray([1, 0], np.float32), "strict": np.asarray([0, 0], np.float32)}
  metadata = [{"tag": "counting"}, {"tag": "colors"}]
  scores = np.asarray([-1, 0.5], np.float32)
  answer = pickle.loads(flow_grpo_wire.encode_answer(scores, info, metadata))
  assert answer["scores"] == [-1, 0.5] and answer["rewards"] == [1, 0]
  assert answer["strict_rewards"] == [0, 0]
  assert answer["group_rewards"]["counting"] == [1, -10]
