"""The pictures that prompts of a model that edits ask to change.

A line of a .jsonl file names its own: {"prompt": "make the car red", "image": "pictures/car.jpg"}.
"""

from collections.abc import Sequence
import io
import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from tpgrpo_jax.types import Prompt

MEMBER = "image"  # of a prompt's metadata


def paths_of(prompts: Sequence[Prompt | str], folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Where the pictures of prompts lie.

  Args:
    prompts: a bare text is a prompt without metadata, and so without a picture.
    folder: that relative paths begin in: the prompt file's own.

  Raises:
    ValueError: a prompt without one.
  """
  named = [p.metadata.get(MEMBER) if isinstance(p, Prompt) else None for p in prompts]
  without = [p for p, name in zip(prompts, named) if not isinstance(name, str) or not name]
  if without:
    text = without[0].text if isinstance(without[0], Prompt) else without[0]
    raise ValueError(
      f'the prompt {text!r}: names no picture in "{MEMBER}"'
      + (f", nor do {len(without) - 1} more" if without[1:] else "")
      + ". This model edits pictures, so every prompt needs one. Name it in the line of the .jsonl file, "
      f'{{"prompt": "...", "{MEMBER}": "cat.png"}}, or with sample --image.'
    )
  root = pathlib.Path(folder).expanduser()
  return [root / _expanded(str(name)) for name in named]


def _expanded(name):
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError as error:  # of a user who is not there
    raise ValueError(
      f"{name}: the picture of a prompt cannot be read ({error}). Mend its path in the prompt file."
    ) from error


def read_bytes(path: pathlib.Path) -> bytes:
  """The file of a picture; ValueError where there is none."""
  try:
    return path.read_bytes()
  except (OSError, ValueError) as error:  # a path with a null byte is the latter
    reason = getattr(error, "strerror", None) or error
    raise ValueError(
      f"{path}: the picture of a prompt cannot be read ({reason}). Paths are relative to "
      "the prompt file's folder: mend its line, or put the picture there."
    ) from error


def to_rgb(opened: Image.Image) -> Image.Image:
  """A picture turned as its EXIF tag says, in RGB of 8 bits.

  Gray of 16 bits keeps its range, of which Pillow's `convert` makes white all above 255.

  Raises:
    ValueError: numbers whose range the file does not say.
  """
  picture = ImageOps.exif_transpose(opened)
  # Of these formats mode I has 16 bits, too.
  is_wide = picture.mode == "I" and opened.format in ("PNG", "PPM")
  if is_wide or picture.mode.startswith("I;16"):
    gray = np.asarray(picture).astype(np.float64) * (255 / 65535)
    return Image.fromarray(np.round(gray).astype(np.uint8)).convert("RGB")
  if picture.mode in ("I", "F"):
    raise ValueError(f"mode {picture.mode!r} of numbers whose range is not said")
  return picture.convert("RGB")


def read_picture(path: str | os.PathLike[str], height: int, width: int) -> np.ndarray:
  """A picture as the model sees it, uint8 [height, width, 3].

  `to_rgb`, stretched with Pillow's Lanczos filter, as by diffusers' load_image and FluxKontextPipeline at a
  given size. Nothing is cropped. Of gray in 16 bits theirs would be white.

  Raises:
    ValueError: no picture, or one that cannot be read.
  """
  content = io.BytesIO(read_bytes(pathlib.Path(path)))
  try:
    with Image.open(content) as opened:
      picture = to_rgb(opened)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(
      f"{path}: is no picture that Pillow can read ({error}). Save it as PNG or JPEG, or remove its line."
    ) from error
  return np.asarray(picture)
