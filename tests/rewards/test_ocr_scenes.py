"""Text in pictures of full size is found, read and scored as Flow-GRPO's code scores it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import pytest

from tpgrpo_jax.rewards import ocr

SIDE = 512


def scene(seed, *boards):
  """uint8 [512, 512, 3]: a coloured ramp with noise, and boards (text, x, y, size, ink, paper, angle)."""
  rng = np.random.default_rng(seed)
  x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
  corners = rng.integers(40, 215, (3, 3))
  ramp = corners[0] + (corners[1] - corners[0]) * x[..., None] / 2
  ramp = ramp + (corners[2] - corners[0]) * y[..., None] / 2 + rng.normal(0, 8, (SIDE, SIDE, 3))
  image = Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8))
  for text, left, top, size, ink, paper, angle in boards:
    font = ImageFont.load_default(size=size)
    width, height = (int(v) for v in font.getbbox(text)[2:])
    board = Image.new("RGBA", (width + size, height + size), paper)
    ImageDraw.Draw(board).text((size // 2, size // 2), text, fill=ink, font=font)
    board = board.rotate(angle, expand=True, resample=Image.Resampling.BICUBIC)
    image.paste(board, (left, top), board)
  return np.asarray(image)


# (prompt, boards, what Flow-GRPO's formula gives when every letter is read as it is painted)
SCENES = {
  "a sign": (
    'A shop window with a sign that reads "Open Late"',
    [("Open Late", 60, 180, 60, "white", "navy", 0)],
    1.0,
  ),
  "two lines": (
    'A poster titled "Spring Collection"',
    [("Spring", 90, 60, 72, "black", "white", 0), ("Collection", 50, 260, 72, "black", "white", 0)],
    1.0,
  ),
  "a tilted board": (
    'A wooden board saying "Fresh Bread"',
    [("Fresh Bread", 50, 150, 56, "black", "wheat", 6)],
    1.0,
  ),
  "one letter wrong": (
    'A neon sign reading "Dinner"',
    [("Dinker", 80, 200, 80, "yellow", "black", 0)],
    1 - 1 / 6,
  ),
  "text around the target": (
    'A road sign with "Slow Down"',
    [("Please Slow Down", 30, 80, 44, "white", "green", 0), ("5 km", 200, 330, 60, "black", "white", 0)],
    1.0,  # contained
  ),
  "text far longer than the target": (
    'A book named "Fox"',
    [("Understanding", 30, 80, 56, "black", "white", 0), ("Wheels", 120, 330, 60, "black", "white", 0)],
    0.0,  # no more than the target's length counts
  ),
  "no text": ('A wall that says "Hello"', [], 0.0),
}  # fmt: skip


def flow_grpo_score(lines, prompt):
  """Flow-GRPO's formula on lines [(text, confidence)], with the edit distance by the textbook."""
  target = prompt.split('"')[1].replace(" ", "").lower()
  read = "".join(text if score > 0 else "" for text, score in lines).replace(" ", "").lower()
  row = list(range(len(target) + 1))
  for i, a in enumerate(read, 1):
    diagonal, row[0] = row[0], i
    for j, b in enumerate(target, 1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
  distance = 0 if target in read else min(row[-1], len(target))
  return 1 - distance / len(target)


@pytest.fixture(scope="module")
def images():
  return {name: scene(i, *boards) for i, (name, (_, boards, _)) in enumerate(SCENES.items())}


@pytest.fixture(scope="module")
def scored(images):
  """name -> (score, text read), all in one call, as Flow-GRPO reads: both models, lines above 0.5."""
  reward = ocr.make(detect=True, rule="flow_grpo", text_score=0.5)
  prompts = [prompt for prompt, _, _ in SCENES.values()]
  scores, info = reward(np.stack(list(images.values())), prompts, [{}] * len(SCENES))
  return dict(zip(SCENES, zip(scores, info["text"])))


@pytest.mark.parametrize("name", SCENES)
def test_scene_is_read_and_scored_as_it_was_painted(scored, name):
  score, text = scored[name]
  painted = " ".join(board[0] for board in SCENES[name][1])
  assert ocr.normalize(text) == ocr.normalize(painted)
  assert score == pytest.approx(SCENES[name][2], abs=1e-6)


@pytest.mark.parametrize("name", SCENES)
def test_score_is_flow_grpos_formula_on_what_the_models_found(scored, images, name):
  """The models called line by line, here; the formula, here."""
  result = ocr._load_engine(True)(np.ascontiguousarray(images[name][..., ::-1]))
  lines = [] if result.txts is None else list(zip(result.txts, result.scores))
  lines = [(text, score) for text, score in lines if score >= 0.5]  # PaddleOCR's drop_score
  wanted = flow_grpo_score(lines, SCENES[name][0])
  assert scored[name][0] == pytest.approx(wanted, abs=1e-6)


def test_metadata_names_the_target_of_a_scene_too(images):
  reward = ocr.make(detect=True)
  scores, _ = reward(images["a sign"][None], ["A shop window"], [{"text": "OPEN LATE"}])
  assert scores == [1.0]


def test_scores_of_scenes_do_not_depend_on_the_batch_or_the_workers(scored, images):
  reward = ocr.make(detect=True, rule="flow_grpo", text_score=0.5, workers=1)
  for name in ("two lines", "one letter wrong"):
    scores, info = reward(images[name][None], [SCENES[name][0]], [{}])
    assert (scores[0], info["text"][0]) == scored[name]


def test_scene_taken_for_one_line_is_not_read(images):
  """Why pictures of full size need detect=True."""
  prompt = SCENES["two lines"][0]
  scores, _ = ocr.make()(images["two lines"][None], [prompt], [{}])
  assert scores[0] < 0.5
