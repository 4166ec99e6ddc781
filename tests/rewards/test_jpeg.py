import io

import numpy as np
from PIL import Image

from tpgrpo_jax.rewards import jpeg


def _images():
  noise = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
  return np.concatenate([np.zeros_like(noise), noise])


def test_jpeg_size_is_that_of_the_file_in_thousands_of_bytes(tmp_path):
  images = _images()
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=95)
  want = [(tmp_path / f"{i}.jpg").stat().st_size / 1000 for i in range(2)]
  np.testing.assert_array_equal(jpeg.jpeg_kilobytes(images), np.asarray(want, np.float32))


def test_detail_scores_higher_in_incompressibility():
  scores, _ = jpeg.make_incompressibility()(_images(), ["", ""], [{}, {}])
  assert scores[1] > scores[0] > 0


def test_compressibility_is_the_negative_of_incompressibility():
  call = (_images(), ["", ""], [{}, {}])
  np.testing.assert_array_equal(
    jpeg.make_compressibility()(*call)[0], -jpeg.make_incompressibility()(*call)[0]
  )


def test_scores_are_float32_one_per_image():
  scores, _ = jpeg.make_compressibility()(_images(), ["", ""], [{}, {}])
  assert scores.dtype == np.float32 and scores.shape == (2,)


def test_empty_batch_has_no_scores():
  scores, _ = jpeg.make_compressibility()(np.zeros((0, 8, 8, 3), np.uint8), [], [])
  assert scores.shape == (0,)


def test_colours_are_read_as_rgb():
  red = np.zeros((1, 16, 16, 3), np.uint8)
  red[..., 0] = 255
  buffer = io.BytesIO()
  Image.new("RGB", (16, 16), "red").save(buffer, format="JPEG", quality=95)
  np.testing.assert_allclose(jpeg.jpeg_kilobytes(red), len(buffer.getvalue()) / 1000, rtol=1e-6)
