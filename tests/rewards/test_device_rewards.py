"""CLIPScore, PickScore, HPSv2 and the aesthetic score equal the references', on any devices."""

import json

import jax
import numpy as np
import pytest
import stored_models

from tpgrpo_jax import rewards, types
from tpgrpo_jax.cost import flops
from tpgrpo_jax.rewards import clip_score, preprocess, towers
from tpgrpo_jax.training import mesh as mesh_lib

# Relative to the largest score; measured: 6e-6. What remains is the order of float32 sums, and for HPSv2
# torchvision's resampling weights in float32.
TOLERANCE = 1e-4
NAMES = ("clipscore", "pickscore", "hpsv2", "aesthetic")
# Absolute, twice what was measured: of cosines 0.01, 0.003 and 0.006, times 2.5, 100 and 1.
BFLOAT16 = {"clipscore": 0.025, "pickscore": 0.3, "hpsv2": 0.006, "aesthetic": 0.004}


@pytest.fixture(scope="module")
def golden():
  return stored_models.load()


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
  """reward -> options that open its stored model."""
  root = tmp_path_factory.mktemp("models")
  cases = {"clipscore": "clip_l", "pickscore": "clip_h", "hpsv2": "hps", "aesthetic": "clip_l"}
  found = {
    name: {"path": str(stored_models.write_folder(golden, case, root / name))}
    for name, case in cases.items()
  }
  found["aesthetic"]["head"] = str(stored_models.write_head(golden, root / "aesthetic"))
  return found


def make(name, folders, **options):
  if name == "hpsv2":
    pytest.importorskip("ftfy")
  return rewards.DEVICE_REWARDS[name](**folders[name] | options)


def wanted(golden, name, size):
  if name == "clipscore":
    return 2.5 * np.maximum(golden[f"clip_l/cosine/{size}"], 0)
  key = {"pickscore": "clip_h/logits", "hpsv2": "hps/score", "aesthetic": "head/score"}[name]
  return golden[f"{key}/{size}"]


def score(fn, golden, size, repeats=1):
  prompts = stored_models.prompts(golden) * repeats
  images = np.tile(golden[f"images/{size}"], (repeats, 1, 1, 1))
  return fn(images, prompts, [{}] * len(prompts))


def relative_error(found, expected):
  found = np.asarray(found)
  assert found.shape == expected.shape and found.dtype == np.float32
  return np.abs(found - expected).max() / np.abs(expected).max()


def on_mesh(data, fsdp, tensor):
  kinds = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, tensor), mesh_lib.AXES, axis_types=kinds)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", stored_models.SIZES)
def test_score_equals_the_references_on_golden_data(golden, folders, name, size):
  expected = wanted(golden, name, size)
  assert np.abs(expected).min() > 0
  assert relative_error(score(make(name, folders), golden, size), expected) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (stored_models.GOLDEN / "make_rewards.py").read_text()


def test_a_picture_takes_two_operations_for_every_weight_and_token(golden, folders):
  tower = json.loads(golden["clip_l/files/config.json"].tobytes())["vision_config"]
  width, side, layers = tower["hidden_size"], tower["image_size"], tower["num_hidden_layers"]
  patches = (side // tower["patch_size"]) ** 2
  weights = sum(
    value.size
    for name, value in stored_models.weights(golden, "clip_l").items()
    if name.startswith("vision_model.encoder") and value.ndim == 2
  )
  wanted = 2 * (patches + 1) * weights + 4 * (patches + 1) ** 2 * width * layers
  wanted += 2 * patches * (3 * tower["patch_size"] ** 2) * width
  picture = jax.ShapeDtypeStruct((1, 48, 48, 3), np.uint8)
  resized = flops.count(lambda x: preprocess.clip_pixels(x, size=side), picture).total
  found = make("aesthetic", folders).flops(48, 48)
  assert wanted < found - resized < 1.01 * wanted  # on top: the projection and the head


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_known_on_a_mesh_too(golden, folders, name):
  found = make(name, folders, placement=mesh_lib.make_placement(on_mesh(2, 2, 2))).flops(48, 48)
  assert found == make(name, folders).flops(48, 48) > 0


@pytest.mark.parametrize("name", NAMES)
def test_divided_over_a_mesh_the_scores_stay_the_same(golden, folders, name):
  mesh = on_mesh(2, 2, 2)
  fn = make(name, folders, placement=mesh_lib.make_placement(mesh))
  for images in ("host", "divided"):
    place = mesh_lib.make_placement(mesh).batch if images == "divided" else lambda x: x
    prompts = stored_models.prompts(golden) * 4
    found = fn(place(np.tile(golden["images/37x61"], (4, 1, 1, 1))), prompts, [{}] * 8)
    assert isinstance(found, jax.Array) and found.shape == (8,)
    expected = np.tile(wanted(golden, name, "37x61"), 4)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("count", [1, 6, 8, 11])
@pytest.mark.parametrize("where", ["host", "one device", "divided"])
def test_weighted_sum_takes_any_number_of_images_wherever_they_lie(golden, folders, count, where):
  mesh = on_mesh(2, 2, 2)
  specs = {
    "clipscore": {"weight": 2.0, **folders["clipscore"]},
    "jpeg_compressibility": 0.1,
    "taste": {"weight": 1.0, "make": "aesthetic", **folders["aesthetic"]},
  }
  begin = rewards.make_rewards(specs, placement=mesh_lib.make_placement(mesh))
  rows = np.arange(count) % 2
  images = golden["images/37x61"][rows]
  prompts = [stored_models.prompts(golden)[i] for i in rows]
  if where == "one device":
    given = jax.numpy.asarray(images)
  elif where == "divided" and count == 8:
    given = mesh_lib.make_placement(mesh).batch(images)
  else:
    given = images
  with jax.set_mesh(mesh):  # as training calls it
    finish = begin(given, prompts, [{}] * count)
  total, scores, infos = finish()
  assert list(scores) == list(infos) == list(specs)
  for label, name in (("clipscore", "clipscore"), ("taste", "aesthetic")):
    assert relative_error(scores[label], wanted(golden, name, "37x61")[rows]) < TOLERANCE
  sums = 2 * scores["clipscore"] + 0.1 * scores["jpeg_compressibility"] + scores["taste"]
  np.testing.assert_allclose(total, sums, rtol=1e-6)


def test_weights_are_divided_as_the_placement_says(golden, folders):
  seen = {}
  mesh = on_mesh(2, 2, 2)

  def params(tree):
    seen["shardings"] = mesh_lib.param_shardings(mesh, tree)
    return seen["shardings"]

  make("pickscore", folders, placement=types.Placement(params, mesh_lib.make_placement(mesh).batch))
  kernel = seen["shardings"]["vision_model"]["blocks_0"]["mlp"]["linear_1"]["kernel"]
  assert kernel.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_scores_are_near_the_float32_ones(golden, folders, name):
  fn = make(name, folders, dtype="bfloat16")
  for size in stored_models.SIZES:
    found = score(fn, golden, size)
    assert found.dtype == np.float32
    assert np.abs(np.asarray(found) - wanted(golden, name, size)).max() < BFLOAT16[name]


@pytest.mark.parametrize(
  "batch", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4))]
)
def test_chunks_do_not_change_the_scores(golden, folders, batch):
  alone = score(make("pickscore", folders), golden, "48x48", repeats=8)
  assert (
    relative_error(
      score(make("pickscore", folders, batch=batch), golden, "48x48", repeats=8), np.asarray(alone)
    )
    < 1e-5
  )  # batches of another size sum in another order
  divided = make(
    "pickscore", folders, batch=batch, placement=mesh_lib.make_placement(on_mesh(1, 2, 4))
  )
  assert relative_error(score(divided, golden, "48x48", repeats=8), np.asarray(alone)) < 1e-5


def test_reward_is_compiled_once_for_every_shape(golden, folders, monkeypatch):
  traced = []
  whole = clip_score.preprocess.clip_pixels
  monkeypatch.setattr(
    clip_score.preprocess, "clip_pixels", lambda x, **kw: traced.append(x.shape) or whole(x, **kw)
  )
  fn = make("pickscore", folders)
  for size in ("48x48", "48x48", "37x61", "48x48"):
    score(fn, golden, size)
  assert len(traced) == 2


def test_weights_are_arguments_and_not_constants(golden, folders, monkeypatch):
  run, calls = towers.run_chunks, []
  monkeypatch.setattr(
    towers, "run_chunks", lambda *args, **kw: calls.append((args, kw)) or run(*args, **kw)
  )
  score(make("pickscore", folders), golden, "48x48")
  ((args, kw),) = calls
  constants = sum(np.size(c) for c in run.trace(*args, **kw).jaxpr.consts)
  assert constants < 3 * 2 * 28 * 48 + 100 < sum(x.size for x in jax.tree.leaves(args[1]))
