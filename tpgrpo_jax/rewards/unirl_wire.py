"""UniRL's dialect: what its reward service is asked, and how its answer is read.

    POST /score {"requests": [{"history": [{"text", "image_b64"}], "required_rewards": [...], "metadata"}]}
    -> {"results": [{reward: {part: number}}], "errors": [{reward: text}]}

Source: README of the reward service of github.com/Tencent-Hunyuan/UniRL.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import UInt8
import numpy as np

from tpgrpo_jax.rewards import wire


class Failed(OSError):
  """The service says that its reward failed on a picture, which another try may not."""


def encode_request(
  images: UInt8[np.ndarray, "N H W 3"],
  prompts: Sequence[str],
  metadata: Sequence[Mapping[str, Any]],
  reward: str,
) -> bytes:
  """The body of a request to one reward; pictures are PNG.

  Raises:
    ValueError: metadata that JSON cannot hold.
  """
  requests = [
    {
      "history": [
        {"text": prompt, "image_b64": base64.b64encode(wire.encode_image(image)).decode()}
      ],
      "required_rewards": [reward],
      "metadata": dict(row),
    }
    for image, prompt, row in zip(images, prompts, metadata, strict=True)
  ]
  return wire.dumps({"requests": requests})


def decode_answer(
  body: bytes, count: int, reward: str, part: str = ""
) -> tuple[np.ndarray, dict[str, Any]]:
  """(scores float64 [N], the reward's other parts [N]).

  Args:
    body: of the answer.
    count: of the pictures.
    reward: that was asked.
    part: of it that is the score; "" for the one that there is, or that is called as the reward.

  Raises:
    wire.Bad: anything but `count` numbers.
    Failed: the service names an error of this reward.
  """
  answer = wire.loads_answer(body)
  results, errors = answer.get("results"), answer.get("errors")
  for row in errors if isinstance(errors, list) else ():
    if isinstance(row, dict) and row.get(reward):
      raise Failed(f"the reward {reward!r} failed there: {str(row[reward])[:200]}")
  if not isinstance(results, list) or len(results) != count:
    found = f"{len(results)} results" if isinstance(results, list) else "no list of results"
    raise wire.Bad(f"{found} for {count} pictures")
  rows: list[Any] = [each.get(reward) if isinstance(each, dict) else None for each in results]
  parts = rows[0] if rows and isinstance(rows[0], dict) else {}
  part = part or (next(iter(parts)) if len(parts) == 1 else reward)
  if not all(isinstance(row, dict) and row.keys() == parts.keys() and part in row for row in rows):
    named = f"; it has {', '.join(map(repr, parts))}" if parts else ""
    raise wire.Bad(f"no {reward!r} with {part!r} for each picture{named}"[:300])
  columns = {name: wire.check_scores([row[name] for row in rows], count) for name in parts}
  return columns.pop(part), columns
