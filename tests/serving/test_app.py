"""The server's application, asked in process: what it answers, what it refuses, and 10,000 spoiled bodies."""

import asyncio
import json
import logging
import os
import pathlib
import pickle
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import rewards
from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.rewards import wire
from tpgrpo_jax.serving import app as app_lib
from tpgrpo_jax.serving import build, scorer

IMAGES = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 8 * 9 * 3).reshape(5, 8, 9, 3)
PROMPTS = [f"prompt {i}" for i in range(5)]
GATE = threading.Event()


class Panic(BaseException):
  """As extensions in Rust raise it: no Exception."""


def make_brightness():
  """A reward of the host that waits for GATE where a prompt says so, or fails."""

  def reward(images, prompts, metadata):
    if "wait" in prompts:
      GATE.wait(20)
    if "fail" in prompts:
      raise RuntimeError("the detector is on fire")
    if "panic" in prompts:
      raise Panic("a panic of Rust")
    if "nan" in prompts:
      return np.full(len(images), np.nan), {}
    scores = images.mean(axis=(1, 2, 3), dtype=np.float64).astype(np.float32)
    return scores, {"prompt": list(prompts), "double": scores * 2}

  reward.check = check
  reward.survey = lambda prompts: [f"{prompts[0].text} has letters that nobody knows"]
  return reward


def check(prompt, metadata):
  if prompt == "unfit":
    raise ValueError("prompt='unfit': has no target.")
  if prompt == "exit":
    raise SystemExit(3)
  if prompt == "stop":
    raise StopIteration


def open_scorer(make=make_brightness, label="bright", **options):
  reward_fn = (
    rewards.make_rewards({label: {"weight": 1.0, "make": "own:make"}}) if make is None else None
  )
  reward_fn = reward_fn or rewards.combine.make_weighted_sum(
    {label: 1.0}, {label: make}, {}, timeout=30.0
  )
  return scorer.Scorer(label, reward_fn, **{"workers": 2} | options)


@pytest.fixture(scope="module")
def bright():
  opened = open_scorer()
  yield opened
  opened.close()


@pytest.fixture
def app(bright):
  return app_lib.make_app({"bright": bright})


async def ask_async(app, method, path, body=b"", headers=None, chunk=0):
  """(status, headers, body) of one request to an ASGI application."""
  path, _, query = path.partition("?")
  headers = ({} if chunk else {"Content-Length": str(len(body))}) | (headers or {})
  parts = [body[i : i + chunk] for i in range(0, len(body), chunk)] if chunk else [body]
  parts = parts or [b""]
  sent = []

  async def receive():
    if not parts:
      return {"type": "http.disconnect"}
    part = parts.pop(0)
    return {"type": "http.request", "body": part, "more_body": bool(parts)}

  async def send(message):
    sent.append(message)

  scope = {
    "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
    "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
    "headers": [(k.lower().encode(), v.encode("latin1")) for k, v in headers.items()],
    "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
  }  # fmt: skip
  await app(scope, receive, send)
  found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
  return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def ask(*args, **kwargs):
  return asyncio.run(ask_async(*args, **kwargs))


def compute(app, prompts=PROMPTS, path="/compute", multipart=True, **kwargs):
  body, kind = wire.encode_request(
    IMAGES[: len(prompts)], prompts, [{}] * len(prompts), multipart=multipart
  )
  headers = {"Content-Type": kind, **kwargs.pop("headers", {})}
  return ask(app, "POST", path, body, headers, **kwargs)


@pytest.mark.parametrize("multipart", [False, True])
def test_scores_come_back_in_order(app, multipart):
  status, headers, body = compute(app, multipart=multipart)
  scores, info = wire.decode_answer(body, 5)
  assert status == 200 and headers["content-type"] == "application/json"
  assert scores.tolist() == [0, 50, 100, 150, 200] and info["prompt"] == PROMPTS
  np.testing.assert_array_equal(info["double"], np.float32(2 * scores))


def test_health_says_what_is_served(app):
  status, _, body = ask(app, "GET", "/health")
  said = json.loads(body)
  assert (
    status == 200 and said["status"] == "ok" and said["rewards"] == {"bright": {"canary": "none"}}
  )
  assert said["limits"]["body"] == 64 * 2**20 and said["requests"]["held"] == 0


@pytest.mark.parametrize(
  "path, prompts, status, said",
  [
    ("/compute?reward=dark", PROMPTS, 404, "no reward 'dark' here, but bright"),
    ("/compute", ["unfit"], 422, "has no target"),
    ("/compute", ["fail"], 500, "the detector is on fire"),
    ("/compute", ["nan"], 500, "returned the score nan"),
    *[("/compute", ["panic"], 500, "Panic: a panic of Rust")] * 3,  # more than there are workers
    *[("/compute", ["exit"], 500, "SystemExit: 3")] * 3,
    ("/compute", ["stop"], 500, "StopIteration"),
  ],
)
def test_what_cannot_be_scored_is_said(app, path, prompts, status, said, caplog):
  got, _, body = compute(app, prompts, path)
  assert got == status and said in json.loads(body)["error"]
  assert bool(caplog.records) == (status == 500)  # never a 500 without a logged reason
  assert compute(app)[0] == 200


def test_health_fails_when_no_worker_lives():
  dead = open_scorer()
  dead.close()
  app = app_lib.make_app({"bright": dead})
  status, _, body = ask(app, "GET", "/health")
  assert status == 503 and json.loads(body)["rewards"]["bright"]["canary"] == "has no worker left"
  status, _, body = compute(app)
  assert status == 503 and "has no worker left" in json.loads(body)["error"]


def test_new_words_of_a_client_write_no_log(app, recwarn, caplog):
  with caplog.at_level(logging.DEBUG):
    for i in range(3):
      assert compute(app, [f"word {i}"])[0] == 200
  assert not [w for w in recwarn if "letters that nobody knows" in str(w.message)]
  assert "letters" not in caplog.text


def test_every_answer_says_which_server_gave_it_and_another_server_has_another_name(bright):
  names = []
  for _ in range(2):
    app = app_lib.make_app({"bright": bright})
    name = json.loads(ask(app, "GET", "/health")[2])["instance"]
    for prompts, status in ((PROMPTS, 200), (["unfit"], 422)):
      answer = compute(app, prompts)
      assert answer[0] == status and answer[1]["x-instance"] == name
    assert ask(app, "POST", "/", b"x")[1]["x-instance"] == name
    names.append(name)
  assert len({*names}) == 2 and all(len(name) == 16 for name in names)


def test_other_paths_and_methods_are_not_there(app):
  assert ask(app, "GET", "/compute")[0] == 405 and ask(app, "GET", "/secrets")[0] == 404
  assert ask(app, "GET", "/")[0] == 405


def test_a_token_is_asked_for_everywhere_but_of_the_bare_health(bright):
  app = app_lib.make_app({"bright": bright}, app_lib.Rules(token="secret-secret-sec"))
  assert compute(app)[0] == ask(app, "GET", "/metrics")[0] == ask(app, "POST", "/")[0] == 401
  assert compute(app, headers={"Authorization": "Bearer wrong"})[0] == 401
  right = {"Authorization": "Bearer secret-secret-sec"}
  assert compute(app, headers=right)[0] == 200
  assert ask(app, "GET", "/metrics", headers=right)[0] == 200
  bare = json.loads(ask(app, "GET", "/health")[2])
  assert bare.pop("instance") and bare == {"status": "ok", "service": "tpgrpo_jax", "protocol": 1}
  assert "rewards" in json.loads(ask(app, "GET", "/health", headers=right)[2])


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(bright):
  app = app_lib.make_app({"bright": bright}, app_lib.Rules(limits=wire.Limits(body=1000)))
  status, _, body = ask(app, "POST", "/compute", b"x" * 1001, {"Content-Length": "1001"})
  assert status == 413 and "at most 1000" in json.loads(body)["error"]
  assert ask(app, "POST", "/compute", b"x" * 5000, chunk=100)[0] == 413
  assert ask(app, "POST", "/compute", b"{}", {"Content-Length": "9" * 5000})[0] == 413


def test_a_body_that_never_ends_is_given_up(bright):
  app = app_lib.make_app({"bright": bright}, app_lib.Rules(upload=0.1))

  async def stall():
    async def receive():
      await asyncio.sleep(30)

    sent = []

    async def send(message):
      sent.append(message)

    scope = {
      "type": "http", "method": "POST", "path": "/compute", "raw_path": b"/compute", "query_string": b"",
      "root_path": "", "headers": [], "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"]

  assert asyncio.run(stall()) == 408


def test_more_than_the_queue_holds_is_told_to_come_again(bright):
  app = app_lib.make_app({"bright": bright}, app_lib.Rules(waiting=3))
  GATE.clear()

  async def crowd():
    body, kind = wire.encode_request(IMAGES[:1], ["wait"], [{}], multipart=True)
    one = lambda: ask_async(app, "POST", "/compute", body, {"Content-Type": kind})
    held = [asyncio.create_task(one()) for _ in range(3)]
    await asyncio.sleep(0.2)
    refused = await one()
    GATE.set()
    return refused, await asyncio.gather(*held)

  (status, headers, body), answers = asyncio.run(crowd())
  assert (
    status == 503
    and headers["retry-after"] == "1"
    and "3 requests wait" in json.loads(body)["error"]
  )
  assert [answer[0] for answer in answers] == [200] * 3
  assert compute(app)[0] == 200


def test_metrics_count_what_was_answered(bright):
  app = app_lib.make_app({"bright": bright})
  compute(app)
  compute(app, path="/compute?reward=" + "x" * 500)
  page = ask(app, "GET", "/metrics")[2].decode()
  for line in (
    'reward_requests_total{reward="bright",status="200"} 1.0', 'reward_pictures_total{reward="bright"} 5.0',
    'reward_requests_total{reward="unknown",status="404"} 1.0', 'reward_canary{reward="bright"} 1.0',
    'reward_seconds_count{reward="bright"} 1.0', "reward_requests_held 0.0",
  ):  # fmt: skip
    assert line in page, page


# Canaries


def test_a_reward_that_is_not_well_says_so_in_health():
  ill = open_scorer(canary=canary_lib.plain()._replace(prompt="nan"))
  assert "canary" in ill.check_canary()
  app = app_lib.make_app({"bright": ill})
  status, _, body = ask(app, "GET", "/health")
  assert status == 503 and json.loads(body)["status"] == "failing"
  status, headers, body = compute(app)
  assert (
    status == 503 and "is not well" in json.loads(body)["error"] and "retry-after" not in headers
  )
  ill.close()


def test_a_canary_that_fails_once_is_asked_again_at_the_next_look(caplog):
  failures, asked = ["the detector was busy"] * 2, []

  def make():
    def reward(images, prompts, metadata):
      asked.append(len(images))
      if failures:
        raise OSError(failures.pop())
      return images.mean(axis=(1, 2, 3)), {}

    return reward

  white = np.full((8, 8, 3), 255, np.uint8)
  once = open_scorer(make, canary=canary_lib.Canary(white, white // 2, "bright"))
  assert "was busy" in once.check_canary()
  app = app_lib.make_app({"bright": once})

  async def look():
    status = (await ask_async(app, "GET", "/health"))[0]
    await asyncio.get_running_loop().shutdown_default_executor()  # when the canary was asked
    return status

  statuses = [asyncio.run(look()) for _ in range(4)]
  assert statuses == [503, 503, 200, 200] and len(asked) == 3  # well, it is asked once a minute
  assert [r.message.count("was busy") for r in caplog.records if "was busy" in r.message] == [1]
  assert compute(app)[0] == 200
  once.close()


def test_a_canary_is_asked_by_one_at_a_time():
  asked = []

  def make():
    def reward(images, prompts, metadata):
      asked.append(len(images))
      GATE.wait(20)
      return images.mean(axis=(1, 2, 3)), {}

    return reward

  white = np.full((8, 8, 3), 255, np.uint8)
  slow = open_scorer(make, canary=canary_lib.Canary(white, white // 2, "bright"))
  GATE.clear()
  first = threading.Thread(target=slow.check_canary)
  first.start()
  while not asked:
    time.sleep(0.01)
  assert slow.check_canary() == "" and asked == [2]
  GATE.set()
  first.join()
  slow.close()


def make_with_own_canary(sign=1):
  def reward(images, prompts, metadata):
    return sign * images.mean(axis=(1, 2, 3)), {}

  white = np.full((2, 2, 3), 255, np.uint8)
  reward.canary = canary_lib.Canary(white, white // 2, "bright")
  return reward


def test_a_reward_of_ones_own_brings_its_canary_and_is_not_served_when_it_fails(monkeypatch):
  monkeypatch.setattr(rewards, "HOST_REWARDS", {"mine": make_with_own_canary})
  served = build.open_scorers({"mine": {"weight": 1.0}}, workers=1, timeout=9.0)
  assert served["mine"].canary is not None and not served["mine"].problem
  with pytest.raises(ValueError, match="'mine' gave -255 to the picture of its canary"):
    build.open_scorers({"mine": {"weight": 1.0, "sign": -1}}, workers=1, timeout=9.0)


@pytest.mark.parametrize(
  "labels, options, said",
  [
    ([], "", "names none"), (["ocr", "ocr"], "", "has 'ocr' twice"), (["ocr"], "{", "must be JSON"),
    (["ocr"], '{"ocr": {"detect": true}, "ocr": {}}', "'ocr' stands twice"),
    (["ocr"], '{"ocr": {"detect": true, "detect": false}}', "'detect' stands twice"),
    (["ocr"], "[1]", "label -> options"), (["ocr"], '{"orc": {}}', "Did you mean 'ocr'"),
  ],
)  # fmt: skip
def test_flags_that_cannot_be_are_named(labels, options, said):
  with pytest.raises(ValueError, match=said):
    build.read_specs(labels, options)


# Batching


def test_requests_for_devices_are_scored_together_and_none_is_swapped():
  sizes = []

  def make(placement=None):
    def reward(images, prompts, metadata):
      sizes.append(len(images))
      time.sleep(0.05)
      if "fail" in prompts:
        raise RuntimeError("no")
      return jnp.asarray(np.asarray(images).mean(axis=(1, 2, 3)), jnp.float32)

    return reward

  reward_fn = rewards.combine.make_weighted_sum({"bright": 1.0}, {}, {"bright": make})
  together = scorer.Scorer("bright", reward_fn, workers=1, together=16)
  app = app_lib.make_app({"bright": together})

  async def crowd():
    tasks = []
    for i in range(40):
      image = np.full((1 + i % 3, 8 + i % 2, 8, 3), i, np.uint8)
      prompts = ["fail" if i == 13 else "p"] * len(image)
      body, kind = wire.encode_request(image, prompts, [{}] * len(image), multipart=True)
      tasks.append(ask_async(app, "POST", "/compute", body, {"Content-Type": kind}))
    return await asyncio.gather(*tasks)

  answers = asyncio.run(crowd())
  for i, (status, _, body) in enumerate(answers):
    assert status == (500 if i == 13 else 200)
    if i != 13:
      assert json.loads(body)["rewards"] == [i] * (1 + i % 3)
  assert max(sizes) > 4 and all(size & (size - 1) == 0 for size in sizes)  # few shapes to compile
  together.close()


# The public clients' protocols


def test_flow_grpos_client_finds_what_it_looks_for(app):
  # As geneval_score and deqa_score_remote of flow_grpo/rewards.py ask and read.
  pictures = [wire.encode_image(image, "JPEG") for image in IMAGES]
  meta = np.array_split(np.array([{"tag": "counting", "prompt": "p"}] * 5), 1)[0]
  for protocol in (2, 3, 4, 5):
    asked = {"images": pictures, "meta_datas": list(meta), "only_strict": True}
    status, _, body = ask(app, "POST", "/", pickle.dumps(asked, protocol))
    answer = pickle.loads(body)
    assert status == 200 and answer["scores"] == [0, 50, 100, 150, 200]
    assert {"rewards", "strict_rewards", "group_rewards", "group_strict_rewards"} <= answer.keys()
    assert answer["group_rewards"]["counting"] == answer["scores"]
    assert (
      answer["group_strict_rewards"]["colors"] == [-10.0] * 5
    )  # as app_geneval.py says "not this tag"
  prompts = np.array_split(["a", "b", "c", "d", "e"], 1)[0]
  asked = {"images": pictures, "prompts": prompts}
  assert pickle.loads(ask(app, "POST", "/", pickle.dumps(asked))[2])["outputs"] == [
    0,
    50,
    100,
    150,
    200,
  ]


def test_a_malicious_request_in_flow_grpos_dialect_is_refused_and_runs_nothing(
  app, tmp_path, caplog
):
  class Runs:
    def __reduce__(self):
      import os

      return os.system, (f"touch {tmp_path / 'ran'}",)

  status, _, body = ask(app, "POST", "/", pickle.dumps({"images": [Runs()]}))
  assert status == 400 and "could run code" in json.loads(body)["error"]
  assert not (tmp_path / "ran").exists() and not caplog.records


# Fuzzing


def spoiled_bodies(count, seed=0):
  """Requests of all dialects with bytes changed, cut, doubled or put in; some of them whole, some noise."""
  rng = np.random.default_rng(seed)
  requests = []
  for multipart in (False, True):
    for n in (1, 3):
      body, kind = wire.encode_request(
        IMAGES[:n], PROMPTS[:n], [{"a": [1, "x"]}] * n, multipart=multipart
      )
      requests.append(("/compute", body, kind))
  pictures = [wire.encode_image(image, "JPEG") for image in IMAGES[:2]]
  for protocol in (0, 2, 4, 5):
    asked = {"images": pictures, "prompts": np.array(["a", "b"]), "meta_datas": [{"tag": "x"}] * 2}
    requests.append(("/", pickle.dumps(asked, protocol), "application/octet-stream"))
  for _ in range(count):
    path, body, kind = requests[rng.integers(len(requests))]
    body = bytearray(body)
    for _ in range(rng.integers(0, 5)):
      place, what = int(rng.integers(max(len(body), 1))), rng.integers(6)
      if what == 0:
        body[place : place + 1] = bytes([rng.integers(256)])
      elif what == 1:
        del body[place : place + int(rng.integers(1, 40))]
      elif what == 2:
        body[place:place] = rng.bytes(int(rng.integers(1, 40)))
      elif what == 3:
        body[place:place] = body[: int(rng.integers(1, 200))]
      elif what == 4:
        body[place:place] = [b"null", b"[[[[", b"1e999", b"\r\n--", b"{}", b"-1", b"\x93", b"R."][
          rng.integers(8)
        ]
      else:
        body = bytearray(rng.bytes(int(rng.integers(0, 300))))
    yield path, bytes(body), kind if rng.random() < 0.9 else "text/plain"


def resident():
  """MiB of memory that this process holds."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_spoiled_bodies_do_no_harm(bright, caplog, count):
  app = app_lib.make_app({"bright": bright})
  statuses: dict[int, int] = {}

  async def feed(bodies):
    for path, body, kind in bodies:
      status, _, answer = await ask_async(
        app, "POST", path, body, {"Content-Type": kind}, chunk=4096
      )
      statuses[status] = statuses.get(status, 0) + 1
      assert status == 200 or json.loads(answer)["error"], body

  async def run():
    bodies = spoiled_bodies(count)
    await asyncio.gather(*(feed(bodies) for _ in range(8)))  # 8 take turns at one supply

  before = resident()
  with caplog.at_level(logging.ERROR):
    asyncio.run(run())
  assert sum(statuses.values()) == count
  assert set(statuses) <= {200, 400, 413, 422}, statuses  # none of ours, so nothing logged either
  assert not caplog.records and statuses[200] > count / 10 and statuses[422] > count / 100
  assert resident() - before < 100
  assert compute(app)[0] == 200
