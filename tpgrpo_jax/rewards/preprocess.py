"""What image towers do to pictures before they look at them, as pure functions for the device.

Resampling is two products with banded matrices, across and then down. `resize` repeats Pillow's
integer arithmetic, bit for bit; rows and columns that a crop would remove are never computed. Pillow
13 goes down first where that is much cheaper: of proportionate resizing that is only very tall
pictures (1536 x 640, but not 1344 x 768), whose pixels then differ by up to 3 of 255 on pure noise, and 7
where edges are hard.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float32, UInt8
import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PRECISION_BITS = 22  # of Pillow's fixed-point weights


def clip_pixels(
  images: UInt8[jax.Array, "N H W 3"],
  *,
  size: int = 224,
  mean: tuple[float, float, float] = CLIP_MEAN,
  std: tuple[float, float, float] = CLIP_STD,
) -> Float32[jax.Array, "N S S 3"]:
  """Shorter side to `size` (bicubic), centre crop, (x / 255 - mean) / std.

  As transformers' CLIPImageProcessor with the Pillow backend, to float32 rounding: what CLIPScore,
  PickScore and the aesthetic score get. Where an odd number of pixels is cut away, the first side
  loses one less (torchvision's CenterCrop rounds half to even instead).

  Args:
    images: RGB.
    size: side S of the result, the tower's image_size.
    mean: per channel.
    std: per channel.
  """
  pixels = _resize(
    images, _shorter_side(images, size), (size, size), begin=lambda spare: spare // 2
  )
  return _normalize(pixels.astype(jnp.float32) / 255.0, mean, std)


def torchvision_pixels(
  images: UInt8[jax.Array, "N H W 3"],
  *,
  size: int = 224,
  mean: tuple[float, float, float] = CLIP_MEAN,
  std: tuple[float, float, float] = CLIP_STD,
) -> Float32[jax.Array, "N S S 3"]:
  """`clip_pixels` with torchvision's crop: of an odd number of pixels, half to even are cut away first.

  As the Resize and CenterCrop of pictures that OpenAI's CLIP has, which ImageReward's code repeats.

  Args:
    images: RGB.
    size: side S of the result, the tower's image_size.
    mean: per channel.
    std: per channel.
  """
  begin = lambda spare: round(spare / 2)  # Python, too, rounds half to even
  pixels = _resize(images, _shorter_side(images, size), (size, size), begin=begin)
  return _normalize(pixels.astype(jnp.float32) / 255.0, mean, std)


def _shorter_side(images, size):
  """(height, width) of pictures whose shorter side becomes `size`."""
  shorter = min(images.shape[1:3])
  return tuple(int(size * side / shorter) for side in images.shape[1:3])


def hps_pixels(
  images: UInt8[jax.Array, "N H W 3"],
  *,
  size: int = 224,
  mean: tuple[float, float, float] = CLIP_MEAN,
  std: tuple[float, float, float] = CLIP_STD,
) -> Float32[jax.Array, "N S S 3"]:
  """Longer side to `size` (bicubic), black margins to a square, (x / 255 - mean) / std.

  As HPSv2's own open_clip transform (ResizeMaxSize on a float tensor, not on a Pillow image): nothing
  is rounded or clipped after resampling. With antialias, torchvision's default for tensors since
  0.17; torch's float32 weights make the reference wrong by up to 5e-5. A picture whose longer side
  is `size` already gets its margins too, where the reference leaves it as it is.

  Args:
    images: RGB.
    size: side S of the result.
    mean: per channel.
    std: per channel.
  """
  height, width = images.shape[1:3]
  scale = size / max(height, width)
  new_height, new_width = round(height * scale), round(width * scale)
  rows, columns = _weights(height, new_height), _weights(width, new_width)
  x = images.astype(jnp.float32) / 255.0
  # A backend's default may round the factors to 8 or 10 bits.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  x = product("oi,nhic->nhoc", jnp.asarray(columns, jnp.float32), x)
  x = product("oi,niwc->nowc", jnp.asarray(rows, jnp.float32), x)
  margins = [((size - n) // 2, size - n - (size - n) // 2) for n in (new_height, new_width)]
  return _normalize(jnp.pad(x, ((0, 0), *margins, (0, 0))), mean, std)


def resize(
  images: UInt8[jax.Array, "N H W 3"], *, height: int, width: int
) -> UInt8[jax.Array, "N h w 3"]:
  """Bicubic resampling with antialias, as Pillow's Image.resize(..., BICUBIC); see above.

  Args:
    images: any channels.
    height: h, of the result.
    width: w, of the result.
  """
  return _resize(images, (height, width), (height, width), begin=lambda spare: 0)


def _resize(images, resized, cropped, *, begin):
  """The centre `cropped` of images resampled to `resized`, both (height, width).

  `begin` says how many of the pixels to spare are cut away first.
  """
  digits = []
  for side, new, kept in zip(images.shape[1:3], resized, cropped):
    first = begin(new - kept)
    digits.append(_digits(_weights(side, new)[first : first + kept]))
  rows, columns = digits
  images = _resample("koi,nhic->knhoc", columns, images)  # Pillow's order: across, then down
  return _resample("koi,niwc->knowc", rows, images)


def _weights(old: int, new: int) -> np.ndarray:
  """Pillow's bicubic weights [new, old] float64 (Keys, a = -1/2), each row summing to 1."""
  scale = old / new
  stretch = max(scale, 1.0)
  support = 2.0 * stretch
  weights = np.zeros((new, old))
  for i in range(new):
    centre = (i + 0.5) * scale
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), old)
    x = np.abs((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    w = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights[i, first:last] = w / w.sum()
  return weights


def _digits(weights):
  """Fixed-point weights as three signed digits to the base 256, [3, new, old] float32, low first."""
  scaled = weights * 2.0**_PRECISION_BITS
  rest = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)
  digits = []
  for _ in range(2):
    low = (rest + 128) % 256 - 128
    digits.append(low)
    rest = (rest - low) // 256
  return np.stack([*digits, rest]).astype(np.float32)


def _resample(subscripts, digits, images):
  """One pass in integers: sum of weight x pixel, rounded to 8 bits.

  Factors have at most 8 bits and sums fewer than 24, so that products in float32, TF32 or bfloat16
  with float32 sums are all exact: the backend's fastest will do.
  """
  parts = jnp.einsum(subscripts, digits, images.astype(jnp.float32)).astype(jnp.int32)
  total = parts[0] + (parts[1] << 8) + (parts[2] << 16) + (1 << (_PRECISION_BITS - 1))
  return jnp.clip(total >> _PRECISION_BITS, 0, 255).astype(jnp.uint8)


def _normalize(x, mean, std):
  return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
