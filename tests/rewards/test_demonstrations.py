"""Demonstrations: a kernel over the pictures of a folder, near the nearest and near all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import stored_models

from tpgrpo_jax import rewards, types
from tpgrpo_jax.rewards import demonstrations, preprocess
from tpgrpo_jax.training import mesh as mesh_lib

RNG = np.random.default_rng(0)
LIKED = RNG.integers(0, 256, (5, 40, 56, 3), np.uint8)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
  return stored_models.write_folder(stored_models.load(), "clip_l", tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("liked")
  for i, image in enumerate(LIKED):
    Image.fromarray(image).save(root / f"{i}.png")
  lines = [{"file": f"{i}.png", "prompt": "a cat" if i < 2 else "a dog"} for i in range(5)]
  (root / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return root


def make(tower, folder, **options):
  return demonstrations.make(path=str(tower), folder=str(folder), **options)


def unit(rows, size):
  x = RNG.normal(size=(rows, size))
  return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_kernel_lies_between_the_nearest_and_the_mean_and_becomes_both():
  x, liked = unit(6, 8), unit(4, 8)
  cosines = np.asarray(x) @ np.asarray(liked).T
  everyone = jnp.ones((6, 4), bool)
  at = lambda width: np.asarray(demonstrations.kernel_score(x, liked, everyone, width=width))
  np.testing.assert_allclose(at(1e-3), cosines.max(-1), atol=2e-3)  # w log M below
  np.testing.assert_allclose(at(1e3), cosines.mean(-1), atol=2e-3)
  between = at(0.1)
  assert (between < cosines.max(-1)).all() and (between > cosines.mean(-1)).all()


def test_every_demonstration_pulls_with_its_softmax_weight():
  x, liked = unit(1, 8), unit(4, 8)
  score = lambda x: demonstrations.kernel_score(x, liked, jnp.ones((1, 4), bool), width=0.2)[0]
  weights = jax.nn.softmax(x @ liked.T / 0.2)
  np.testing.assert_allclose(jax.grad(score)(x), weights @ liked, atol=1e-5)
  assert (np.asarray(weights) > 0.05).sum() > 1  # not the nearest alone


def test_demonstrations_that_are_not_wanted_do_not_count():
  x, liked = unit(3, 8), unit(4, 8)
  wanted = jnp.asarray([[1, 1, 0, 0]] * 3, bool)
  few = demonstrations.kernel_score(x, liked[:2], jnp.ones((3, 2), bool), width=0.1)
  np.testing.assert_allclose(
    demonstrations.kernel_score(x, liked, wanted, width=0.1), few, rtol=1e-5
  )


def test_a_demonstration_scores_1_when_it_is_the_only_one(tower, folder, tmp_path):
  Image.fromarray(LIKED[0]).save(tmp_path / "one.png")
  scores = np.asarray(make(tower, tmp_path)(LIKED, ["p"] * 5, [{}] * 5))
  assert scores[0] == pytest.approx(1.0, abs=1e-5) and (scores[1:] < 1 - 1e-4).all()


def test_a_file_is_seen_as_the_tower_sees_a_picture(folder):
  for file, image in zip(sorted(folder.glob("*.png")), LIKED):
    seen = demonstrations._read_picture(file, 28)[None]
    np.testing.assert_array_equal(
      preprocess.clip_pixels(jnp.asarray(seen), size=28),
      preprocess.clip_pixels(jnp.asarray(image[None]), size=28),
    )


def test_a_photograph_is_seen_as_its_camera_meant_it(tmp_path):
  for orientation, turn in ((6, -1), (3, 2), (8, 1)):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(LIKED[0]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(np.rot90(LIKED[0], turn))).save(tmp_path / "upright.png")
    turned, upright = (
      demonstrations._read_picture(tmp_path / f"{name}.png", 28) for name in ("turned", "upright")
    )
    np.testing.assert_array_equal(turned, upright)


def test_prompts_have_demonstrations_of_their_own(tower, folder):
  fn = make(tower, folder, of="prompt", width=1e-6)
  images = LIKED[[0, 0, 3, 3]]
  scores = np.asarray(fn(images, ["a cat", "a dog", "a dog", "a cat"], [{}] * 4))
  assert scores[0] > scores[1] and scores[2] > scores[3]
  with pytest.raises(ValueError, match="has no demonstration of it"):
    fn(LIKED[:1], ["a bird"], [{}])
  spec = {"weight": 1.0, "path": str(tower), "folder": str(folder), "of": "prompt"}
  begin = rewards.make_rewards({"demonstrations": spec})
  begin.check([types.Prompt("a cat", {})])
  with pytest.raises(ValueError, match="a bird"):
    begin.check([types.Prompt("a bird", {})])


def test_divided_over_a_mesh_and_in_small_batches_the_scores_stay_the_same(tower, folder):
  kinds = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 2, 2), mesh_lib.AXES, axis_types=kinds)
  args = (np.tile(LIKED, (2, 1, 1, 1))[:8], ["a cat", "a dog"] * 4, [{}] * 8)
  options = {"of": "prompt", "batch": 2, "placement": mesh_lib.make_placement(mesh)}
  found = make(tower, folder, **options)(*args)
  np.testing.assert_allclose(found, make(tower, folder, of="prompt")(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  "options, said",
  [
    ({"of": "some"}, "must be 'all' or 'prompt'"), ({"width": 0.0}, "width=0.0"), ({"batch": 0}, "batch=0"),
    ({"folder": "{empty}"}, "must be a folder with pictures"),
    ({"folder": "nowhere"}, "must be a folder with"),
    ({"folder": "{empty}", "of": "prompt"}, "needs captions.jsonl"),
    ({"folder": "{spoiled}"}, "is no picture"), ({"folder": "{spoiled}", "of": "prompt"}, "line 2 must be"),
    ({"folder": "{lost}", "of": "prompt"}, "names 'gone.png'"),
  ],
)  # fmt: skip
def test_options_that_cannot_be_are_named(tower, folder, tmp_path, options, said):
  for name in ("empty", "spoiled", "lost"):
    (tmp_path / name).mkdir()
  (tmp_path / "spoiled" / "a.png").write_bytes(b"no picture")
  (tmp_path / "spoiled" / "captions.jsonl").write_text('{"file": "a.png", "prompt": "p"}\n{}\n')
  (tmp_path / "lost" / "captions.jsonl").write_text('{"file": "gone.png", "prompt": "p"}\n')
  if "folder" in options:
    options = options | {"folder": str(tmp_path / options["folder"].strip("{}"))}
  with pytest.raises(ValueError, match=said):
    demonstrations.make(**{"path": str(tower), "folder": str(folder)} | options)
