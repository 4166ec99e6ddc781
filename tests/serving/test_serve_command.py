"""The server as a process of its own: asked by our client and by the public ones, and told to end."""

import base64
import io
import json
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
import pytest
import served

from tpgrpo_jax import rewards

OWN = """
import time
import numpy as np
def make(strength=1.0):
  def reward(images, prompts, metadata):
    if "slow" in prompts:
      time.sleep(1.5)
    return (strength * images.mean(axis=(1, 2, 3)) / 255).astype(np.float32), {}
  return reward
"""
IMAGES = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 8 * 9 * 3).reshape(5, 8, 9, 3)
EXPECTED = (2 * IMAGES.mean(axis=(1, 2, 3)) / 255).astype(np.float32)
TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("served")
  (folder / "own_reward.py").write_text(OWN)
  (folder / "token").write_text(TOKEN + "\n")
  (folder / "token").chmod(0o600)
  return folder


@pytest.fixture(scope="module")
def server(folder):
  options = json.dumps({"bright": {"make": "own_reward:make", "strength": 2.0}})
  arguments = ("--rewards=bright", f"--options={options}", "--drain=20")
  with served.serve(*arguments, path=folder) as found:
    yield found


def test_our_client_is_served(server):
  spec = {"weight": 1.0, "make": "remote", "url": server[1], "reward": "bright", "batch": 2}
  _, scores, _ = rewards.make_rewards({"mine": spec})(IMAGES, ["p"] * 5, [{}] * 5)()
  np.testing.assert_array_equal(scores["mine"], EXPECTED)


def post(url, body, kind="application/json"):
  asked = urllib.request.Request(url, body, {"Content-Type": kind})
  with urllib.request.urlopen(asked, timeout=30) as answer:
    return answer.status, answer.read()


def encoded(image, format):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format=format)
  return buffer.getvalue()


def test_flow_factorys_protocol_is_served(server):
  # As _build_payload and RemoteRewardClient of flow_factory/rewards/my_reward_remote.py.
  payload = {
    "prompt": ["p"] * 5,
    "image": [base64.b64encode(encoded(image, "PNG")).decode() for image in IMAGES],
    "video": None,
    "condition_images": None,
    "condition_videos": None,
  }
  with urllib.request.urlopen(server[1] + "/health", timeout=5) as answer:
    assert answer.status == 200
  status, body = post(server[1] + "/compute", json.dumps(payload).encode())
  said = json.loads(body)
  assert status == 200 and not said.get("error")
  np.testing.assert_array_equal(np.float32(said["rewards"]), EXPECTED)


def test_flow_grpos_protocol_is_served(server):
  data = {"images": [encoded(image, "JPEG") for image in IMAGES]}
  status, body = post(server[1], pickle.dumps(data), "")
  np.testing.assert_allclose(pickle.loads(body)["outputs"], EXPECTED, atol=0.01)
  assert status == 200
  with pytest.raises(urllib.error.HTTPError) as caught:  # whose status is none of those it retries
    post(server[1], b"no pickle", "")
  assert caught.value.code == 400


def test_sigterm_lets_what_waits_finish(folder):
  arguments = ("--rewards=own_reward:make", f"--token_file={folder / 'token'}", "--host=0.0.0.0")
  with served.serve(*arguments, path=folder) as (process, url):
    url = url.replace("0.0.0.0", "127.0.0.1")
    spec = {"weight": 1.0, "make": "remote", "url": url, "token_file": str(folder / "token")}
    reward_fn = rewards.make_rewards({"mine": spec}, retries=0)
    with pytest.raises(
      ValueError, match="names no rewards. If it asks for a token, set token_file"
    ):
      rewards.make_rewards({"mine": spec | {"token_file": ""}})
    found = {}
    asked = threading.Thread(
      target=lambda: found.update(reward_fn(IMAGES, ["slow"] * 5, [{}] * 5)()[1])
    )
    asked.start()
    time.sleep(0.7)
    process.send_signal(signal.SIGTERM)
    asked.join(30)
    np.testing.assert_allclose(found["mine"], EXPECTED / 2)
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
  "arguments, said",
  [
    (("--rewards=ocr", "--host=0.0.0.0"), "others can reach this address"),
    (("--rewards=orc",), "Did you mean 'ocr'"),
    (("--rewards=ocr", "--tls_certificate=a.pem"), "must be given together"),
  ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments, said):
  done = subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.serve", *arguments],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1
  assert said in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
