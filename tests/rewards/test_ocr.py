import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont
import pytest

from tpgrpo_jax import rewards, types
from tpgrpo_jax.rewards import ocr

WORDS = ["CAT", "HELLO", "X7K", "MAPLE", "NUT", "3497", "TRY", "DUCK", "LAMP", "PARK", "VERY"]
PROMPT_FILE = pathlib.Path(__file__).parents[2] / "../shared/data/ocr/test.txt"


def _picture(*lines, height=24, width=64, size=18):
  """uint8 [height, width, 3]: the lines of text, black on white, centred."""
  image = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(image)
  for i, line in enumerate(lines):
    place = (width / 2, height * (2 * i + 1) / (2 * len(lines)))
    draw.text(place, line, fill="black", anchor="mm", font=ImageFont.load_default(size=size))
  return np.asarray(image)


def _noisy_words(seed):
  """uint8 [11, 24, 64, 3]: WORDS under so much noise that some are misread."""
  images = np.stack([_picture(word) for word in WORDS])
  noise = np.random.default_rng(seed).normal(0, 170, images.shape)
  return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reward():
  return ocr.make()


@pytest.fixture(scope="module")
def reward_with_detection():
  return ocr.make(detect=True)


@pytest.mark.parametrize(
  ["read", "target", "score"],
  [
    ("cat", "cat", 1.0),
    ("cat", "cart", 0.75),  # one insertion of four
    ("dog", "cat", 0.0),  # three replacements of three
    ("", "cat", 0.0),
    ("catastrophe", "cat", 0.0),  # eight deletions, no more than three count
    ("kitten", "sitting", 1 - 3 / 7),
  ],
)
def test_edit_similarity_equals_the_hand_count(read, target, score):
  assert ocr.edit_similarity(read, target) == pytest.approx(score, abs=1e-12)


def test_flow_grpo_rule_forgives_text_around_the_target():
  assert ocr.edit_similarity_or_contained("catastrophe", "cat") == 1.0


def test_flow_grpo_rule_is_the_edit_similarity_elsewhere():
  assert ocr.edit_similarity_or_contained("cat", "cart") == 0.75


@pytest.mark.parametrize(
  ["one", "other"],
  [
    ("Hello World", "helloworld"),
    ("ＡＢ７", "ab7"),
    ("A\u3000B\n", "ab"),
    ("Don’t – go", "don't-go"),
    ("“A”—b…", '"a"-b...'),
  ],
)
def test_normalize_forgets_case_space_and_width(one, other):
  assert ocr.normalize(one) == ocr.normalize(other)


@pytest.mark.parametrize(
  ["prompt", "target"],
  [
    ('A smartwatch, its screen displaying "Step Goal Achieved"', "Step Goal Achieved"),
    ("A neon sign that reads “Open Late”, in the rain.", "Open Late"),
    ('A poster with "First" above "Second"', "First"),
    ("A knight's castle, its sign declaring \"Don't Enter\"", "Don't Enter"),
    ("CAT7", "CAT7"),
    ('A board 5" wide', 'A board 5" wide'),
    ('A 5" wide board that reads "OPEN"', "OPEN"),
    ('A 5"x7" print that reads "HI"', "HI"),
    ('A sign: "Route 66"', "Route 66"),
    ("A sign that says 'OPEN'", "OPEN"),
    ("A knight's sign, 'Don't Enter', by the dogs' bowl", "Don't Enter"),
    ("A sign that says ‘It’s open’.", "It’s open"),
    ("A '90s diner of rock 'n' roll that says 'Eat'", "Eat"),
    ("The dogs' bowls and the cats' bowls", "The dogs' bowls and the cats' bowls"),
    ('"A sign that reads ""OPEN"", in the rain"', "OPEN"),
    ('A sign that reads ""OPEN LATE""', "OPEN LATE"),
    ("Ein Schild mit „Offen“", "Offen"),
    ("Un panneau «Ouvert»", "Ouvert"),
    ("En skylt med ”Öppet”", "Öppet"),
    ("看板に「営業中」と書いてある", "営業中"),
    ("\"A street, with a sign that says 'OPEN'\"", "OPEN"),
    ('"Don\'t Enter"', "Don't Enter"),
    ('A sign \\"OPEN\\" here', "OPEN"),
    ("'Twas night, and a sign said 'OPEN'", "OPEN"),
    ("'cause the sign says 'NO'", "NO"),
    ('A 27 " monitor showing "BOOT"', "BOOT"),
    ('Route 66 "DINER"', "DINER"),
    ('An empty "" and a sign "REAL"', "REAL"),
    ("A wall with ''HELLO''", "HELLO"),
    ("Ein Tor mit »Offen«", "Offen"),
    ("Une porte ‹OPEN›", "OPEN"),
    ("A sign ＂OPEN＂", "OPEN"),
  ],
)
def test_target_is_the_first_text_between_double_quotes_or_all(prompt, target):
  assert ocr.target_text(prompt, {}) == target


def test_prompts_without_quoted_text_are_counted():
  texts = ["a red cat", "the cat's sign", 'a sign "OPEN"', "CAT"]
  prompts = [types.Prompt(text, {"text": text} if text == "CAT" else {}) for text in texts]
  (line,) = ocr.survey(lambda: {*"abcdefghijklmnopqrstuvwxyz'"}, prompts)
  assert line.startswith("2 of 4 prompts have no quoted text") and "'a red cat'" in line
  assert not ocr.survey(lambda: {*"openct"}, [types.Prompt('"OPEN"', {})] * 3)


def test_characters_that_the_reader_does_not_know_are_named(reward):
  known = "A cat, Ärger, 漢字, €5 - don't"
  prompts = [types.Prompt("x", {"text": text}) for text in (known, "A ж b", "Ж")]
  (line,) = reward.survey(prompts)
  assert "the characters 'ж' (in 2):" in line


def test_a_combined_reward_warns_of_what_its_rewards_find_in_the_prompts():
  combined = rewards.make_rewards({"mine": {"weight": 1.0, "make": "ocr"}})
  with pytest.warns(UserWarning, match="rewards.mine: 2 of 2 prompts have no quoted text"):
    combined.check([types.Prompt("a red cat", {}), types.Prompt("a blue cat", {})])


def test_as_many_threads_as_this_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
  monkeypatch.setattr(os, "cpu_count", lambda: 64)
  pools = []
  monkeypatch.setattr(ocr.futures, "ThreadPoolExecutor", lambda count, **_: pools.append(count))
  ocr.make()
  assert pools == [1]


def test_target_in_the_metadata_comes_before_the_prompt():
  assert ocr.target_text('A sign that reads "Stop"', {"text": "Go"}) == "Go"


def test_metadata_text_that_is_no_string_is_an_error():
  with pytest.raises(ValueError, match="text=7: must be a string"):
    ocr.target_text("A sign", {"text": 7})


@pytest.mark.skipif(not PROMPT_FILE.exists(), reason="Flow-GRPO's OCR prompts are not here")
def test_every_flow_grpo_prompt_has_a_quoted_target():
  prompts = PROMPT_FILE.read_text(encoding="utf-8").splitlines()
  wrong = [p for p in prompts if ocr.target_text(p, {}) != p.split('"')[1]]
  assert not wrong


@pytest.mark.parametrize("prompt", ["", "  ", 'A sign that reads ""', "A sign that reads “ ”"])
def test_empty_target_is_an_error_that_names_the_prompt(reward, prompt):
  with pytest.raises(ValueError, match="the text to render is empty") as error:
    reward(_picture("CAT")[None], [prompt], [{}])
  assert repr(prompt) in str(error.value)


def test_clean_words_are_read_exactly(reward):
  images = np.stack([_picture(word) for word in WORDS])
  scores, info = reward(images, WORDS, [{}] * len(WORDS))
  np.testing.assert_array_equal(scores, np.ones(len(WORDS), np.float32))
  np.testing.assert_array_equal(info["exact"], scores)


def test_score_counts_the_characters_of_the_picture_that_are_wrong(reward):
  scores, info = reward(_picture("HELLO")[None], ["JELLY"], [{}])
  np.testing.assert_allclose(scores, [0.6], atol=1e-7)
  assert info["text"] == ["HELLO"] and info["exact"] == [0.0]


def test_blank_image_scores_zero(reward):
  scores, info = reward(_picture()[None], ["CAT"], [{}])
  assert scores == [0.0] and info["text"] == [""]


def test_scores_are_float32(reward):
  scores, info = reward(_picture("CAT")[None], ["CAT"], [{}])
  assert scores.dtype == info["exact"].dtype == np.float32


def test_empty_batch_has_no_scores(reward):
  scores, info = reward(np.zeros((0, 24, 64, 3), np.uint8), [], [])
  assert scores.shape == (0,) and info["text"] == []


def test_noisy_words_are_sometimes_misread(reward):
  """Else the next two tests would compare constants."""
  scores, _ = reward(_noisy_words(0), WORDS, [{}] * len(WORDS))
  assert scores.min() < 1 and scores.max() > 0


def test_score_does_not_depend_on_the_batch(reward):
  images = _noisy_words(0)
  _, together = reward(images, WORDS, [{}] * len(WORDS))
  alone = [reward(image[None], [word], [{}])[1]["text"] for image, word in zip(images, WORDS)]
  assert together["text"] == sum(alone, [])


def test_score_does_not_depend_on_the_number_of_workers(reward):
  call = (_noisy_words(1), WORDS, [{}] * len(WORDS))
  _, many = reward(*call)
  _, one = ocr.make(workers=1)(*call)
  assert many["text"] == one["text"]


def test_narrow_image_is_accepted(reward):
  scores, _ = reward(_picture("I", width=8)[None], ["I"], [{}])
  assert np.isfinite(scores).all()


def test_reading_takes_the_operations_that_another_tool_counts(reward):
  # onnx-tool 1.0.1 on PP-OCRv6_rec_small.onnx at [1, 3, 48, 96]: Conv 297,691,488 and MatMul 29,776,320 MACs.
  assert reward.flops(24, 48) == 2 * (297_691_488 + 29_776_320)


def test_what_reading_a_scene_takes_is_not_known(reward_with_detection):
  assert not hasattr(reward_with_detection, "flops")


def test_text_score_drops_lines_read_without_confidence():
  call = (_picture("CAT")[None], ["CAT"], [{}])
  scores, info = ocr.make(text_score=1.0, workers=1)(*call)
  assert scores == [0.0] and info["text"] == [""]


def test_detection_joins_the_lines_of_a_scene(reward_with_detection):
  scene = _picture("Spring", "Collection", "2024", height=320, width=320, size=44)
  scores, info = reward_with_detection(scene[None], ['Reads "Spring Collection 2024"'], [{}])
  assert scores == [1.0] and info["text"] == ["Spring Collection 2024"]


def test_detection_finds_nothing_in_a_blank_scene(reward_with_detection):
  blank = np.full((1, 256, 256, 3), 255, np.uint8)
  scores, info = reward_with_detection(blank, ["CAT"], [{}])
  assert scores == [0.0] and info["text"] == [""]


@pytest.mark.parametrize(
  ["options", "message"],
  [
    ({"workers": -1}, "workers=-1: must be"),
    ({"text_score": 1.5}, "text_score=1.5: must be"),
    ({"rule": "flow_grp"}, "Did you mean 'flow_grpo'"),
  ],
)
def test_option_out_of_range_is_an_error(options, message):
  with pytest.raises(ValueError, match=message):
    ocr.make(**options)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
  with pytest.raises(ImportError, match="pip install 'rapidocr>=3.10' 'onnxruntime"):
    ocr.make()


def test_import_of_the_package_leaves_the_ocr_packages_alone():
  code = "import sys, tpgrpo_jax.rewards; print({'rapidocr', 'onnxruntime'} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "set()"


def test_process_ends_and_prints_nothing_although_the_pool_was_never_closed():
  code = (
    "import numpy as np; from tpgrpo_jax.rewards import ocr;"
    "ocr.make(workers=2)(np.zeros((20, 24, 48, 3), np.uint8), ['CAT'] * 20, [{}] * 20)"
  )
  # The limit is generous for a busy machine; a pool that holds the process would hold it for ever.
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
  )
  assert result.stdout == result.stderr == ""
