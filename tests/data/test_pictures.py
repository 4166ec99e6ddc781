"""Pictures of any mode are read at their true range."""

import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax.data import pictures
from tpgrpo_jax.rewards import canary, demonstrations

GRAY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
RGB = np.stack([GRAY] * 3, axis=-1)


def wide():
  return Image.fromarray(GRAY.astype(np.uint16) * 257)


def big_endian():
  return Image.frombytes("I;16B", (8, 8), (GRAY.astype(np.uint16) * 257).astype(">u2").tobytes())


@pytest.mark.parametrize(
  "name, mode, image",
  [
    ("a.png", "I;16", wide()),
    ("a.tiff", "I;16", wide()),
    ("a.tif", "I;16B", big_endian()),
    ("a.ppm", "I", wide()),
    ("gray.png", "L", Image.fromarray(GRAY)),
    ("coloured.png", "RGB", Image.fromarray(RGB)),
    ("alpha.png", "RGBA", Image.fromarray(RGB).convert("RGBA")),
  ],
)
def test_gray_of_16_bits_is_the_picture_of_8_bits(tmp_path, name, mode, image):
  image.save(tmp_path / name)
  with Image.open(tmp_path / name) as opened:
    assert opened.mode == mode
  np.testing.assert_array_equal(pictures.read_picture(tmp_path / name, 8, 8), RGB)


def test_numbers_of_unknown_range_are_refused(tmp_path):
  for name, array in {"float": GRAY.astype(np.float32), "int": GRAY.astype(np.int32)}.items():
    Image.fromarray(array).save(tmp_path / f"{name}.tiff")
    with pytest.raises(ValueError, match="range is not said.*Save it as PNG or JPEG") as caught:
      pictures.read_picture(tmp_path / f"{name}.tiff", 8, 8)
    assert f"{name}.tiff" in str(caught.value)


def test_rewards_read_their_pictures_so_too(tmp_path):
  wide().save(tmp_path / "better.png")
  found = demonstrations._read_picture(tmp_path / "better.png", 8)
  np.testing.assert_array_equal(found, RGB)
  np.testing.assert_array_equal(canary._read(tmp_path / "better.png"), RGB)
