"""Canaries: two pictures of which one must score higher, so that a reward is seen to be itself.

A reward of your own brings its own as an attribute of its function, `reward.canary = Canary(...)`.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpgrpo_jax import registry
from tpgrpo_jax.data import pictures as pictures_lib


class Canary(NamedTuple):
  """Two pictures of the same size for one prompt.

  Attributes:
    better: uint8 [H, W, 3], which must score higher than
    worse: uint8 [H, W, 3].
    prompt: of both.
    metadata: of both.
  """

  better: np.ndarray
  worse: np.ndarray
  prompt: str
  metadata: Mapping[str, Any] = {}


ScoreFn = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], np.ndarray]
"""(images [2, H, W, 3], prompts, metadata) -> scores [2]."""


def problem(score: ScoreFn, canary: Canary) -> str:
  """What is wrong with the scores of the pair; "" where the better one scores higher."""
  images = np.stack([canary.better, canary.worse])
  scores = np.asarray(score(images, [canary.prompt] * 2, [dict(canary.metadata)] * 2), np.float64)
  if scores.shape != (2,) or not np.isfinite(scores).all():
    return f"gave {scores.tolist()} to the two pictures of its canary"
  if scores[0] > scores[1]:
    return ""
  return (
    f"gave {scores[0]:.6g} to the picture of its canary that must score higher, and {scores[1]:.6g} to the "
    "other"
  )


def word() -> Canary:
  """A word in black on white, and white alone: for rewards that read."""
  better = Image.new("RGB", (192, 64), "white")
  font = ImageFont.load_default(size=44)
  ImageDraw.Draw(better).text((12, 4), "HELLO", fill="black", font=font)
  worse = Image.new("RGB", better.size, "white")
  return Canary(np.asarray(better), np.asarray(worse), 'a sign with "HELLO"', {"text": "HELLO"})


def noise() -> Canary:
  """Noise and grey: for rewards of large files."""
  drawn = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  return Canary(drawn, np.full_like(drawn, 128), "noise")


def plain() -> Canary:
  """Grey and noise: for rewards of small files."""
  other = noise()
  return Canary(other.worse, other.better, "a plain picture")


def person() -> Canary:
  """A photograph of a woman (Grace Hopper, public domain, from matplotlib) and grey: for GenEval's rewards.

  Raises:
    ValueError: the installed matplotlib has no sample data.
  """
  from matplotlib import cbook

  try:
    better = _read(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))[:512]
  except OSError as error:
    raise ValueError(
      f"canary='person': its picture comes with matplotlib's sample data, which is not here ({error}). "
      "Install matplotlib from its wheel, or give a folder of your own."
    ) from error
  include = [{"class": "person", "count": 1}]
  metadata = {"tag": "single_object", "include": include}
  return Canary(better, np.full_like(better, 128), "a photo of a person", metadata)


CANARIES: dict[str, Callable[[], Canary]] = {
  "ocr": word,
  "person": person,
  "jpeg_incompressibility": noise,
  "jpeg_compressibility": plain,
}


def load(name: str, field: str = "canary") -> Canary:
  """One of CANARIES, or that of a folder with better.png, worse.png and canary.json.

  Args:
    name: of the canary, or the folder; canary.json holds {"prompt": ..., "metadata": {...}}.
    field: for messages.

  Raises:
    ValueError: neither of the two, or pictures of different sizes.
  """
  folder = pathlib.Path(name).expanduser()
  if name in CANARIES:
    return CANARIES[name]()
  if not folder.is_dir():
    registry.check(name, CANARIES, field=field)
  try:
    said = json.loads((folder / "canary.json").read_text(encoding="utf-8"))
    prompt, metadata = said["prompt"], said.get("metadata", {})
    pictures = [_read(folder / name) for name in ("better.png", "worse.png")]
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{field}={os.fspath(name)!r}: must be a folder with better.png, worse.png and canary.json, which "
      f'holds {{"prompt": "..."}} ({type(error).__name__}: {error}).'
    ) from error
  if pictures[0].shape != pictures[1].shape:
    raise ValueError(f"{field}={name!r}: better.png and worse.png must be of one size.")
  better, worse = pictures
  return Canary(better, worse, prompt, metadata)


def _read(path):
  with Image.open(path) as opened:
    return np.asarray(pictures_lib.to_rgb(opened))
