"""GenEval behind the real server: a process with torch, asked by our client and in Flow-GRPO's dialect."""

import json
import pathlib
import sys
import urllib.request

import numpy as np
import pytest
import served

from tpgrpo_jax import rewards
from tpgrpo_jax.data import geneval as terms

sys.path.append(str(pathlib.Path(__file__).parents[1] / "rewards"))

pytestmark = pytest.mark.parity


def test_scores_of_a_served_geneval_are_those_of_the_reward_itself(tmp_path):
  import small_geneval

  options = {
    "detector": str(small_geneval.write_detector(tmp_path / "detector", size=96)),
    "classifier": str(small_geneval.write_classifier(tmp_path / "classifier")),
    "rule": "graded",
    "size": 0,
    "canary": "",
  }
  small = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), np.uint8)
  images = small.repeat(24, axis=1).repeat(24, axis=2)
  own = rewards.make_rewards({"geneval": {"weight": 1.0, **options}})
  ask = lambda kind, color: {
    "tag": "colors", "include": [{"class": kind, "count": 1, "color": color}]
  }  # fmt: skip
  _, _, seen = own(images, ["p"] * 6, [ask("dog", "red")] * 6)()
  read = [text.split(" (")[0].split(", ")[0].rsplit(" ", 1)[0] for text in seen["geneval"]["text"]]
  assert set(read) <= set(terms.CLASSES)
  asked = [ask(kind, color) for kind, color in zip(read, terms.COLORS)]
  _, wanted, infos = own(images, ["p"] * 6, asked)()
  assert set(wanted["geneval"].tolist()) <= {0.5, 1.0}  # found, of another colour or of this one

  flags = ("--rewards=geneval", f"--options={json.dumps({'geneval': options})}")
  with served.serve(*flags) as (process, url):
    client = {"weight": 1.0, "make": "remote", "url": url, "reward": "geneval", "batch": 4}
    limits = {"low": 0.0, "high": 1.0}
    _, scores, told = rewards.make_rewards({"geneval": client | limits})(images, ["p"] * 6, asked)()
    np.testing.assert_allclose(scores["geneval"], wanted["geneval"], atol=1e-6)
    np.testing.assert_array_equal(told["geneval"]["exact"], infos["geneval"]["exact"])
    assert told["geneval"]["text"] == infos["geneval"]["text"]

    with urllib.request.urlopen(url + "/health", timeout=10) as answer:
      about = json.load(answer)["rewards"]["geneval"]
    assert about["make"] == "geneval" and about["canary"] == "none" and "torch" in about["versions"]

    # A client may bring its own canary; these weights know nobody.
    with pytest.raises(
      ValueError, match="gave 0 to the picture of its canary that must score higher"
    ):
      rewards.make_rewards({"geneval": client | {"canary": "person"}})
    # Metadata that cannot be judged is the asker's fault, and the server goes on.
    with pytest.raises(rewards.RewardError, match="does not know. Did you mean 'person'"):
      rewards.make_rewards({"geneval": client})(images[:1], ["p"], [ask("persn", "red")])()

    dialect = {"weight": 1.0, "make": "flow_grpo_server", "url": url}
    _, _, told = rewards.make_rewards({"geneval": dialect})(images, ["p"] * 6, asked)()
    assert {"rewards", "strict_rewards"} <= told["geneval"].keys()
    assert process.poll() is None
