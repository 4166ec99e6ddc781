"""Rewards of other machines against real servers that fail in every way that we thought of."""

import json
import os
import pickle
import socket
import threading
import time

import numpy as np
import pytest
import scripted_server
import trustme

from tpgrpo_jax import rewards
from tpgrpo_jax.rewards import addresses, remote, servers, tokens

IMAGES = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 4 * 6 * 3).reshape(5, 4, 6, 3)
PROMPTS = [f"prompt {i}" for i in range(5)]
METADATA = [{"index": i} for i in range(5)]
EXPECTED = np.asarray([0.0, 0.196, 0.392, 0.588, 0.784], np.float32)
STOPS = rewards.RewardError


@pytest.fixture
def server():
  with scripted_server.Server().running() as running:
    yield running


def score(url, patience=None, **options):
  """(scores, info) by the machinery of a run, with a little of its patience."""
  spec = {"weight": 1.0, "make": "remote", "url": url, "timeout": 1.5, **options}
  patience = {"retries": 2, "backoff": 0.01} | (patience or {})
  reward_fn = rewards.make_rewards({"mine": spec}, **patience)
  _, scores, infos = reward_fn(IMAGES, PROMPTS, METADATA)()
  return scores["mine"], infos["mine"]


def test_scores_of_flow_factorys_form_keep_the_images_order(server):
  scores, info = score(server.url, batch=2, connections=3)
  np.testing.assert_array_equal(scores, EXPECTED)
  assert info == {} and server.requests == 3
  asked = [json.loads(body) for body in server.bodies]
  assert sorted(m["index"] for each in asked for m in each["metadata"]) == [0, 1, 2, 3, 4]
  assert all(set(each) == {"prompt", "image", "metadata"} for each in asked)


@pytest.mark.parametrize("fault", ["reordered", "slow", "busy"])
def test_answers_that_are_late_or_look_odd_are_taken(server, fault, caplog):
  server.script = [fault]
  np.testing.assert_array_equal(score(server.url)[0], EXPECTED)
  assert not caplog.records


@pytest.mark.parametrize(
  "fault",
  ["truncated", "closed", "hang", "drip", "headers", "hints", "away", "429", "500", "502", "huge"],
)
def test_a_failure_that_passes_is_tried_again_with_one_message(server, fault, caplog):
  server.script = [fault]
  began = time.monotonic()
  np.testing.assert_array_equal(score(server.url)[0], EXPECTED)
  assert time.monotonic() - began < 10  # what drips, drips for 15 s
  (record,) = caplog.records
  assert "reward 'mine': ServerError" in record.getMessage() and server.url in record.getMessage()


@pytest.mark.parametrize("fault", ["truncated", "away", "500"])
def test_a_failure_that_stays_ends_the_run_after_the_retries(server, fault, caplog):
  server.script = [fault] * 9
  with pytest.raises(STOPS, match="'mine' failed 3 times.*start the same command again"):
    score(server.url)
  assert server.requests == 3 and len(caplog.records) == 1


def test_a_server_that_is_busy_for_ever_is_given_up_in_time(server):
  server.script = ["busy"] * 1000
  with pytest.raises(STOPS, match="answered 503: come again"):
    score(server.url, {"retries": 0}, timeout=0.5)


@pytest.mark.parametrize(
  "fault, said",
  [
    ("short", "4 scores for 5 pictures"), ("long", "6 scores for 5 pictures"), ("nan", "the score nan"),
    ("infinite", "the score inf"), ("null", "None.*no number"), ("text", "'0.5'|no number"),
    ("true", "no number"), ("outside", r"the score 7\.5, outside 0 to 1"), ("none", "no list of rewards"),
    ("nested", "1 scores for 5 pictures"), ("error", "CUDA out of memory"), ("html", "<html><h1>Welcome"),
    ("deep", "what is no JSON"), ("301", "answered 301"), ("401", "Set token_file"),
    ("404", "the reward that is asked for"),
    ("413", "Set batch to fewer"), ("422", "status 422"),
  ],
)  # fmt: skip
def test_answers_that_cannot_be_trained_on_end_the_run_at_once(server, fault, said, caplog):
  server.script = [fault]
  with pytest.raises(STOPS, match=said) as caught:
    score(server.url, low=0.0, high=1.0)
  assert server.url in str(caught.value) and server.requests == 1
  assert not caplog.records and "\n" not in str(caught.value)


def test_a_server_that_is_down_at_the_start_ends_the_run_in_one_line(unused_port):
  began = time.monotonic()
  with pytest.raises(ValueError, match="no reward server answers.*ConnectError") as caught:
    score(f"http://127.0.0.1:{unused_port}")
  assert time.monotonic() - began < 5
  assert "\n" not in str(caught.value) and str(caught.value).startswith("rewards.mine: ")


@pytest.mark.parametrize("hello", ["hang", "headers", "hints"])
def test_a_server_that_does_not_say_who_it_is_ends_the_run_within_seconds(
  server, hello, monkeypatch
):
  monkeypatch.setattr(servers, "_HELLO", 0.5)
  server.hello = hello
  began = time.monotonic()
  with pytest.raises(ValueError, match=r"/health: no whole answer within 0\.5 s"):
    score(server.url, timeout=120.0)
  assert time.monotonic() - began < 4


def test_something_else_on_the_port_ends_the_run_at_the_start():
  with scripted_server.Server(health={"hello": "world"}).running() as server:
    with pytest.raises(ValueError, match="is no reward server that is well"):
      score(server.url)


def test_another_rewards_server_on_the_port_ends_the_run_at_the_start():
  ours = {"status": "ok", "service": "tpgrpo_jax", "protocol": 1, "rewards": {"clipscore": {}}}
  with scripted_server.Server(health=ours).running() as server:
    with pytest.raises(ValueError, match="has no reward 'ocr'.*clipscore"):
      score(server.url, reward="ocr")
  with scripted_server.Server(health=ours | {"protocol": 2}).running() as server:
    with pytest.raises(ValueError, match="speaks protocol 2"):
      score(server.url, reward="ocr")
  several = ours | {"rewards": {"ocr": {}, "clipscore": {}}}
  with scripted_server.Server(health=several).running() as server:
    with pytest.raises(ValueError, match="set reward to one of them"):
      score(server.url)


def test_a_server_that_lies_is_found_out_by_the_canary(server):
  # It is all brightness: white scores higher than a word on white.
  with pytest.raises(ValueError, match="of its canary that must score higher"):
    score(server.url, reward="ocr")
  np.testing.assert_array_equal(score(server.url, canary="")[0], EXPECTED)


def labelled(url, label, **options):
  spec = {"weight": 1.0, "make": "remote", "url": url, "timeout": 2.0, **options}
  reward_fn = rewards.make_rewards({label: spec})
  return reward_fn(IMAGES, PROMPTS, METADATA)()[1][label]


def test_a_label_that_is_a_rewards_name_asks_for_that_reward():
  # It is all brightness, so that OCR's canary finds it out.
  with scripted_server.Server().running() as server:
    with pytest.raises(ValueError, match="of its canary that must score higher"):
      labelled(server.url, "ocr")
    np.testing.assert_array_equal(labelled(server.url, "clipscore"), EXPECTED)
  served = {"words": {"make": "clipscore"}}
  ours = {"status": "ok", "service": "tpgrpo_jax", "protocol": 1, "rewards": served}
  with scripted_server.Server(health=ours).running() as server:
    with pytest.raises(ValueError, match="has the reward 'words', and the run's label is 'ocr'"):
      labelled(server.url, "ocr")
    assert server.requests == 0
    for label, options in (("clipscore", {}), ("mine", {}), ("ocr", {"reward": "words"})):
      np.testing.assert_array_equal(labelled(server.url, label, **options), EXPECTED)
    with pytest.raises(ValueError, match="run_label: unknown option"):
      labelled(server.url, "mine", run_label="ocr")


@pytest.mark.parametrize(
  "about",
  [{"limits": None}, {"limits": [1]}, {"forms": None}, {"limits": {"body": "x", "images": 0}}],
)
def test_odd_words_about_limits_are_passed_over(about):
  with scripted_server.Server(health={"status": "ok", **about}).running() as server:
    np.testing.assert_array_equal(score(server.url)[0], EXPECTED)


def test_requests_are_as_large_as_the_server_takes_them():
  noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
  metadata = [{"image": noise[i]} for i in range(6)]
  for limits, told, requests in (
    ({"body": 60_000}, [{}] * 6, 3),  # 24.6 kB each
    ({"body": 60_000}, metadata, 6),
    ({"all_pixels": 3 * 64 * 64}, [{}] * 6, 2),
    ({"body": 5}, [{}] * 6, 6),
  ):
    with scripted_server.Server(health={"status": "ok", "limits": limits}).running() as server:
      remote.make(url=server.url)(noise, ["a"] * 6, told)
      assert server.requests == requests
      assert all(len(body) <= 60_000 for body in server.bodies)


def test_a_canary_of_ones_own_is_a_folder(server, tmp_path):
  from PIL import Image

  for name, value in (("better", 200), ("worse", 100)):
    Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / f"{name}.png")
  (tmp_path / "canary.json").write_text('{"prompt": "bright", "metadata": {"a": 1}}')
  np.testing.assert_array_equal(score(server.url, canary=str(tmp_path))[0], EXPECTED)
  (tmp_path / "better.png").rename(tmp_path / "x.png")
  with pytest.raises(ValueError, match="must be a folder with better.png"):
    score(server.url, canary=str(tmp_path))
  with pytest.raises(ValueError, match="Did you mean 'ocr'"):
    score(server.url, canary="orc")


def test_a_server_that_was_away_is_asked_who_it_is_before_anything_else(server):
  spec = {"weight": 1.0, "make": "remote", "url": server.url, "timeout": 1.0}
  reward_fn = rewards.make_rewards({"mine": spec}, retries=2, backoff=0.01)
  server.stop()
  server.health = {
    "status": "ok",
    "service": "tpgrpo_jax",
    "protocol": 1,
    "rewards": {"a": {}, "b": {}},
  }
  threading.Timer(0.02, server.start).start()
  with pytest.raises(STOPS, match="set reward to one of them"):
    for _ in range(10):
      try:
        reward_fn(IMAGES, PROMPTS, METADATA)()
      except STOPS as error:
        if "failed 3 times" not in str(error):
          raise
  assert server.requests == 0


def test_a_server_that_was_replaced_unseen_is_asked_who_it_is_before_anything_else(tmp_path):
  from PIL import Image

  for name, value in (("better", 200), ("worse", 100)):
    Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / f"{name}.png")
  (tmp_path / "canary.json").write_text('{"prompt": "bright"}')
  with scripted_server.Server().running() as server:
    reward = remote.make(url=server.url, canary=str(tmp_path), connections=1)
    for _ in range(2):
      np.testing.assert_array_equal(reward(IMAGES, PROMPTS, METADATA)[0], EXPECTED)
    assert server.hellos == 1 and server.requests == 3  # one connection: it is not asked twice
    server.stop()
    server.score = lambda picture: 1.0 - scripted_server.brightness(picture)
    server.start()
    with pytest.raises(STOPS, match="of its canary that must score higher"):
      reward(IMAGES, PROMPTS, METADATA)
    assert server.requests == 4


def test_an_answer_of_another_process_is_thrown_away_and_the_server_asked_who_it_is():
  ours = {"status": "ok", "service": "tpgrpo_jax", "protocol": 1, "rewards": {"mine": {}}}
  with scripted_server.Server(health=ours | {"instance": "first"}).running() as server:
    server.instance = "first"
    reward = remote.make(url=server.url)
    call = lambda: reward(IMAGES, PROMPTS, METADATA)[0]
    np.testing.assert_array_equal(call(), EXPECTED)
    assert (server.hellos, server.requests) == (1, 1)
    # Behind a balancer the connection stays what it was.
    server.instance, server.health = "second", ours | {"instance": "second"}
    np.testing.assert_array_equal(call(), EXPECTED)
    assert (server.hellos, server.requests) == (2, 3)
    server.instance = "first"  # one that was verified
    call()
    assert server.hellos == 2
    server.instance, server.health = (
      "third",
      ours | {"instance": "third", "rewards": {"other": {}, "b": {}}},
    )
    with pytest.raises(STOPS, match="set reward to one of them"):
      call()
    server.health = ours | {"instance": "fourth"}
    with pytest.raises(OSError, match="ever new processes"):
      call()


@pytest.mark.parametrize("canary", [True, False])
def test_processes_behind_a_balancer_are_each_asked_who_they_are(canary, tmp_path):
  from PIL import Image

  for name, value in (("better", 200), ("worse", 100)):
    Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / f"{name}.png")
  (tmp_path / "canary.json").write_text('{"prompt": "bright"}')
  ours = {"status": "ok", "service": "tpgrpo_jax", "protocol": 1, "rewards": {"mine": {}}}
  with scripted_server.Server(health=ours).running() as server:
    for count in (2, 3):
      server.instances = [f"{count} {i}" for i in range(count)]
      reward = remote.make(url=server.url, canary=str(tmp_path) if canary else "", connections=1)
      hellos = []
      for _ in range(3 * count):
        np.testing.assert_array_equal(reward(IMAGES, PROMPTS, METADATA)[0], EXPECTED)
        hellos.append(server.hellos)
      assert hellos[-1] == hellos[-1 - count]  # all are known


def test_of_several_servers_the_dead_one_is_left_out_and_comes_back(caplog):
  first, second = scripted_server.Server(), scripted_server.Server()
  with first.running(), second.running():
    reward = remote.make(url=[first.url, second.url], batch=1, connections=1)
    call = lambda: np.testing.assert_array_equal(reward(IMAGES, PROMPTS, METADATA)[0], EXPECTED)
    call()
    assert sorted([first.requests, second.requests]) == [2, 3]
    first.stop()
    before = second.requests
    for _ in range(3):
      call()
    assert second.requests - before == 15
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
      "reward server left out until it answers again"
    ]
    first.start()
    deadline, asked = time.monotonic() + 10, first.requests
    while first.requests == asked and time.monotonic() < deadline:
      call()
      time.sleep(0.1)
    assert first.requests > asked
    assert caplog.records[-1].getMessage() == f"reward server is back: {first.url}"
    assert len(caplog.records) == 2


def test_a_run_begins_when_one_of_its_servers_is_there(server, unused_port, caplog):
  urls = [f"http://127.0.0.1:{unused_port}", server.url]
  np.testing.assert_array_equal(score(urls)[0], EXPECTED)
  assert len(caplog.records) == 1


def test_one_question_who_it_is_answers_for_all_requests_that_wait_for_it():
  with scripted_server.Server().running() as server:
    reward = remote.make(url=server.url, batch=1, connections=4, timeout=1.0)
    four = IMAGES[:4], PROMPTS[:4], METADATA[:4]
    reward(*four)
    asked = server.hellos
    server.stop()
    server.start()
    server.hello = "hang"
    with pytest.raises(servers.ServerError, match="no whole answer within 1 s"):
      reward(*four)
    assert server.hellos - asked <= 2


def test_many_calls_at_once_get_their_own_scores(server):
  reward = remote.make(url=server.url, batch=2)
  wrong = []

  def call(seed):
    order = np.random.default_rng(seed).permutation(5)
    scores, _ = reward(IMAGES[order], [PROMPTS[i] for i in order], [{}] * 5)
    if not np.array_equal(scores, EXPECTED[order]):
      wrong.append(seed)

  threads = [threading.Thread(target=call, args=(seed,)) for seed in range(16)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


# TLS and tokens


@pytest.fixture(scope="module")
def authority():
  return trustme.CA()


def test_https_of_ones_own_authority(authority, tmp_path):
  authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
  with scripted_server.Server(certificate=authority.issue_cert("127.0.0.1")).running() as server:
    scores, _ = score(server.url, ca_file=str(tmp_path / "ca.pem"))
    np.testing.assert_array_equal(scores, EXPECTED)
    with pytest.raises(ValueError, match="no reward server answers.*ERTIFICATE"):
      score(server.url)


def test_a_certificate_of_another_name_is_refused(authority, tmp_path):
  authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
  with scripted_server.Server(
    certificate=authority.issue_cert("rewards.example")
  ).running() as server:
    with pytest.raises(ValueError, match=r"no reward server answers.*127\.0\.0\.1"):
      score(server.url, ca_file=str(tmp_path / "ca.pem"))
  assert server.requests == 0


def test_a_token_file_is_read_and_its_rights_are_looked_at(tmp_path):
  file = tmp_path / "token"
  file.write_text("0123456789abcdef\n")
  for mode, can in ((0o644, "read"), (0o660, "read and change"), (0o602, "change")):
    file.chmod(mode)
    with pytest.warns(UserWarning, match=f"other users of this machine can {can} it.*chmod 600"):
      assert tokens.read_token(file) == "0123456789abcdef"
  file.chmod(0o600)
  assert tokens.bearer(tokens.read_token(file)) == {"Authorization": "Bearer 0123456789abcdef"}
  for bad in ("", "short", "0123456789 abcdef", "0123456789abcdef\n0123456789abcdef"):
    file.write_text(bad)
    with pytest.raises(ValueError, match="must hold one token"):
      tokens.read_token(file)
  with pytest.raises(ValueError, match="must be a file with a token"):
    tokens.read_token(tmp_path / "none")


def test_a_token_on_an_open_road_is_warned_of(tmp_path):
  file = tmp_path / "token"
  file.write_text("0123456789abcdef")
  file.chmod(0o600)
  with pytest.warns(UserWarning, match="the token travels unencrypted"):
    with pytest.raises(ValueError, match="no reward server answers"):
      remote.make(url="http://rewards.invalid:1", token_file=str(file), timeout=0.5)


@pytest.mark.parametrize(
  "header, right",
  [
    ("Bearer secret-secret-sec", True), ("Bearer secret-secret-se", False), (None, False), ("", False),
    ("secret-secret-sec", False), ("Basic secret-secret-sec", False), ("BEARER secret-secret-se", False),
    ("bearer secret-secret-sec", True), ("Bearer \u20ac", False),
  ],
)  # fmt: skip
def test_only_the_token_is_the_token(header, right):
  assert tokens.is_authorized(header, "secret-secret-sec") == right
  assert tokens.is_authorized(header, "")


# Bad options


@pytest.mark.parametrize(
  "options, said",
  [
    ({"url": "localhost:8090"}, "must begin with http:// or https://. Use 'http://localhost:8090'"),
    ({"url": ""}, "must begin with"), ({"url": []}, "names no server"),
    ({"url": "http:/localhost"}, "Use 'http://localhost'"), ({"url": "http://a b"}, "is no address"),
    ({"url": "http://h\n:1"}, "is no address"), ({"url": " http://h"}, "is no address"),
    ({"url": "ftp://a"}, "must be http"), ({"url": "http://"}, "must be http"),
    ({"url": "http://a:port"}, "is no address"), ({"url": "http://me:secret@a"}, "has a password in it"),
    ({"url": ["http://a", "http://a/"]}, "has a server twice"), ({"url": "http://a?b=1"}, "must be http"),
    ({"url": "http://a", "batch": 0}, "batch=0"), ({"url": "http://a", "timeout": 0.0}, "timeout=0.0"),
    ({"url": "http://a", "connections": 0}, "connections=0"),
    ({"url": "http://a", "low": 1.0, "high": 0.0}, "the lower one first"),
    ({"url": "http://a", "ca_file": "none.pem"}, "no such file"), ({}, "needs the options url"),
    ({"url": "http://a", "tokn_file": "x"}, "Did you mean 'token_file'"),
  ],
)  # fmt: skip
def test_options_that_cannot_be_are_named(options, said):
  with pytest.raises(ValueError, match=said) as caught:
    rewards.make_rewards({"mine": {"weight": 1.0, "make": "remote", **options}})
  assert "secret" not in str(caught.value)


def test_what_is_no_text_is_no_address():
  for bad in (5, None):
    with pytest.raises(ValueError, match=f"url={bad}: must be an address or a list of them"):
      addresses.check_urls(bad)
  with pytest.raises(ValueError, match=r"url=5: must begin with http://"):
    addresses.check_urls([5])


# Flow-GRPO's dialect


class PickleServer(scripted_server.Server):
  """A server of Flow-GRPO's public form: POST / with a pickle, answered by one."""

  def __init__(self):
    self.answer = None
    super().__init__()

  def start(self):
    super().start()
    owner = self

    class Handler(self.http.RequestHandlerClass):
      def do_GET(self):
        self.send(405, b"Method Not Allowed", "text/html")

      def do_POST(self):
        asked = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.requests += 1
        scores = [scripted_server.brightness(picture) for picture in asked["images"]]
        answer = {"outputs": scores} if owner.answer is None else owner.answer(scores)
        self.send(200, answer if isinstance(answer, bytes) else pickle.dumps(answer))

    self.http.RequestHandlerClass = Handler


@pytest.fixture
def pickles():
  with PickleServer().running() as running:
    yield running


def score_pickles(url, **options):
  spec = {"weight": 1.0, "make": "flow_grpo_server", "url": url, "timeout": 1.0, **options}
  reward_fn = rewards.make_rewards({"mine": spec}, retries=1, backoff=0.01)
  _, scores, infos = reward_fn(IMAGES, PROMPTS, METADATA)()
  return scores["mine"], infos["mine"]


def test_flow_grpos_answers_are_read(pickles):
  np.testing.assert_allclose(score_pickles(pickles.url, batch=2)[0], EXPECTED, atol=0.004)  # JPEG
  geneval = lambda scores: {
    "scores": list(np.asarray(scores, np.float32)), "rewards": [0.0] * len(scores),
    "strict_rewards": np.zeros(len(scores)), "group_rewards": {"counting": [1.0]},
  }  # fmt: skip
  pickles.answer = geneval
  scores, info = score_pickles(pickles.url, low=0.0, high=1.0)
  np.testing.assert_allclose(scores, EXPECTED, atol=0.004)
  assert info == {"rewards": [0.0] * 5}
  scores, _ = score_pickles(pickles.url, key="strict_rewards")
  np.testing.assert_array_equal(scores, np.zeros(5))


class Runs:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (os.system, (f"touch {self.path}",))


def test_a_malicious_answer_is_refused_and_runs_nothing(pickles, tmp_path):
  trap = tmp_path / "ran"
  answers = {
    "could run code": {"outputs": [0.5] * 4 + [Runs(trap)]},
    "no pickle": b"<html>",
    "no 'scores'": {"other": [1.0] * 5},
    "3 scores for 5": {"outputs": [1.0] * 3},
    "the score nan": {"outputs": [float("nan")] * 5},
    "no number": {"outputs": ["1"] * 5},
    "where a dict": [1.0] * 5,
    "instructions": b"N" * 201_000 + b".",
  }
  for said, answer in answers.items():
    pickles.answer = lambda scores, answer=answer: answer
    with pytest.raises(STOPS, match=said):
      score_pickles(pickles.url)
  assert not trap.exists()


def test_a_flow_grpo_server_that_is_down_ends_the_run_at_the_start(unused_port):
  with pytest.raises(ValueError, match="no reward server answers"):
    score_pickles(f"http://127.0.0.1:{unused_port}")


@pytest.fixture
def unused_port():
  with socket.socket() as held:
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
  return port
