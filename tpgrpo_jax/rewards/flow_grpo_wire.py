"""Flow-GRPO's dialect: pickles in both directions, at the server's root.

Theirs are written, which is safe, and read by plain_pickle alone, which is safe too.

Source: flow_grpo/rewards.py and the public servers that it speaks to (app_deqa.py, app_geneval.py of
yifan123/reward-server).
"""

from collections.abc import Mapping, Sequence
import pickle
from typing import Any

from jaxtyping import UInt8
import numpy as np

from tpgrpo_jax.rewards import plain_pickle, wire

_PROTOCOL = 4
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OTHER_TAG = -10.0  # in a group's scores, where a picture is of another group


def encode_request(
  images: UInt8[np.ndarray, "N H W 3"],
  prompts: Sequence[str],
  metadata: Sequence[Mapping[str, Any]],
) -> bytes:
  """A request for any of the public servers: each takes what it knows. Pictures are JPEG, as they ask."""
  request = {
    "images": [wire.encode_image(image, "JPEG") for image in images],
    "prompts": list(prompts),
    "meta_datas": [{"prompt": p, **each} for p, each in zip(prompts, metadata, strict=True)],
    "only_strict": False,
  }
  return pickle.dumps(request, _PROTOCOL)


def decode_request(body: bytes, limits: wire.Limits) -> tuple[list[wire.Batch], list[Any] | None]:
  """(the pictures, those of one size together; meta_datas where the request has them).

  Raises:
    wire.BadRequest: whatever is wrong with it.
  """
  try:
    request = plain_pickle.loads(body, plain_pickle.Limits(size=limits.body))
  except plain_pickle.Refused as error:
    raise wire.BadRequest(400, f"the body is no pickle that is read here: it {error}") from error
  pictures = request.get("images") if isinstance(request, dict) else None
  if not isinstance(pictures, list) or not all(isinstance(p, bytes) for p in pictures):
    raise wire.BadRequest(422, "images: must be a list of the bytes of JPEGs.")
  prompts, metadata = request.get("prompts"), request.get("meta_datas")
  if isinstance(prompts, np.ndarray):
    prompts = prompts.tolist()
  if prompts is None:  # GenEval's client sends the prompts within the metadata, DeQA's none at all
    given = metadata if isinstance(metadata, list) else [{}] * len(pictures)
    prompts = [str(m.get("prompt", "")) if isinstance(m, dict) else "" for m in given]
  return wire.make_batches(pictures, prompts, metadata, limits), metadata


def encode_answer(scores: np.ndarray, info: Mapping[str, Any], metadata: list[Any] | None) -> bytes:
  """What each of the public clients looks for.

  Args:
    scores: float32 [N].
    info: of the reward; "exact" and "strict" [N], where it has them, are the rewards that GenEval's rules
      give, and the strict ones.
    metadata: [N] of a request of GenEval's kind, or None. Such a request is also told each tag's scores, with
      OTHER_TAG for pictures of another.
  """
  given = [float(score) for score in scores]
  answer: dict[str, Any] = {"outputs": given, "scores": given}
  if metadata is not None:
    rewards, strict = ([float(x) for x in info.get(name, given)] for name in ("exact", "strict"))
    tags = [str(each.get("tag", "")) for each in metadata]
    for name, values in (("rewards", rewards), ("strict_rewards", strict)):
      answer[name] = values
      answer[f"group_{name}"] = {
        tag: [v if own == tag else OTHER_TAG for v, own in zip(values, tags, strict=True)]
        for tag in TAGS
      }
  return pickle.dumps(answer, _PROTOCOL)


def decode_answer(body: bytes, count: int, key: str = "") -> tuple[np.ndarray, dict[str, Any]]:
  """(scores float64 [N], what else the answer says of each picture).

  Args:
    body: of the answer.
    count: of the pictures.
    key: the entry that holds the scores; "" for "scores", else "outputs".

  Raises:
    wire.Bad: anything but plain data with `count` numbers.
  """
  try:
    answer = plain_pickle.loads(body)
  except plain_pickle.Refused as error:
    raise wire.Bad(f"a pickle that is not read: it {error}") from error
  if not isinstance(answer, dict):
    raise wire.Bad(f"a pickle of {type(answer).__name__} where a dict should be")
  key = key or next((name for name in ("scores", "outputs") if name in answer), "scores")
  if key not in answer:
    raise wire.Bad(f"no {key!r}; it has {', '.join(map(repr, answer))}"[:300])
  scores = wire.check_scores(answer.pop(key), count)
  info = {}
  for name, values in answer.items():
    if isinstance(values, list) and len(values) == count:
      info[name] = values
  return scores, info
