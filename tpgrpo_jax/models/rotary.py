"""Rotary positions on several axes (RoPE, arXiv 2104.09864); neighbouring channels turn in pairs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import layers


def grid(height: int, width: int, first: int = 0) -> np.ndarray:
  """The ids (first, row, column) of image tokens, row by row: [height width, 3]."""
  ids = np.stack(np.broadcast_arrays(first, *np.ogrid[:height, :width]), axis=-1)
  return ids.reshape(-1, 3)


def is_axis(channels: object) -> bool:
  """Whether an axis can have so many channels of a head: an even number above 0."""
  return isinstance(channels, int) and channels > 0 and channels % 2 == 0


def tables(ids: np.ndarray, axes: Sequence[int], theta: float) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and signed sine of every token's rotation angles.

  Id p of an axis with d channels turns its channels 2i and 2i + 1 by p / theta^(2i / d).

  Args:
    ids: [N, A], a place on each of A axes.
    axes: channels of a head for each of them, all even.
    theta: base of the frequencies.

  Returns:
    Two [N, head_dim] float32, of float64 angles; the sines of channels 2i are negative.
  """
  frequencies = [theta ** -(np.arange(0, dim, 2) / dim) for dim in axes]
  angle = np.concatenate([ids[:, i, None] * f for i, f in enumerate(frequencies)], axis=-1)
  cos, sin = np.cos(angle), np.sin(angle)
  pair = lambda a, b: np.stack([a, b], axis=-1).reshape(len(ids), -1).astype(np.float32)
  return pair(cos, cos), pair(-sin, sin)


def _turn(x, cos, sin):
  """Elementwise but for a flip of pairs, so that XLA makes one loop of it, and rounds alike, anywhere."""
  partner = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
  cos, sin = cos[..., None, :], sin[..., None, :]
  return (x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin).astype(x.dtype)


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns channels 2i and 2i + 1 of x [B, N, heads, head_dim], in float32, as `tables` say.

  Args:
    x: queries or keys.
    cos: [N, head_dim], or [B, N, head_dim] where samples have places of their own.
    sin: likewise.
  """
  return layers.fence(_turn(x, cos, sin))


def _rotate_forward(x, cos, sin):
  return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(residuals, dy):
  cos, sin = residuals
  return _turn(layers.fence(dy), cos, -sin), None, None


rotate.defvjp(_rotate_forward, _rotate_backward)
