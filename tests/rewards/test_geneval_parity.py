"""GenEval's detector and colours against transformers' own, on small random models in the real format."""

import json
import shutil

import numpy as np
import pytest

from tpgrpo_jax import rewards
from tpgrpo_jax.data import geneval as terms
from tpgrpo_jax.rewards import canary, geneval_colors, geneval_detector, geneval_rules
from tpgrpo_jax.serving import build

pytestmark = pytest.mark.parity
LEAST = 0.2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  import small_geneval

  root = tmp_path_factory.mktemp("geneval")
  return {
    "detector": str(small_geneval.write_detector(root / "detector")),
    "classifier": str(small_geneval.write_classifier(root / "classifier")),
  }


def patches(count, height, width, seed=0):
  """Pictures of large coloured patches."""
  small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
  return small.repeat(height // 4, axis=1).repeat(width // 4, axis=2)


def load(folders, **options):
  folder = geneval_detector.open_folder(
    folders["detector"], field="detector", kind="mask2former", hint=""
  )
  options = {"device": "cpu", "size": 0, "batch": 2, "least": LEAST} | options
  return geneval_detector.load_detector(folder, **options)


def post_processed(folders, images):
  """What transformers' own pipeline finds: of each picture [(label, score, mask)], the surest first."""
  import torch
  import transformers

  folder = folders["detector"]
  process = transformers.AutoImageProcessor.from_pretrained(folder)
  model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
  with torch.no_grad():
    outputs = model(**process(list(images), return_tensors="pt"))
  sizes = [images.shape[1:3]] * len(images)
  results = process.post_process_instance_segmentation(
    outputs, threshold=LEAST, target_sizes=sizes, return_binary_maps=True
  )
  found = []
  for each in results:
    rows = zip(each["segments_info"], each["segmentation"], strict=True)
    rows = [(info["label_id"], info["score"], mask.numpy().astype(bool)) for info, mask in rows]
    found.append(sorted(rows, key=lambda row: -row[1]))
  return found


def test_detections_are_those_of_post_process_instance_segmentation(folders):
  images = patches(3, 384, 384)
  wanted = post_processed(folders, images)
  found = load(folders)(images)
  assert min(map(len, wanted)) >= 3
  for ours, theirs in zip(found, wanted, strict=True):
    ours = sorted(ours, key=lambda d: -d.confidence)
    assert [d.kind for d in ours] == [terms.CLASSES[label] for label, _, _ in theirs]
    np.testing.assert_allclose(
      [d.confidence for d in ours], [score for _, score, _ in theirs], atol=2e-6
    )
    for detection, (_, _, mask) in zip(ours, theirs):
      assert detection.mask is not None
      # Batches of 2 and of 3 round differently: a pixel at the edge may fall on the other side.
      assert (detection.mask != mask).mean() < 1e-4
      y, x = np.nonzero(detection.mask)
      assert detection.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
  # The pictures differ, and so does what is found in them.
  assert len({tuple(d.box for d in each) for each in found}) == 3


def test_detections_at_other_sizes_differ_from_transformers_at_the_edges_of_masks_alone(folders):
  images = patches(2, 256, 512)
  for ours, theirs in zip(load(folders)(images), post_processed(folders, images), strict=True):
    ours = sorted(ours, key=lambda d: -d.confidence)
    assert [d.kind for d in ours] == [terms.CLASSES[label] for label, _, _ in theirs]
    for detection, (_, score, mask) in zip(ours, theirs):
      assert abs(detection.confidence - score) < 0.01
      assert (detection.mask & mask).sum() > 0.93 * (detection.mask | mask).sum()


def test_a_ramp_of_logits_is_cut_where_it_is_zero_and_padding_is_left_out():
  import torch

  # 64 x 64 seen, of which the lower 16 rows are padding; the picture has 96 x 128 pixels, two for one.
  ramp = torch.arange(16.0)[None, None].expand(2, 16, 16) - 3.5
  ramp = ramp * torch.tensor([[[1.0]], [[-1.0]]])
  logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
  found = geneval_detector._instances(
    logits, ramp, ((64, 64), (48, 64), (96, 128)), {0: "car", 1: "dog"}, 0.1
  )
  boxes = {each.kind: each.box for each in found}
  # Zero lies between the fourth and the fifth of 16 columns: a quarter of the width.
  assert boxes == {"car": (32.0, 0.0, 128.0, 96.0), "dog": (0.0, 0.0, 32.0, 96.0)}
  probability = torch.softmax(logits[0], 0)[0].item()
  sure = {each.kind: each.confidence for each in found}
  assert 0.5 * probability < sure["dog"] < sure["car"] < probability
  assert (
    geneval_detector._instances(logits, -100 + 0 * ramp, ((64, 64),) * 3, {0: "car"}, 0.1) == []
  )


def test_the_detector_sees_the_size_that_is_asked_for(folders):
  sizes = []
  detect = load(folders, size=96)
  import transformers

  original = transformers.Mask2FormerForUniversalSegmentation.forward

  def forward(self, pixel_values, **rest):
    sizes.append(tuple(pixel_values.shape))
    return original(self, pixel_values, **rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(transformers.Mask2FormerForUniversalSegmentation, "forward", forward)
    detect(patches(3, 64, 128))
  assert sizes == [
    (2, 3, 96, 160),
    (1, 3, 96, 160),
  ]  # 1333 / 800 x 96 is 160, and limits the longer edge


def test_colors_are_those_of_transformers_clip(folders):
  import torch
  import transformers

  name = geneval_colors.load_namer(
    geneval_detector.pathlib.Path(folders["classifier"]), device="cpu"
  )
  rng = np.random.default_rng(0)
  pictures = [
    patches(1, 4 * h, 4 * w, seed)[0]
    for seed, (h, w) in enumerate([(7, 7), (14, 7), (7, 9), (3, 20)])
  ]
  pictures += [np.full((40, 30, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(12)]
  kinds = ["car", "dog", "stop sign", "car"] * 4
  names = name([geneval_colors.Crop(p, k) for p, k in zip(pictures, kinds)])

  folder = folders["classifier"]
  model = transformers.CLIPModel.from_pretrained(folder).eval()
  tokenize = transformers.CLIPTokenizer.from_pretrained(folder)
  side = model.config.vision_config.image_size
  process = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": side}, crop_size={"height": side, "width": side}
  )
  for picture, kind, given in zip(pictures, kinds, names, strict=True):
    pixels = process([picture], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(geneval_colors.pixels(picture, side), pixels[0], atol=1e-5)
    texts = [
      text
      for c in terms.COLORS
      for text in (f"a photo of a {c} {kind}", f"a photo of a {c}-colored {kind}", f"a photo of a {c} object")
    ]  # fmt: skip
    inputs = tokenize(texts, padding=True, truncation=True, max_length=13, return_tensors="pt")
    with torch.no_grad():
      outputs = model(pixel_values=pixels, **inputs)
    means = outputs.text_embeds.reshape(10, 3, -1).mean(1)  # of normalised embeddings
    scores = means @ outputs.image_embeds[0] / means.norm(dim=-1)
    assert given == terms.COLORS[int(scores.argmax())]
  assert len(set(names)) >= 3


def test_rewards_are_the_rules_on_what_is_found(folders):
  images = patches(4, 96, 96)
  spec = {"weight": 1.0, **folders, "size": 0, "canary": "", "batch": 3, "threshold": 0.25}
  found = load(folders)(images)
  # Of each picture, its surest object; of another class than those that are there, none.
  kinds = [max(each, key=lambda d: d.confidence).kind for each in found]
  absent = next(
    kind for kind in terms.CLASSES if all(d.kind != kind for each in found for d in each)
  )
  include = lambda *kinds: {"tag": "any", "include": [{"class": k, "count": 1} for k in kinds]}
  asked = [include(kinds[0]), include(kinds[1], absent), include(absent), include(kinds[3])]
  expected = {"strict": [1, 0, 0, 1], "graded": [1, 0.5, 0, 1]}
  for rule, wanted in expected.items():
    reward_fn = rewards.make_rewards({"geneval": spec | {"rule": rule}})
    _, scores, infos = reward_fn(images, ["p"] * 4, asked)()
    assert scores["geneval"].tolist() == wanted and infos["geneval"]["exact"].tolist() == [
      1,
      0,
      0,
      1,
    ]
  assert f"expected {absent} >= 1, found 0" in infos["geneval"]["text"][2]
  # What counting asks for must be surer.
  counting = [row | {"tag": "counting"} for row in asked]
  reward_fn = rewards.make_rewards({"geneval": spec | {"counting_threshold": 0.999}})
  assert not reward_fn(images, ["p"] * 4, counting)()[1]["geneval"].any()


def test_colors_are_asked_of_the_objects_that_are_found(folders):
  images = patches(2, 96, 96)
  name = geneval_colors.load_namer(
    geneval_detector.pathlib.Path(folders["classifier"]), device="cpu"
  )
  surest = [max(each, key=lambda d: d.confidence) for each in load(folders)(images)]
  crops = [
    geneval_colors.Crop(geneval_colors.cut_out(i, d), d.kind) for i, d in zip(images, surest)
  ]
  colors = name(crops)
  other = next(color for color in terms.COLORS if color != colors[1])
  clause = lambda d, color: {
    "tag": "colors",
    "include": [{"class": d.kind, "count": 1, "color": color}],
  }
  asked = [clause(surest[0], colors[0]), clause(surest[1], other)]
  spec = {"weight": 1.0, **folders, "size": 0, "canary": "", "rule": "graded"}
  _, scores, infos = rewards.make_rewards({"geneval": spec})(images, ["p"] * 2, asked)()
  assert scores["geneval"].tolist() == [1, 0.5]
  assert infos["geneval"]["text"][0].startswith(f"{colors[0]} {surest[0].kind} ")


def test_weights_that_know_no_person_fail_the_canary_and_are_not_served(folders):
  spec = {"weight": 1.0, **folders, "size": 64}
  reward_fn = rewards.make_rewards({"geneval": spec})
  assert reward_fn.canaries["geneval"].prompt == canary.person().prompt
  with pytest.raises(
    ValueError, match="'geneval' gave 0 to the picture of its canary that must score"
  ):
    build.open_scorers({"geneval": spec}, workers=1, timeout=60.0)


def test_folders_that_are_not_whole_are_refused(folders, tmp_path):
  import safetensors.numpy

  def copy(name):
    return shutil.copytree(folders[name], tmp_path / f"{name}{len(list(tmp_path.iterdir()))}")

  def refused(said, **changes):
    with pytest.raises(ValueError, match=said) as caught:
      rewards.make_rewards({"geneval": {"weight": 1.0, **folders, "canary": "", **changes}})
    assert "\n" not in str(caught.value)

  some = copy("detector")
  weights = safetensors.numpy.load_file(some / "model.safetensors")
  del weights["class_predictor.weight"]
  safetensors.numpy.save_file(weights, some / "model.safetensors", {"format": "pt"})
  refused("detector='.*': lacks 1 weights, such as class_predictor.weight", detector=str(some))
  other = copy("detector")
  weights["class_predictor.weight"] = np.zeros((5, 32), np.float32)
  safetensors.numpy.save_file(weights, other / "model.safetensors", {"format": "pt"})
  refused("detector='.*': cannot be loaded", detector=str(other))
  bare = copy("detector")
  (bare / "preprocessor_config.json").unlink()
  refused("has no preprocessor_config.json", detector=str(bare))
  mute = copy("classifier")
  for file in ("tokenizer.json", "vocab.json", "merges.txt"):
    (mute / file).unlink(missing_ok=True)
  refused("classifier='.*': holds no tokenizer", classifier=str(mute))
  refused("device='cuda:7': torch cannot use it", device="cuda:7")
  config = json.loads((bare / "config.json").read_text())
  config["id2label"] = {i: f"LABEL_{i}" for i in range(80)}
  (bare / "config.json").write_text(json.dumps(config))
  refused("not all of COCO's 80 names", detector=str(bare))


def test_metadata_is_checked_before_anything_is_scored(folders):
  reward_fn = rewards.make_rewards(
    {"geneval": {"weight": 1.0, **folders, "canary": "", "size": 64}}
  )
  for metadata, said in (
    ({}, "has include=None"),
    ({"include": [{"class": "persn", "count": 1}]}, "does not know. Did you mean 'person'"),
  ):
    with pytest.raises(ValueError, match=said):
      reward_fn.check([rewards.types.Prompt("a picture", metadata)])
    with pytest.raises(ValueError, match=said):
      reward_fn(patches(1, 64, 64), ["a picture"], [metadata])()
  assert geneval_rules.THRESHOLD < geneval_rules.COUNTING_THRESHOLD
