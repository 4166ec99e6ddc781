"""Load on a reward server: nothing lost, nothing swapped, and how long an answer takes.

  python benchmarks/serve_load.py                                64 clients, 1,000 requests each, 8 pictures
  python benchmarks/serve_load.py --clients=4 --requests=50

Starts `python -m tpgrpo_jax.serve` with a reward that reads a number out of each picture's pixels, asks it
from as many clients as are wanted at the same time, and checks every score. A client that is told to come
again does so, as a run does. Server and clients share the machine.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags, logging
import numpy as np

from tpgrpo_jax.rewards import wire

_CLIENTS = flags.DEFINE_integer("clients", 64, "At the same time.")
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Of each client, one after another.")
_PICTURES = flags.DEFINE_integer("pictures", 8, "In a request.")
_SIZE = flags.DEFINE_list("size", ["24", "48"], "Height and width of a picture.")
_BODIES = 64  # different requests, made once, so that the clients' own work is small

REWARD = """
import numpy as np
def make():
  def reward(images, prompts, metadata):
    digits = images[:, 0, :3, 0].astype(np.float32)
    numbers = digits @ np.float32([1, 256, 65536])
    assert [int(p) for p in prompts] == numbers.tolist()
    return numbers.astype(np.float32), {}
  return reward
"""


@contextlib.contextmanager
def server():
  """(process id, address) of a server with the reward above."""
  with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / "load_reward.py").write_text(REWARD)
    root = pathlib.Path(__file__).parents[1]
    process = subprocess.Popen(
      [sys.executable, "-m", "tpgrpo_jax.serve", "--rewards=load_reward:make", "--port=0"],
      env={**os.environ, "PYTHONPATH": f"{root}:{folder}"},
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      assert process.stdout is not None
      yield process.pid, process.stdout.readline().split()[0]
    finally:
      process.terminate()
      process.wait()


def make_bodies():
  """[(body, content type, the right scores)], each with other numbers in its pictures."""
  rng = np.random.default_rng(0)
  height, width = map(int, _SIZE.value)
  made = []
  for index in range(_BODIES):
    numbers = np.arange(_PICTURES.value) + index * _PICTURES.value + 1_000_000
    images = rng.integers(0, 256, (_PICTURES.value, height, width, 3), np.uint8)
    images[:, 0, :3, 0] = numbers[:, None] >> np.array([0, 8, 16]) & 255
    prompts = [str(n) for n in numbers]
    body, kind = wire.encode_request(images, prompts, [{}] * len(prompts), multipart=True)
    made.append((body, kind, numbers.tolist()))
  return made


async def client(http, url, bodies, seed, found):
  """Sends its requests and notes the seconds of each."""
  order = np.random.default_rng(seed).integers(_BODIES, size=_REQUESTS.value)
  for which in order:
    body, kind, expected = bodies[which]
    began = time.perf_counter()
    while True:
      answer = await http.post(f"{url}/compute", content=body, headers={"Content-Type": kind})
      if answer.status_code != 503:
        break
      found["told_to_come_again"] += 1
      await asyncio.sleep(float(answer.headers["retry-after"]))
    found["seconds"].append(time.perf_counter() - began)
    if answer.status_code != 200:
      found["lost"] += 1
    elif json.loads(answer.content)["rewards"] != expected:
      found["wrong"] += 1


async def load(url):
  """What all clients noted."""
  import httpx2

  bodies = make_bodies()
  found = {"seconds": [], "lost": 0, "wrong": 0, "told_to_come_again": 0}
  limits = httpx2.Limits(max_connections=_CLIENTS.value, max_keepalive_connections=_CLIENTS.value)
  async with httpx2.AsyncClient(limits=limits, timeout=120, trust_env=False) as http:
    began = time.perf_counter()
    await asyncio.gather(
      *(client(http, url, bodies, seed, found) for seed in range(_CLIENTS.value))
    )
    found["all"] = time.perf_counter() - began
  return found


def peak_mib(pid):
  """MiB that the process held at most."""
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main(argv: list[str]) -> None:
  """Measures and prints one JSON line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # the client's library has a line for every request
  with server() as (pid, url):
    found = asyncio.run(load(url))
    memory = peak_mib(pid)
  seconds = np.asarray(found.pop("seconds"))
  line = {
    "figure": "serve_load",
    "clients": _CLIENTS.value,
    "requests": len(seconds),
    "pictures": len(seconds) * _PICTURES.value,
    "p50_ms": round(1000 * float(np.quantile(seconds, 0.5)), 1),
    "p99_ms": round(1000 * float(np.quantile(seconds, 0.99)), 1),
    "pictures_per_second": round(len(seconds) * _PICTURES.value / found.pop("all")),
    "server_mib": round(memory),
    **found,
  }
  print(json.dumps(line))
  if found["lost"] or found["wrong"]:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
