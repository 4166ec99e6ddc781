"""What goes over the network between a run and a reward server, both ends of it.

A request is JSON, as in Flow-Factory's template, {"prompt": [...], "image": [base64 PNG ...], "metadata":
[...]}, or, with a third less to send, multipart/form-data: a part "request" with the same JSON less the
pictures, and a part "image" of PNG bytes for each of them, in order. An answer is JSON: {"rewards": [...],
"info": {...}}, or {"error": "..."}. No pickle is read here; Flow-GRPO's dialect is plain_pickle's.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
import io
import json
import os
from typing import Any, NamedTuple

from jaxtyping import UInt8
import numpy as np
from PIL import Image

from tpgrpo_jax.rewards import forms

PROTOCOL = 1
JSON = "application/json"
INSTANCE = "X-Instance"  # header of an answer: which server gave it, as /health's "instance"
FORMATS = ("PNG", "JPEG")  # of pictures; PNG alone keeps every bit
_MOST_VALUES = 1_000_000


class Limits(NamedTuple):
  """What a server takes in one request.

  Attributes:
    body: bytes.
    images: pictures.
    pixels: of each picture, width times height.
    all_pixels: of all pictures together.
    text: characters of all prompts and metadata.
    side: least pixels of a picture's shorter side.
    ratio: how often the shorter side may go into the longer one: rewards enlarge pictures until the shorter
      side has its size, so that a narrow one would take gigabytes.
  """

  body: int = 64 * 2**20
  images: int = 512
  pixels: int = 4096 * 4096
  all_pixels: int = 2**27
  text: int = 4 * 2**20
  side: int = 8
  ratio: int = 16


class Batch(NamedTuple):
  """Pictures of one size, and what they were asked for.

  Attributes:
    images: uint8 [N, H, W, 3], RGB.
    prompts: [N].
    metadata: [N].
    rows: [N] places in the request that they came from.
  """

  images: np.ndarray
  prompts: list[str]
  metadata: list[Mapping[str, Any]]
  rows: list[int]


class BadRequest(ValueError):
  """A request that cannot be scored.

  Attributes:
    status: of HTTP, 4xx.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class Bad(ValueError):
  """An answer that is none."""


# Pictures


def encode_image(image: UInt8[np.ndarray, "H W 3"], format: str = "PNG") -> bytes:
  """One picture as a PNG, or as a JPEG of Pillow's usual quality 75."""
  buffer = io.BytesIO()
  options = {"compress_level": 1} if format == "PNG" else {}
  Image.fromarray(image).save(buffer, format=format, **options)
  return buffer.getvalue()


def decode_image(data: bytes, pixels: int, limits: Limits = Limits()) -> UInt8[np.ndarray, "H W 3"]:
  """A PNG or JPEG in RGB.

  Args:
    data: the file.
    pixels: how many it may have; they are counted before any is unpacked.
    limits: of its sides.

  Raises:
    BadRequest: another format, too many pixels, a picture too small or too narrow, or a file that cannot be
      unpacked.
  """
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
      width, height = opened.size
      if width * height > pixels:
        raise BadRequest(
          413,
          f"a picture of {width} x {height}: only {pixels} more pixels are read in this request.",
        )
      if min(width, height) < limits.side or max(width, height) > limits.ratio * min(width, height):
        raise BadRequest(
          422,
          f"a picture of {width} x {height}: the shorter side must have {limits.side} pixels or more, "
          f"and the longer one at most {limits.ratio} times as many.",
        )
      return np.asarray(opened.convert("RGB"))
  except BadRequest:
    raise
  except Exception as error:  # whatever Pillow's decoders make of a file that is none
    raise BadRequest(422, f"a picture that is no PNG or JPEG ({type(error).__name__}).") from error


# Requests


def encode_request(
  images: UInt8[np.ndarray, "N H W 3"],
  prompts: Sequence[str],
  metadata: Sequence[Mapping[str, Any]],
  *,
  multipart: bool,
) -> tuple[bytes, str]:
  """(body, content type) of a request; `decode_request` reads it.

  Raises:
    ValueError: metadata that JSON cannot hold.
  """
  pictures = [encode_image(image) for image in images]
  request = {"prompt": list(prompts), "metadata": [dict(each) for each in metadata]}
  if not multipart:
    request["image"] = [base64.b64encode(picture).decode() for picture in pictures]
    return dumps(request), JSON
  boundary = f"tpgrpo{os.urandom(16).hex()}"
  parts = [_part(boundary, "request", JSON, dumps(request))]
  parts += [_part(boundary, "image", "image/png", picture) for picture in pictures]
  body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
  return body, f"multipart/form-data; boundary={boundary}"


def dumps(request: Any) -> bytes:
  """A request as JSON; ValueError where JSON cannot hold it."""
  try:
    return json.dumps(request, allow_nan=False, default=_plain).encode()
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"metadata of the prompts: cannot be sent as JSON ({error}). Keep to text, numbers, lists and "
      "dicts in the data files."
    ) from error


def _plain(value):
  if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] == (3,):
    return base64.b64encode(encode_image(value)).decode()  # a picture, as those that are scored
  if isinstance(value, np.generic | np.ndarray):
    return value.tolist()
  raise TypeError(f"{type(value).__name__} is no type of JSON")


def _part(boundary, name, kind, content):
  head = (
    f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n'
    f"Content-Type: {kind}\r\n\r\n"
  )
  return head.encode() + content + b"\r\n"


def decode_request(body: bytes, content_type: str, limits: Limits) -> list[Batch]:
  """The request's pictures, those of one size together.

  Args:
    body: as `encode_request` made it, or another's.
    content_type: its header.
    limits: of the server.

  Raises:
    BadRequest: whatever is wrong with it.
  """
  kind = content_type.partition(";")[0].strip().lower()
  if kind == "multipart/form-data":
    request, pictures = _split_parts(body, content_type, limits)
  else:  # also without a type, or with curl's: what it is, the content says
    request = _loads(body)
    pictures = request.get("image")
    if not isinstance(pictures, list):
      raise BadRequest(422, '"image": must be a list of base64 PNGs, one for each prompt.')
    _check_count(len(pictures), limits)
    pictures = [_from_base64(picture) for picture in pictures]
  return make_batches(pictures, request.get("prompt"), request.get("metadata"), limits)


def make_batches(
  pictures: Sequence[bytes], prompts: Any, metadata: Any, limits: Limits
) -> list[Batch]:
  """Checks what was asked, unpacks the pictures, and puts those of one size together.

  Raises:
    BadRequest: whatever is wrong with it.
  """
  _check_count(len(pictures), limits)
  if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
    raise BadRequest(422, '"prompt": must be a list of texts.')
  metadata = [{} for _ in prompts] if metadata is None else metadata
  if not isinstance(metadata, list) or not all(isinstance(m, dict) for m in metadata):
    raise BadRequest(422, '"metadata": must be a list of objects, one for each prompt.')
  if not len(pictures) == len(prompts) == len(metadata):
    raise BadRequest(
      422,
      f"{len(pictures)} images, {len(prompts)} prompts, {len(metadata)} metadata: must be equally many.",
    )
  try:
    characters = sum(map(len, prompts)) + sum(_text_in(each) for each in metadata)
  except RecursionError as error:
    raise BadRequest(422, '"metadata": is too deeply nested.') from error
  if characters > limits.text:
    raise BadRequest(
      413, f"{characters} characters of prompts and metadata: at most {limits.text}."
    )
  sizes: dict[tuple[int, ...], list[int]] = {}
  images, left = [], limits.all_pixels
  for row, picture in enumerate(pictures):
    images.append(decode_image(picture, min(limits.pixels, left), limits))
    left -= images[-1].size // 3
    sizes.setdefault(images[-1].shape, []).append(row)
  return [
    Batch(
      np.stack([images[i] for i in rows]),
      [prompts[i] for i in rows],
      [metadata[i] for i in rows],
      rows,
    )
    for rows in sizes.values()
  ]


def _check_count(count, limits):
  if not 0 < count <= limits.images:
    raise BadRequest(
      413 if count else 422, f"{count} images: must be 1 to {limits.images} in a request."
    )


def _text_in(value: Any) -> int:
  """About how many characters the metadata have."""
  if isinstance(value, dict):
    return sum(_text_in(key) + _text_in(each) for key, each in value.items())
  if isinstance(value, list | tuple):
    return len(value) + sum(map(_text_in, value))
  return len(value) if isinstance(value, str) else 8


def _loads(body):
  # Python's objects take far more memory than a few letters of JSON that stand for them.
  if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
    raise BadRequest(413, f"the body holds more than {_MOST_VALUES} values.")
  try:
    request = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise BadRequest(400, f"the body is no JSON ({type(error).__name__}: {error}).") from error
  if not isinstance(request, dict):
    raise BadRequest(422, "the body must be a JSON object with prompt, image and metadata.")
  return request


def _from_base64(text):
  if not isinstance(text, str):
    raise BadRequest(422, '"image": must be a list of base64 PNGs.')
  text = text.partition("base64,")[2] if text.startswith("data:") else text
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise BadRequest(422, f'"image": is no base64 ({error}).') from error


def _split_parts(body, content_type, limits):
  """({the JSON of the part "request"}, [the bytes of the parts "image"])."""
  check_count = lambda count: _check_count(max(count - 1, 1), limits)
  try:
    parts = forms.split(body, content_type, check_count)
  except BadRequest:
    raise
  except Exception as error:  # the parser's own, of which there are several
    raise BadRequest(400, f"the body is no multipart form ({type(error).__name__}).") from error
  requests = [content for name, content in parts if name == b"request"]
  if len(requests) != 1:
    raise BadRequest(
      422, 'a form must have one part "request" and a part "image" for each picture.'
    )
  return _loads(requests[0]), [content for name, content in parts if name == b"image"]


# Answers


def encode_answer(scores: np.ndarray, info: Mapping[str, Any]) -> bytes:
  """{"rewards": [N], "info": name -> {"values": [N], "dtype"}}; the float32 scores keep every bit.

  What of an info is no value of JSON for each picture stays behind.
  """
  kept = {}
  for name, values in info.items():
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    dtype = str(values.dtype) if isinstance(values, np.ndarray) else None
    if isinstance(plain, list) and len(plain) == len(scores) and isinstance(name, str):
      try:
        json.dumps(plain, allow_nan=False)
      except (TypeError, ValueError, RecursionError):
        continue
      kept[name] = {"values": plain, "dtype": dtype}
  rewards = [float(score) for score in scores]
  return json.dumps({"rewards": rewards, "info": kept}, allow_nan=False).encode()


def decode_answer(body: bytes, count: int) -> tuple[np.ndarray, dict[str, Any]]:
  """(scores float64 [N], info) of an answer, ours or Flow-Factory's.

  Raises:
    Bad: anything but `count` numbers; the message says what.
  """
  answer = loads_answer(body)
  if answer.get("error"):
    raise Bad(f"the error {str(answer['error'])[:200]!r}")
  scores = check_scores(answer.get("rewards"), count)
  info = answer.get("info")
  return scores, _read_info(info, count) if isinstance(info, dict) else {}


def loads_answer(body: bytes) -> dict[str, Any]:
  """The JSON object of an answer; Bad where it is anything else."""
  try:
    answer = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Bad(f"what is no JSON: {_excerpt(body)}") from error
  if not isinstance(answer, dict):
    raise Bad(f"JSON that is no object: {_excerpt(body)}")
  return answer


def check_scores(rewards: Any, count: int) -> np.ndarray:
  """A list of `count` numbers as float64 [count]; Bad where it is anything else."""
  if isinstance(rewards, np.ndarray):
    rewards = rewards.tolist()
  if not isinstance(rewards, list | tuple):
    raise Bad(f"no list of rewards, but {str(rewards)[:80]!r}")
  if len(rewards) != count:
    raise Bad(f"{len(rewards)} scores for {count} pictures")
  for score in rewards:
    if isinstance(score, bool) or not isinstance(score, int | float | np.integer | np.floating):
      raise Bad(f"the score {str(score)[:80]!r}, which is no number")
    try:
      finite = np.isfinite(float(score))
    except OverflowError:  # an integer of hundreds of digits
      finite = False
    if not finite:
      raise Bad(f"the score {str(score)[:80]}")
  return np.asarray(rewards, np.float64)


def _read_info(info, count):
  result = {}
  for name, entry in info.items():
    values = entry.get("values") if isinstance(entry, dict) else None
    if not isinstance(values, list) or len(values) != count:
      continue
    result[name] = _typed(values, entry.get("dtype"))
  return result


def _typed(values, dtype):
  """The values as an array of the dtype that an answer names; as they are where it cannot hold them."""
  numbers = all(isinstance(v, int | float | bool) for v in values)
  if not numbers or dtype not in ("float32", "float64", "int32", "int64", "bool"):
    return values
  try:
    with np.errstate(all="ignore"):
      return np.asarray(values, dtype)
  except (ValueError, OverflowError):  # such as NaN, or 2^40, as int32
    return values


def _excerpt(body):
  return repr(bytes(body[:60]).decode("latin1")) + ("..." if len(body) > 60 else "")
