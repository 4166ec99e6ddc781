"""Judges: questions word for word, answers read or asked again, and never a score that nobody gave."""

import base64
import http.server
import io
import json
import math
import pathlib
import subprocess
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax import rewards
from tpgrpo_jax.rewards import judge, judge_templates

IMAGES = np.repeat(np.arange(50, 250, 50, dtype=np.uint8), 4 * 6 * 3).reshape(4, 4, 6, 3)
PROMPTS = ["a {red} cat", "two dogs", '"x"', "a bird"]


class Judge(http.server.ThreadingHTTPServer):
  """A server of the chat completions' public form; `says` makes the message of a picture's brightness."""

  daemon_threads = True

  def __init__(self, says, models=("sees",)):
    self.says, self.models, self.asked = says, models, []
    super().__init__(("127.0.0.1", 0), _Handler)
    threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.answer(200, {"data": [{"id": name} for name in self.server.models]})

  def do_POST(self):
    asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    *_, picture, question = asked["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    brightness = int(np.asarray(Image.open(io.BytesIO(data))).mean())
    self.server.asked.append((question["text"], brightness, asked))
    said = self.server.says(brightness, asked)
    choice = said if isinstance(said, dict) else {"message": {"role": "assistant", "content": said}}
    self.answer(200, {"choices": [choice]})

  def answer(self, status, said):
    content = json.dumps(said).encode()
    self.send_response(status)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)


@pytest.fixture
def serve():
  opened = []

  def start(*args, **kwargs):
    opened.append(Judge(*args, **kwargs))
    return opened[-1]

  yield start
  for each in opened:
    each.shutdown()
    each.server_close()


def score(server, **options):
  spec = {"weight": 1.0, "make": "judge", "url": server.url, "model": "sees", **options}
  reward_fn = rewards.make_rewards({"mine": spec}, retries=0)
  _, scores, infos = reward_fn(IMAGES, PROMPTS, [{"index": i} for i in range(4)])()
  return scores["mine"].tolist(), infos["mine"]


def test_unified_reward_is_asked_its_own_question_and_read(serve):
  server = serve(
    lambda brightness, _: f"Fine. Final Score: 1 or so. Final Score: {brightness / 50}"
  )
  scores, info = score(server, template="unified_reward")
  assert scores == [1, 2, 3, 4] and info["text"][2].endswith("Final Score: 3.0")
  questions = {brightness: text for text, brightness, _ in server.asked}
  assert questions[50].endswith("Text Caption: [a {red} cat]")
  assert "assign a score from 1 to 5 after 'Final Score:'" in questions[50]


def test_a_template_about_two_pictures_is_shown_the_edited_one_first(serve, tmp_path):
  file = tmp_path / "edit.txt"
  file.write_text("{image} was to be changed: {prompt}. {metadata} Is the second? Score: ")
  server = serve(lambda brightness, _: f"Score: {brightness}")
  options = {"url": server.url, "model": "sees", "template": str(file), "low": 0.0, "high": 255.0}
  reward = judge.make(**options, pattern=r"Score: (\d+)")
  told = [{"n": i, "image": np.full((6, 4, 3), 7 + i, np.uint8)} for i in range(2)]
  scores, _ = reward(IMAGES[:2], PROMPTS[:2], told)
  text, _, asked = next(each for each in server.asked if each[1] == int(scores[1]))
  content = asked["messages"][0]["content"]
  shown = [base64.b64decode(c["image_url"]["url"].partition("base64,")[2]) for c in content[:-1]]
  first, second = (np.asarray(Image.open(io.BytesIO(data))) for data in shown)
  np.testing.assert_array_equal(first, told[1]["image"])
  np.testing.assert_array_equal(second, IMAGES[1])
  assert text.startswith(f'the first picture was to be changed: {PROMPTS[1]}. {{"n": 1}} Is')
  with pytest.raises(rewards.RewardError, match="paints from text alone"):
    reward(IMAGES[:1], PROMPTS[:1], [{"image": "a.png"}])


def test_unified_reward_2_is_the_mean_of_three_axes_that_are_told_too(serve):
  says = lambda brightness, _: (
    f"Alignment Score (1-5): {brightness // 50}\nCoherence Score (1-5): 4\nStyle Score (1-5): 2.5"
  )
  scores, info = score(serve(says), template="unified_reward_2")
  np.testing.assert_allclose(scores, [(k + 6.5) / 3 for k in (1, 2, 3, 4)], rtol=1e-6)
  assert info["alignment"].tolist() == [1, 2, 3, 4] and info["style"].tolist() == [2.5] * 4


@pytest.mark.parametrize(
  "text, number", [("4.", 4), ("4.5.", 4.5), ("4/5", 4), ("3, as", 3), ("2\n- 1", 2)]
)
def test_what_stands_behind_a_number_is_not_read(text, number):
  template = judge_templates.TEMPLATES["unified_reward"]
  assert template.read({"message": {"content": f"Final Score: {text}"}})[0] == number


def test_one_axis_out_of_range_is_no_score(serve):
  axes = ("alignment", "coherence", "style")
  server = serve(lambda *_: said)
  reward = judge.make(url=server.url, model="sees", template="unified_reward_2", tries=1)
  cases = [*((axis, "5.9") for axis in axes), ("style", "45"), ("alignment", "2,5"), ("style", "0")]
  for axis, value in cases:
    values = dict.fromkeys(axes, "1") | {axis: value}
    said = "\n".join(f"{name.capitalize()} Score (1-5): {v}" for name, v in values.items())
    with pytest.raises(rewards.RewardError, match="gave no score in 1 answers"):
      reward.judge(IMAGES[0], "a cat", {})


def test_yes_or_no_is_read_from_the_tokens_probabilities(serve):
  def says(brightness, asked):
    assert asked["logprobs"] and asked["top_logprobs"] == 20 and asked["max_tokens"] == 1
    yes = brightness / 500
    tokens = {"Yes": yes, " yes": yes, "No": 1 - 2 * yes - 0.1, "Maybe": 0.1}
    top = [{"token": t, "logprob": math.log(p)} for t, p in tokens.items()]
    return {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}

  scores, _ = score(serve(says), template="yes_no")
  expected = [2 * brightness / 500 / 0.9 for brightness in (50, 100, 150, 200)]
  np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_template_of_ones_own(serve, tmp_path):
  (tmp_path / "question.txt").write_text('Rate "{prompt}" ({metadata}) as {"score": 0 to 9}.')
  own = {"template": str(tmp_path / "question.txt"), "low": 0.0, "high": 9.0}
  server = serve(
    lambda brightness, _: f'I think {{so}}. {{"scores": {{"all": [{brightness / 25}]}}}} Done.'
  )
  assert score(server, json_path="scores.all.0", **own)[0] == [2, 4, 6, 8]
  assert 'Rate "a {red} cat" ({"index": 0}) as {"score": 0 to 9}.' in [a[0] for a in server.asked]
  server = serve(lambda brightness, _: f"step 1 score=1\nscore={brightness / 25}")
  assert score(server, pattern=r"score=([\d.]+)", **own)[0] == [2, 4, 6, 8]


def test_an_answer_that_cannot_be_read_is_asked_for_again(serve):
  says = lambda _, asked: "hm." if asked["seed"] < 2 else "Final Score: 3"
  server = serve(says)
  assert score(server, template="unified_reward")[0] == [3] * 4
  assert sorted(a[2]["temperature"] for a in server.asked) == [0.0] * 4 + [0.3] * 8


@pytest.mark.parametrize(
  "said, found",
  [
    ("I cannot see it.", "I cannot see it"), ("Final Score: 7", "Final Score: 7"),
    ("Final Score: 10", "10"), ("Final Score: 45", "45"), ("Final Score: 2,5", "2,5"),
    ("Final Score: -3", "-3"), ("Final Score: 3-4", "3-4"),
    ("Final Score: 1. Final Score: 3 to 4.", "3 to 4"),
    ("Final Score: ", "Final Score"), ({"message": {"content": None}}, "no text"), ({}, "no text"),
  ],
)  # fmt: skip
def test_an_answer_without_a_score_ends_the_run_and_is_named(serve, said, found):
  with pytest.raises(rewards.RewardError, match=f"gave no score in 3 answers.*{found}"):
    score(serve(lambda *_: said), template="unified_reward")


def test_a_score_out_of_range_is_none(serve, tmp_path):
  (tmp_path / "q.txt").write_text("{prompt}?")
  own = {"template": str(tmp_path / "q.txt"), "low": 0.0, "high": 10.0}
  for said in ("Score: 11", "Score: -1", "Score: 1e999", "Score: nan"):
    with pytest.raises(rewards.RewardError, match="no score in 3 answers"):
      score(serve(lambda *_, said=said: said), pattern=r"Score: (\S+)", **own)


def test_a_number_too_large_for_a_float_is_no_score(serve, tmp_path):
  huge = 10**400
  (tmp_path / "q.txt").write_text("{prompt}?")
  own = {"template": str(tmp_path / "q.txt"), "low": 0.0, "high": 10.0, "tries": 1}
  with pytest.raises(rewards.RewardError, match="no score in 1 answers"):
    score(serve(lambda *_: f'{{"score": {huge}}}'), json_path="score", **own)
  said = {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": -huge}]}]}}
  with pytest.raises(rewards.RewardError, match="no top_logprobs"):
    score(serve(lambda *_: said), template="yes_no", tries=1)


def test_an_answer_without_the_tokens_probabilities_is_none(serve):
  with pytest.raises(rewards.RewardError, match="no top_logprobs: does the server give them"):
    score(serve(lambda *_: "Yes"), template="yes_no")
  empty = {"logprobs": {"content": [{"top_logprobs": [{"token": "Well", "logprob": -0.1}]}]}}
  with pytest.raises(rewards.RewardError, match="neither Yes nor No among"):
    score(serve(lambda *_: empty), template="yes_no")


def test_another_model_or_another_server_ends_the_run_at_the_start(serve):
  server = serve(lambda *_: "", models=("hears",))
  with pytest.raises(ValueError, match="has no model 'sees', but hears"):
    score(server, template="yes_no")
  assert not server.asked


@pytest.mark.parametrize(
  "options, said",
  [
    ({"template": "yes_or_no"}, "Did you mean 'yes_no'"),
    ({"template": "yes_no", "pattern": "(.)"}, "is read in its own way"),
    ({"template": "{bare}", "pattern": "(.)", "low": 0.0, "high": 1.0}, r"has no \{prompt\}"),
    ({"template": "{file}", "pattern": "score", "low": 0.0, "high": 1.0}, "must have one group"),
    ({"template": "{file}", "pattern": "(a)(b)", "low": 0.0, "high": 1.0}, "must have one group"),
    ({"template": "{file}", "pattern": "(", "low": 0.0, "high": 1.0}, "is no regular expression"),
    ({"template": "{file}", "json_path": "a..b", "low": 0.0, "high": 1.0}, "between dots"),
    ({"template": "{file}", "low": 0.0, "high": 1.0}, "set one of pattern and json_path"),
    ({"template": "{file}", "pattern": "(.)", "json_path": "a", "low": 0.0, "high": 1.0}, "set one of"),
    ({"template": "{file}", "pattern": "(.)"}, "must say between which"),
    ({"template": "unified_reward", "low": 5.0, "high": 1.0}, "the lower one first"),
    ({"template": "unified_reward", "low": 6.0}, "the lower one first"),
    ({"template": "{latin}", "pattern": "(.)", "low": 0.0, "high": 1.0}, "is no text in UTF-8"),
    ({"template": "yes_no", "tries": 0}, "tries=0"),
    ({"template": "yes_no", "url": "host:1"}, "must begin with"),
  ],
)  # fmt: skip
def test_options_that_cannot_be_are_named(options, said, tmp_path):
  (tmp_path / "bare.txt").write_text("Is it good?")
  (tmp_path / "file.txt").write_text("Is it {prompt}?")
  (tmp_path / "latin.txt").write_bytes("Sch\xf6n: {prompt}?".encode("latin1"))
  named = {f"{{{name}}}": tmp_path / f"{name}.txt" for name in ("bare", "file", "latin")}
  template = str(named.get(options["template"], options["template"]))
  with pytest.raises(ValueError, match=said):
    judge.make(**{"url": "http://127.0.0.1:1", "model": "sees"} | options | {"template": template})


def test_a_bound_that_is_no_number_is_named():
  for low in ("a", True):
    with pytest.raises(ValueError, match=f"low={low!r} and high=5.0 must say between which"):
      judge_templates.choose("unified_reward", "", "", low, None)


def test_every_template_has_a_place_for_the_prompt():
  for template in judge_templates.TEMPLATES.values():
    assert "{prompt}" in template.text and template.low < template.high


def test_one_picture_from_the_command_line(serve, tmp_path):
  server = serve(lambda brightness, _: f"Bright. Final Score: {brightness / 50}")
  Image.fromarray(np.tile(IMAGES[1], (4, 4, 1))).save(tmp_path / "picture.png")
  options = {"url": server.url, "model": "sees", "template": "unified_reward"}
  run = lambda *more: subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.judge", f"--picture={tmp_path / 'picture.png'}", *more],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  done = run("--dry-run", f"--options={json.dumps(options)}", "--prompt=two dogs")
  assert done.returncode == 0, done.stderr
  assert "Text Caption: [two dogs]" in done.stdout
  assert "answered:\nBright. Final Score: 2.0" in done.stdout and "score: 2\n" in done.stdout
  done = run("--dry-run=false", "--prompt=two dogs")
  assert done.returncode == 1 and "does nothing else" in done.stderr
  done = run('--options={"url": "http://127.0.0.1:1"}', "--prompt=two dogs")
  assert done.returncode == 1 and "Traceback" not in done.stderr and "'model'" in done.stderr
