"""JPEG rewards: the size of an image's file, which needs no model and cannot be argued with."""

from collections.abc import Mapping, Sequence
import io
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np
from PIL import Image

from tpgrpo_jax import types

_QUALITY = 95


def jpeg_kilobytes(images: UInt8[np.ndarray, "N H W 3"]) -> Float32[np.ndarray, " N"]:
  """The size of each image as a JPEG file of quality 95, in kB of 1000 bytes.

  Source: DDPO (arXiv 2305.13301), section 5.1 and its code.

  Args:
    images: [N, H, W, 3] RGB.
  """
  return np.asarray([_encoded_bytes(image) / 1000 for image in images], np.float32)


def make_incompressibility() -> types.RewardFn:
  """Makes the reward `jpeg_kilobytes`: detailed images score high (DDPO)."""

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    del prompts, metadata
    return jpeg_kilobytes(images), {}

  return reward


def make_compressibility() -> types.RewardFn:
  """Makes the reward -`jpeg_kilobytes`: plain images score high (DDPO)."""

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    del prompts, metadata
    return -jpeg_kilobytes(images), {}

  return reward


def _encoded_bytes(image):
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="JPEG", quality=_QUALITY)
  return buffer.tell()
