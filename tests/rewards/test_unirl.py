"""UniRL's dialect against a server written from its public protocol."""

import json

import numpy as np
import pytest
import scripted_server

from tpgrpo_jax import rewards

IMAGES = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 4 * 6 * 3).reshape(5, 4, 6, 3)
EXPECTED = np.asarray([0.0, 0.196, 0.392, 0.588, 0.784], np.float32)


class Service(scripted_server.Server):
  """POST /score; `spoil` changes the answer of the next requests."""

  def __init__(self):
    self.spoil, self.asked = [], []
    super().__init__(health={"status": "ok", "rewards": {"clip": ["clip:ready"], "wise": ["x"]}})

  def start(self):
    super().start()
    owner = self

    class Handler(self.http.RequestHandlerClass):
      def do_GET(self):
        self.answer(200, owner.health)

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner.asked.append((self.path, body))
        said = {"results": [], "errors": []}
        for each in body["requests"]:
          ((name,), (turn,)) = each["required_rewards"], each["history"]
          value = scripted_server.brightness(scripted_server.base64.b64decode(turn["image_b64"]))
          parts = {"clip": {"clip": value}, "wise": {"wiscore": value, "realism": 1 - value}}
          said["results"].append({name: parts[name]})
          said["errors"].append({})
        if owner.spoil:
          owner.spoil.pop(0)(said)
        self.answer(200, said)

    self.http.RequestHandlerClass = Handler


@pytest.fixture
def service():
  with Service().running() as running:
    yield running


def score(url, **options):
  spec = {"weight": 1.0, "make": "unirl", "url": url, "reward": "clip", "timeout": 2.0, **options}
  reward_fn = rewards.make_rewards({"mine": spec}, retries=1, backoff=0.01)
  metadata = [{"index": i} for i in range(5)]
  _, scores, infos = reward_fn(IMAGES, [f"prompt {i}" for i in range(5)], metadata)()
  return scores["mine"], infos["mine"]


def test_scores_come_back_in_order_and_requests_have_unirls_form(service):
  scores, info = score(service.url, batch=2, connections=1)
  np.testing.assert_array_equal(scores, EXPECTED)
  assert info == {} and [path for path, _ in service.asked] == ["/score"] * 3
  first = service.asked[0][1]["requests"][1]
  assert first["required_rewards"] == ["clip"] and first["metadata"] == {"index": 1}
  assert first["history"][0]["text"] == "prompt 1" and len(first["history"]) == 1


def test_a_part_is_chosen_where_there_are_several_and_the_others_are_told(service):
  scores, info = score(service.url, reward="wise", part="realism")
  np.testing.assert_allclose(scores, 1 - EXPECTED, atol=1e-6)
  np.testing.assert_allclose(info["wiscore"], EXPECTED, atol=1e-6)
  with pytest.raises(rewards.RewardError, match="no 'wise' with 'wise' .*'wiscore', 'realism'"):
    score(service.url, reward="wise")


def test_a_reward_that_failed_there_is_asked_again_and_is_never_a_zero(service):
  fail = lambda said: (said["results"][2].clear(), said["errors"][2].update(clip="TimeoutError()"))
  service.spoil = [fail]
  np.testing.assert_array_equal(score(service.url)[0], EXPECTED)
  service.spoil = [fail] * 2
  with pytest.raises(rewards.RewardError, match=r"'clip' failed there: TimeoutError\(\)"):
    score(service.url)


@pytest.mark.parametrize(
  "spoil, said",
  [
    (lambda a: a["results"].pop(), "4 results for 5 pictures"),
    (lambda a: a.pop("results"), "no list of results for 5 pictures"),
    (lambda a: a["results"][1].clear(), "no 'clip' with 'clip' for each picture"),
    (lambda a: a["results"][1]["clip"].update(clip=float("nan")), "the score nan"),
    (lambda a: a["results"][1]["clip"].update(clip="0.5"), "which is no number"),
    (lambda a: a["results"][1]["clip"].update(clip=9.0), "the score 9, outside 0 to 1"),
  ],
)
def test_an_answer_that_is_not_what_was_asked_for_ends_the_run(service, spoil, said):
  service.spoil = [spoil]
  with pytest.raises(rewards.RewardError, match=said):
    score(service.url, low=0.0, high=1.0)
  assert len(service.asked) == 1


def test_a_service_without_the_reward_ends_the_run_at_the_start(service):
  with pytest.raises(ValueError, match="has no reward 'clop'. Did you mean 'clip'"):
    score(service.url, reward="clop")
  service.health = {"status": "ok"}
  with pytest.raises(ValueError, match="has no reward 'clip'"):
    score(service.url)
  assert not service.asked
