"""Rewards that a server computes: ours, Flow-Factory's, Flow-GRPO's, and UniRL's."""

from collections.abc import Callable, Mapping, Sequence
import json
import sys
from typing import Any
from urllib import parse

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import registry, types
from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.rewards import flow_grpo_wire, servers, unirl_wire, wire
from tpgrpo_jax.rewards.combine import RewardError

_TEXT = 8192  # bytes of a request that a prompt and its metadata are taken to need, pictures aside


def make(
  *,
  url: str | Sequence[str],
  reward: str = "",
  canary: str = "",
  token_file: str = "",
  ca_file: str = "",
  timeout: float = 120.0,
  batch: int = 64,
  connections: int = 4,
  low: float = -np.inf,
  high: float = np.inf,
  run_label: str = "",
) -> types.RewardFn:
  """Makes the reward that `python -m tpgrpo_jax.serve`, or a server of Flow-Factory's form, computes.

  The servers are asked who they are when it is made, and whenever one was away or is another process:
  /health, that they have the reward, and the canary.

  Args:
    url: of the server, such as "http://localhost:8090"; of several, which take turns.
    reward: its label there; "" where the server has one alone.
    canary: a name of canary.CANARIES or a folder, for servers that have none of their own; by default that
      of `reward`, or of `run_label`, if there is one.
    token_file: file of the token that the server asks for.
    ca_file: PEM file of the authority that signed the server's certificate, where it is not a public one.
    timeout: seconds for the answer to one request.
    batch: pictures in one request.
    connections: requests on their way at the same time.
    low: the lowest score that can be true.
    high: the highest.
    run_label: what the run calls it, where that is the name of a reward that ships: without `reward`, the
      server's own must then be that one. The run says it; it is no option of the user's.

  Returns:
    (images uint8 [N, H, W, 3], prompts, metadata) -> (scores float32 [N], info of the server's reward).

  Raises:
    ValueError: an option out of its range; no server that answers; or one that is not what it should be.
    RewardError: (the reward) an answer without N finite numbers from `low` to `high`.
    OSError: (the reward) no answer; another try may go well.
  """
  _check_options(batch, low, high)
  pair = _canary(canary, reward or run_label)
  query = f"?reward={parse.quote(reward)}" if reward else ""
  multipart: dict[str, bool] = {}  # by server
  limits: dict[str, dict[str, int]] = {}

  def score(send, images, prompts, metadata, *, as_parts):
    body, kind = wire.encode_request(images, prompts, metadata, multipart=as_parts)
    answer = send("POST", f"/compute{query}", body, kind)
    with _naming(answer.url):
      scores, info = wire.decode_answer(answer.body, len(prompts))
      return _in_range(scores, low, high), info

  def verify(pool, address):
    about = _health(pool, address)
    if about.get("service") == "tpgrpo_jax":
      _check_served(about, reward, run_label, address)
    forms, instance = about.get("forms"), about.get("instance")
    multipart[address] = isinstance(forms, list | tuple) and "multipart" in forms
    limits[address] = _read_limits(about)
    found = [instance if isinstance(instance, str) else ""]

    def send(*args):
      answer = pool.ask(address, *args)
      if found[
        0
      ]:  # behind a balancer this may be another process: the canary says more of it than /health
        found[0] = answer.instance
      return answer

    if pair is not None:
      as_parts = multipart[address]
      ask = lambda *given: score(send, *given, as_parts=as_parts)[0]
      if problem := canary_lib.problem(ask, pair):
        raise RewardError(f"{address} {problem}. Is it another reward's server?")
    return found[0]

  pool = servers.Servers(
    url,
    token_file=token_file,
    ca_file=ca_file,
    timeout=timeout,
    connections=connections,
    verify=verify,
  )

  def call(images, prompts, metadata):
    as_parts = bool(multipart) and all(multipart.values())
    return score(pool.send, images, prompts, metadata, as_parts=as_parts)

  def size(images, prompts, metadata):
    return max(1, min([batch, *(_fits(each, images, metadata) for each in limits.values())]))

  return _in_requests(call, size, connections)


make.is_told_the_label = True  # pyright: ignore[reportFunctionMemberAccess]  (combine looks for it)


def make_flow_grpo(
  *,
  url: str | Sequence[str],
  key: str = "",
  canary: str = "",
  timeout: float = 120.0,
  batch: int = 64,
  connections: int = 4,
  low: float = -np.inf,
  high: float = np.inf,
) -> types.RewardFn:
  """Makes the reward of a server that speaks Flow-GRPO's pickles (GenEval, DeQA, UnifiedReward).

  Its pickles are read by a reader that knows numbers, text, lists, dicts and NumPy arrays, and runs nothing.
  Pictures are sent as JPEG, as Flow-GRPO sends them.

  Source: flow_grpo/rewards.py; github.com/yifan123/reward-server.

  Args:
    url: of the server, such as "http://localhost:18085"; of several, which take turns.
    key: of the answer's entry that is trained on; by default "scores" (GenEval), else "outputs".
    canary: a name of canary.CANARIES or a folder; by default none is asked.
    timeout: seconds for the answer to one request.
    batch: pictures in one request; Flow-GRPO's own number.
    connections: requests on their way at the same time.
    low: the lowest score that can be true.
    high: the highest.

  Returns:
    (images uint8 [N, H, W, 3], prompts, metadata) -> (scores float32 [N], info, the answer's other entries).

  Raises:
    ValueError, RewardError, OSError: as `make`.
  """
  _check_options(batch, low, high)
  pair = _canary(canary, "")

  def score(send, images, prompts, metadata):
    answer = send("POST", "/", flow_grpo_wire.encode_request(images, prompts, metadata))
    with _naming(answer.url):
      scores, info = flow_grpo_wire.decode_answer(answer.body, len(prompts), key)
      return _in_range(scores, low, high), info

  def verify(pool, address):
    # It has no /health. Whatever answers speaks HTTP; that it speaks this dialect, a canary shows.
    pool.ask(address, "GET", "/", statuses=range(200, 500))
    if pair is not None:
      ask = lambda *given: score(lambda *args: pool.ask(address, *args), *given)[0]
      if problem := canary_lib.problem(ask, pair):
        raise RewardError(f"{address} {problem}. Is it another reward's server?")

  pool = servers.Servers(url, timeout=timeout, connections=connections, verify=verify)
  call = lambda *given: score(pool.send, *given)
  return _in_requests(call, lambda *_: batch, connections)


def make_unirl(
  *,
  url: str | Sequence[str],
  reward: str,
  part: str = "",
  canary: str = "",
  timeout: float = 150.0,
  batch: int = 64,
  connections: int = 4,
  low: float = -np.inf,
  high: float = np.inf,
) -> types.RewardFn:
  """Makes the reward of UniRL's reward service (/score).

  Source: unirl_wire.

  Args:
    url: of the service, such as "http://localhost:8080"; of several, which take turns.
    reward: its name there.
    part: of the reward that is trained on, where it has several and none with its own name.
    canary: a name of canary.CANARIES or a folder; by default that of `reward`, if there is one.
    timeout: seconds for the answer to one request; the service gives a reward 120.
    batch: pictures in one request.
    connections: requests on their way at the same time.
    low: the lowest score that can be true.
    high: the highest.

  Returns:
    (images uint8 [N, H, W, 3], prompts, metadata) -> (scores float32 [N], info, the reward's other parts).

  Raises:
    ValueError, RewardError, OSError: as `make`.
  """
  _check_options(batch, low, high)
  pair = _canary(canary, reward)

  def score(send, images, prompts, metadata):
    body = unirl_wire.encode_request(images, prompts, metadata, reward)
    answer = send("POST", "/score", body, wire.JSON)
    with _naming(answer.url):
      scores, info = unirl_wire.decode_answer(answer.body, len(prompts), reward, part)
      return _in_range(scores, low, high), info

  def verify(pool, address):
    served = _health(pool, address).get("rewards")
    if not isinstance(served, dict) or reward not in served:
      raise RewardError(
        f"{address} has no reward {reward!r}.{registry.nearest(reward, served or ())}"
      )
    if pair is not None:
      ask = lambda *given: score(lambda *args: pool.ask(address, *args), *given)[0]
      if problem := canary_lib.problem(ask, pair):
        raise RewardError(f"{address} {problem}. Is it another reward's server?")

  pool = servers.Servers(url, timeout=timeout, connections=connections, verify=verify)
  call = lambda *given: score(pool.send, *given)
  return _in_requests(call, lambda *_: batch, connections)


def _in_requests(call, size: Callable[..., int], connections: int) -> types.RewardFn:
  """The reward that sends at most size(images, prompts, metadata) pictures in a request, several at once."""

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    if not len(prompts):
      return np.zeros(0, np.float32), {}
    step = size(images, prompts, metadata)
    rows = [slice(first, first + step) for first in range(0, len(prompts), step)]
    calls = ((images[r], prompts[r], metadata[r]) for r in rows)
    results = servers.in_parallel(call, calls, connections)
    scores = np.concatenate([scores for scores, _ in results])
    return scores.astype(np.float32), _joined([info for _, info in results])

  return reward


def _joined(infos):
  """The entries that all have, one after another."""
  names = [name for name in infos[0] if all(name in info for info in infos)]
  join = lambda parts: (
    np.concatenate(parts)
    if all(isinstance(part, np.ndarray) for part in parts)
    else [value for part in parts for value in part]
  )
  return {name: join([info[name] for info in infos]) for name in names}


def _check_options(batch, low, high):
  if type(batch) is not int or batch < 1:
    raise ValueError(f"batch={batch!r}: must be an integer >= 1. 64 is usual.")
  if any(isinstance(x, str | bool) for x in (low, high)) or not low < high:
    raise ValueError(f"low={low!r}, high={high!r}: must be numbers, the lower one first.")


def _canary(name, reward):
  if not name and reward in canary_lib.CANARIES:
    name = reward
  return canary_lib.load(name) if name else None


def _health(pool, address) -> dict[str, Any]:
  answer = pool.ask(address, "GET", "/health")
  try:
    about = json.loads(answer.body)
  except (ValueError, RecursionError):
    about = None
  if not isinstance(about, dict) or about.get("status") != "ok":
    raise RewardError(
      f"{address}/health answered {answer.body[:80]!r}: is no reward server that is well."
    )
  return about


def _check_served(about, reward, label, address):
  """Raises RewardError unless the server has the reward; or, where none is named, one alone of the label."""
  served = about.get("rewards")
  if about.get("protocol") != wire.PROTOCOL:
    raise RewardError(
      f"{address} speaks protocol {about.get('protocol')!r}, and this is {wire.PROTOCOL}: install one "
      "version of tpgrpo_jax at both ends."
    )
  if not isinstance(served, dict):
    raise RewardError(f"{address}/health names no rewards. If it asks for a token, set token_file.")
  if reward and reward not in served:
    raise RewardError(f"{address} has no reward {reward!r}.{registry.nearest(reward, served)}")
  if not reward and len(served) != 1:
    raise RewardError(f"{address} has {', '.join(served)}: set reward to one of them.")
  if not reward and label:
    ((name, said),) = served.items()
    made = said.get("make", name) if isinstance(said, dict) else name
    if label not in (name, made):
      raise RewardError(
        f"{address} has the reward {name!r}, and the run's label is {label!r}. If that is meant, set reward "
        f"to {name!r}."
      )


def _read_limits(about) -> dict[str, int]:
  """What a server of ours says that it takes in one request; what is no number above 0 is left out."""
  said = about.get("limits")
  said = said if isinstance(said, dict) else {}
  return {name: value for name, value in said.items() if type(value) is int and value > 0}


def _fits(limits, images, metadata) -> int:
  """How many of these pictures a request can hold, each as large as a PNG in base64 can be."""
  pixels = images.shape[1] * images.shape[2]
  given = [sum(v.nbytes for v in row.values() if isinstance(v, np.ndarray)) for row in metadata]
  each = (3 * pixels + max(given, default=0)) * 1.01 * 4 / 3 + _TEXT
  return min(
    limits.get("images", len(images)),
    limits.get("all_pixels", sys.maxsize) // pixels,
    int(limits.get("body", sys.maxsize) / each),
  )


class _naming:
  """Turns what is wrong with an answer into a RewardError that names the server."""

  def __init__(self, url):
    self.url = url

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, wire.Bad):
      raise RewardError(
        f"{self.url} answered with {error}. Nothing is trained on it. Mend the server, then start the same "
        "command again: the run goes on from its last checkpoint."
      ) from error
    return False


def _in_range(scores, low, high):
  wrong = scores[(scores < low) | (scores > high)]
  if len(wrong):
    raise wire.Bad(f"the score {wrong[0]:g}, outside {low:g} to {high:g}")
  return scores
