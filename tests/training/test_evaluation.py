"""Evaluation paints the same images whatever the batch, and its grid shows all of them."""

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets
from tpgrpo_jax.data import shapes
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import build, evaluation, loop, scoring
from tpgrpo_jax.training import session as session_lib
from tpgrpo_jax.types import Prompt

WORDS = [Prompt(word, {}) for word in ("ANT", "BEE", "CAT", "DOG", "ELK")]


@pytest.fixture(scope="module")
def sampled(config_in, single_mesh, tmp_path_factory):
  """(eval.batch, prompts, kind, **) -> images of the small model on one device."""
  folder = tmp_path_factory.mktemp("evaluation")
  model = build.build_model(config_in(folder), single_mesh, ())
  params = model.params(model.trainable)

  def sample(batch, prompts, kind="ode", **options):
    config = config_in(folder, {"eval.batch": batch})
    with jax.set_mesh(single_mesh):
      run = evaluation.make_sample_fn(config, model, single_mesh, num_steps=3, kind=kind)
      return run(params, prompts, **options)

  return sample


def assert_same_images(a, b):
  # A batch of another size may round otherwise, which moves a pixel on the edge of two levels.
  difference = np.abs(a.astype(int) - b.astype(int))
  assert difference.max() <= 1
  assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("kind", evaluation.SAMPLERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_images_do_not_depend_on_the_batch(sampled, batch, kind):
  assert_same_images(sampled(batch, WORDS, kind), sampled(5, WORDS, kind))


def test_stochastic_samples_begin_with_the_same_noise_and_end_elsewhere(sampled):
  still, noisy = sampled(5, WORDS), sampled(5, WORDS, "stochastic")
  assert (still != noisy).any(axis=(1, 2, 3)).all()


def test_image_depends_on_its_own_prompt_and_place_alone(sampled):
  other = [*WORDS[:2], Prompt("FOX", {}), *WORDS[3:]]
  found, wanted = sampled(5, other), sampled(5, WORDS)
  np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(wanted, 2, axis=0))
  assert (found[2] != wanted[2]).any()


def test_noise_is_fixed_by_the_seed(sampled):
  np.testing.assert_array_equal(sampled(5, WORDS), sampled(5, WORDS))
  assert (sampled(5, WORDS, seed=1) != sampled(5, WORDS)).any()


def test_same_prompt_at_two_places_gets_two_images(sampled):
  twice = sampled(2, [WORDS[0], WORDS[0]])
  assert (twice[0] != twice[1]).any()


def test_evaluation_reports_every_reward_with_its_exact_share(config_in, single_mesh, tmp_path):
  config = config_in(tmp_path)
  model = build.build_model(config, single_mesh, ())

  def reward_fn(images, texts, metadata, *, rows):
    assert rows.all()
    assert texts == [p.text for p in WORDS]
    scores = {"a": np.arange(5, dtype=np.float32), "b": np.zeros(5, np.float32)}
    return lambda: (
      None,
      scores,
      {"a": {}, "b": {"exact": np.asarray([1, 0, 0, 0, 1]), "text": [*"UVWXY"]}},
    )

  with jax.set_mesh(single_mesh):
    evaluate = evaluation.make_evaluate(config, model, single_mesh, reward_fn, WORDS)
    result = evaluate(model.params(model.trainable))
  assert result.row["reward/a/mean"] == 2.0
  # Of 0 ... 4: sqrt(10 / 4) / sqrt(5).
  assert result.row["reward/a/standard_error"] == pytest.approx(0.5**0.5)
  assert result.readings == {"b": ["U", "V", "W", "X", "Y"]}
  assert result.row["reward/b/exact"] == pytest.approx(0.4)
  assert "reward/a/exact" not in result.row
  assert result.images.shape == (5, 24, 48, 3)
  assert result.row.keys() >= {"image/mean", "image/contrast", "image/edge_density"}


@pytest.mark.parametrize("count, columns, rows", [(1, 8, 1), (8, 8, 1), (9, 8, 2), (5, 2, 3)])
def test_grid_has_a_cell_for_every_image(count, columns, rows):
  images = np.full((count, 24, 48, 3), 7, np.uint8)
  sheet = evaluation.grid(images, ["CAT"] * count, columns=columns, scale=2)
  assert sheet.dtype == np.uint8
  assert sheet.shape == (rows * (48 + 14 + 4) + 4, columns * (96 + 4) + 4, 3)
  assert ((sheet == 7).all(axis=-1)).sum() >= count * 48 * 96


def test_grid_enlarges_small_images_and_leaves_large_ones():
  small = evaluation.grid(np.zeros((1, 24, 48, 3), np.uint8), ["A"], columns=1)
  large = evaluation.grid(np.zeros((1, 512, 512, 3), np.uint8), ["A"], columns=1)
  assert small.shape[1] == 2 * 48 + 8
  assert large.shape[1] == 512 + 8


def test_grid_takes_captions_of_any_form_and_length():
  images = np.zeros((3, 24, 48, 3), np.uint8)
  captions = ["two\nlines", "long " * 10**6, ""]
  began = time.monotonic()
  sheet = evaluation.grid(images, captions)
  assert time.monotonic() - began < 10  # a letter at a time it takes hours
  one_line = evaluation.grid(images, ["two lines", "long " * 100, ""])
  np.testing.assert_array_equal(sheet, one_line)


def test_of_an_info_only_numbers_for_each_image_are_spread():
  info = {
    "kept": [1.0, 2.0], "ragged": [[1], [1, 2]], "text": ["a", "b"], "pair": np.zeros((2, 2)), "one": 3,
    "mixed": [np.zeros(2), np.zeros((2, 3))], "short": [1],
  }  # fmt: skip
  assert {n: a.tolist() for n, a in evaluation._numbers(info, 2).items()} == {"kept": [1.0, 2.0]}


def test_latents_that_are_not_finite_are_no_picture(config_in, single_mesh, tmp_path):
  config = config_in(tmp_path, {"eval.batch": 5})
  model = build.build_model(config, single_mesh, ())
  params = model.params(jax.tree.map(lambda leaf: leaf * np.nan, model.trainable))
  with (
    jax.set_mesh(single_mesh),
    pytest.raises(ValueError, match="'ANT': its latents are not finite"),
  ):
    evaluation.make_sample_fn(config, model, single_mesh, num_steps=3)(params, WORDS)


def test_grid_cuts_a_long_caption_to_its_image():
  images = np.zeros((2, 24, 48, 3), np.uint8)
  sheet = evaluation.grid(images, ["W" * 200, ""], columns=2, scale=1)
  caption_line = sheet[-(14 + 4) :]
  assert (caption_line[:, :52] < 255).any()
  assert (caption_line[:, 52:] == 255).all()


def test_eval_rewards_by_name_are_those_of_the_config(config_in, single_mesh, tmp_path):
  config = config_in(tmp_path, {"eval.rewards": ("jpeg_compressibility", "coarse")})
  reward_fn = session_lib.build_eval_rewards(config, single_mesh)
  _, scores, _ = reward_fn(np.zeros((2, 24, 48, 3), np.uint8), ["A", "B"], [{}, {}])()
  assert scores.keys() == {"jpeg_compressibility", "coarse"}


def test_tiny_shapes_trains_on_the_parts_and_reports_the_strict_score(single_mesh):
  config = presets.recipe("tiny_shapes", "tp_grpo")
  row = {"tag": "two_object", "include": [{"class": k, "count": 1} for k in ("circle", "square")]}
  pictures = shapes.render([(shapes.Shape("circle", "red", 16.0, 16.0, 8.0),)])
  given = (pictures, ["a circle and a square"], [row])
  trained, scores, _ = session_lib.make_rewards(config, single_mesh, config.rewards)(*given)()
  assert scores.keys() == {"parts"} and 0 < trained[0] < 1
  reported, scores, _ = session_lib.build_eval_rewards(config, single_mesh)(*given)()
  assert scores.keys() == {"shapes"} and reported[0] == 0


def test_captions_hold_prompt_reading_and_named_scores_a_line_each():
  prompts = [Prompt("a CAT", {}), Prompt("a DOG", {})]
  scores = {"ocr": np.array([0.2124, 1.0]), "pickscore": np.array([21.5, -0.25])}
  readings = {"ocr": ["CA", ""]}
  found = evaluation.Evaluation({}, scores, np.zeros((2, 40, 96, 3), np.uint8), prompts, readings)
  captions = evaluation.captions(found)
  assert captions == [
    ("a CAT", "CA", "ocr=.212 pickscore=21.500"), ("a DOG", "", "ocr=1.000 pickscore=-.250"),
  ]  # fmt: skip
  three = evaluation.grid(found.images, captions, columns=1, scale=1)
  one = evaluation.grid(found.images, ["a CAT", "a DOG"], columns=1, scale=1)
  assert len(three) - len(one) == 2 * 2 * 14  # two more lines under each of two pictures
  written = lambda sheet, top: bool((sheet[top : top + 14] < 128).any())
  assert [written(three, 44 + 14 * line) for line in range(3)] == [True] * 3
  assert evaluation.captions(found._replace(readings={}))[0][1] == ""


def test_scores_are_kept_before_pictures_are_drawn(tmp_path, monkeypatch):
  monkeypatch.setattr(evaluation, "grid", lambda *_, **__: 1 / 0)
  images, prompts = np.zeros((2, 8, 16, 3), np.uint8), WORDS[:2]
  scores = {"a": np.array([0.25, 0.75], np.float32)}
  result = {"rewards": {}, "samples": [{"prompt": "ANT", "scores": {"a": 0.25}}]}
  with pytest.raises(ZeroDivisionError):
    scoring.save_evaluation(result, images, tmp_path)
  assert json.loads((tmp_path / "evaluation.json").read_text()) == result
  found = evaluation.Evaluation({"reward/mean": 0.5, "reward/std": 0.25}, scores, images, prompts)
  session = SimpleNamespace(
    config=config_lib.Config(),
    model=SimpleNamespace(params=lambda _: {}),
    evaluate=lambda *_: found,
  )
  best = SimpleNamespace(offer=lambda *_: True)
  totals = {"epoch": 3, "evaluations": 0, "samples": 0, "seconds": 0.0}
  with metrics.MetricsLog(tmp_path, config_lib.Log(tensorboard=False), {}) as sink:
    with pytest.raises(ZeroDivisionError):
      loop._evaluate(session, SimpleNamespace(ema={}), totals, best, sink, tmp_path, None)
  assert metrics.rows_of(tmp_path)[0]["reward/mean"] == 0.5


def test_what_is_said_of_a_picture_stands_beside_its_place_in_the_grid():
  images = np.arange(1, 11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 24, 48, 3), np.uint8)
  prompts = [Prompt(f"P{i}", {}) for i in range(10)]
  scores, readings = {"ocr": np.arange(10, dtype=np.float32)}, {"ocr": [f"R{i}" for i in range(10)]}
  result = evaluation.Evaluation({}, scores, images, prompts, readings)
  said = evaluation.describe(result, 9)
  sheet = evaluation.grid(images[:9], evaluation.captions(result)[:9])
  assert said["prompts"] == [f"P{i}" for i in range(9)]
  assert said["scores"] == {"ocr": [*map(float, range(9))]}
  assert said["readings"] == {"ocr": [f"R{i}" for i in range(9)]}
  for i, (left, top, right, bottom) in enumerate(said["boxes"]):
    assert (sheet[top:bottom, left:right] == i + 1).all()
    assert (sheet[top - 1, left:right] != i + 1).all() and (sheet[top:bottom, right] != i + 1).all()
  assert len(said["boxes"]) == 9
