"""Pictures reach the image towers as the reference preprocessing would have made them."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax.rewards import preprocess

SIZES = [
  ((64, 64), (28, 28)),
  ((512, 512), (224, 224)),
  ((37, 91), (28, 68)),
  ((91, 37), (20, 50)),
  ((20, 30), (56, 84)),  # larger
  ((50, 20), (20, 20)),  # narrower not at all
  ((30, 300), (7, 11)),  # forty pixels a pixel
  ((17, 23), (17, 23)),
]


def noise(height, width, count=2):
  """Independent pixels of full range: the hardest to resample."""
  return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def edges(height, width):
  """Black and white squares, beside which bicubic over- and undershoots."""
  squares = (noise(height // 5 + 1, width // 5 + 1) > 127).astype(np.uint8) * 255
  return squares.repeat(5, axis=1).repeat(5, axis=2)[:, :height, :width]


def pillow_resize(images, height, width):
  resized = [Image.fromarray(i).resize((width, height), Image.Resampling.BICUBIC) for i in images]
  return np.stack([np.asarray(i) for i in resized])


def resize(images, height, width):
  return np.asarray(jax.jit(lambda x: preprocess.resize(x, height=height, width=width))(images))


@pytest.mark.parametrize("draw", [noise, edges])
@pytest.mark.parametrize("old, new", SIZES)
def test_resize_equals_pillow_across_then_down_bit_for_bit(old, new, draw):
  images = draw(*old)
  wanted = pillow_resize(pillow_resize(images, old[0], new[1]), *new)
  np.testing.assert_array_equal(resize(images, *new), wanted)


@pytest.mark.parametrize("old", [(512, 512), (256, 256), (320, 240), (240, 320), (192, 336)])
def test_resize_in_proportion_equals_one_call_of_pillow_bit_for_bit(old):
  new = [side * 112 // min(old) for side in old]
  images = noise(*old, count=1)
  np.testing.assert_array_equal(resize(images, *new), pillow_resize(images, *new))


def test_resize_of_a_very_tall_picture_is_within_few_levels_of_any_pillow():
  images = noise(768, 320, count=1)  # Pillow 13 goes down first here
  error = np.abs(resize(images, 268, 112).astype(int) - pillow_resize(images, 268, 112))
  assert error.max() <= 5  # measured: 3


def test_resize_is_exact_in_the_lowest_precision_that_a_backend_may_choose():
  """bfloat16 factors, as a TPU's default, with float32 sums."""
  weights = preprocess._digits(preprocess._weights(512, 224))
  np.testing.assert_array_equal(weights, weights.astype(jnp.bfloat16).astype(np.float32))
  assert np.abs(weights).sum(-1).max() * 255 < 2**24


@pytest.mark.parametrize(
  "old, size", [((64, 64), 28), ((40, 71), 28), ((71, 40), 28), ((9, 14), 16)]
)
def test_clip_pixels_are_pillows_resized_cropped_and_normalized(old, size):
  images = noise(*old)
  tall, wide = (int(size * side / min(old)) for side in old)
  top, left = (tall - size) // 2, (wide - size) // 2
  resized = pillow_resize(images, tall, wide)[:, top : top + size, left : left + size]
  wanted = (resized / 255 - np.asarray(preprocess.CLIP_MEAN)) / np.asarray(preprocess.CLIP_STD)
  found = jax.jit(lambda x: preprocess.clip_pixels(x, size=size))(images)
  assert found.shape == (2, size, size, 3)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)  # values up to 2.7, in float32


def pillow_float_resize(image, height, width):
  """Pillow's float images are neither rounded nor clipped."""
  size, bicubic = (width, height), Image.Resampling.BICUBIC
  channels = np.moveaxis(image.astype(np.float32) / 255, -1, 0)
  planes = [Image.fromarray(np.ascontiguousarray(c)).resize(size, bicubic) for c in channels]
  return np.stack([np.asarray(p) for p in planes], axis=-1)


@pytest.mark.parametrize(
  "old, inner, margin",
  [((64, 64), (28, 28), (0, 0)), ((41, 70), (16, 28), (6, 0)), ((70, 38), (28, 15), (0, 6))],
)
def test_hps_pixels_keep_the_whole_image_on_black(old, inner, margin):
  images = edges(*old)
  top, left = margin
  wanted = np.zeros((2, 28, 28, 3))
  for canvas, image in zip(wanted, images):
    canvas[top : top + inner[0], left : left + inner[1]] = pillow_float_resize(image, *inner)
  assert wanted.min() < -0.01  # overshoot is kept
  wanted = (wanted - np.asarray(preprocess.CLIP_MEAN)) / np.asarray(preprocess.CLIP_STD)
  found = jax.jit(lambda x: preprocess.hps_pixels(x, size=28))(images)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # sums of 12 x 12 terms over 0.26


@pytest.mark.parity
@pytest.mark.parametrize("old", [(512, 512), (512, 768), (301, 224), (150, 611), (1024, 1024)])
def test_clip_pixels_equal_those_of_transformers(old):
  transformers = pytest.importorskip("transformers")
  images = noise(*old)
  theirs = transformers.CLIPImageProcessorPil()(list(images), return_tensors="np")["pixel_values"]
  found = jax.jit(preprocess.clip_pixels)(images)
  np.testing.assert_allclose(found, theirs.transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("old", [(512, 512), (512, 768), (301, 100), (100, 150)])
def test_hps_pixels_equal_torchs_antialiased_bicubic(old):
  torch = pytest.importorskip("torch")
  images = noise(*old)
  scale = 224 / max(old)
  new = [round(side * scale) for side in old]
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double() / 255
  resized = torch.nn.functional.interpolate(pixels, new, mode="bicubic", antialias=True)
  tall, wide = 224 - new[0], 224 - new[1]
  margins = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
  wanted = torch.nn.functional.pad(resized, margins).numpy().transpose(0, 2, 3, 1)
  wanted = (wanted - np.asarray(preprocess.CLIP_MEAN)) / np.asarray(preprocess.CLIP_STD)
  found = jax.jit(preprocess.hps_pixels)(images)
  # In float64, as torch's float32 weights are themselves wrong by 1e-5.
  np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)
