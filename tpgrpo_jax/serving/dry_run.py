"""A judge on one picture, from what a command line says."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import numpy as np

from tpgrpo_jax.rewards import wire


def read_object(flag: str, text: str) -> dict[str, Any]:
  """The JSON object of a flag; ValueError where it is none."""
  try:
    value = json.loads(text)
  except ValueError as error:
    raise ValueError(f"{flag}={text!r}: must be a JSON object ({error}).") from error
  if not isinstance(value, dict):
    raise ValueError(f"{flag}={text!r}: must be a JSON object, {{...}}.")
  return value


def read_picture(path: str) -> np.ndarray:
  """The picture, uint8 [H, W, 3]; ValueError where there is none."""
  file = pathlib.Path(path)
  if not file.is_file():
    raise ValueError(f"--picture={path!r}: no such file. Give a PNG or JPEG.")
  try:
    return wire.decode_image(file.read_bytes(), wire.Limits().pixels)
  except wire.BadRequest as error:
    raise ValueError(f"--picture={path!r}: {error}") from error


def open_judge(options: dict[str, Any], make: Callable[..., Any]) -> Callable[..., Any]:
  """The judge of these options: (image, prompt, metadata) -> Verdict.

  Raises:
    ValueError: what the reward says of its options, or options that are missing or unknown.
  """
  try:
    return make(**options).judge
  except TypeError as error:
    raise ValueError(f"--options: {error}. See docs/rewards_over_the_network.md.") from error
