"""Frozen weights in eight or four bits, which a layer multiplies in its compute dtype."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tpgrpo_jax.models import layers

BLOCK = 64  # rows that share a scale in nf4, as in QLoRA
# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E): quantiles of N(0, 1), scaled to [-1, 1].
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A matrix in place of a kernel; all that a layer asks of one is `[...]` and `astype`.

  Attributes:
    codes: [..., D, F] int8, or uint4 indices into NF4.
    scale: [..., D / block, F] float32; a block of rows of a column has one.
  """

  codes: jax.Array
  scale: jax.Array

  def __getitem__(self, index):
    assert index is Ellipsis  # the whole matrix: blocks of a stack are taken apart by jax.lax.scan
    return self

  def astype(self, dtype: Any) -> jax.Array:
    """The matrix [..., D, F], its products with the scale rounded once to `dtype`."""
    levels = jnp.asarray(NF4)[self.codes] if self.codes.dtype == jnp.uint4 else self.codes
    blocks = _in_blocks(levels.astype(jnp.float32), self.scale.shape[-2])
    matrix = (blocks * self.scale[..., None, :]).reshape(self.codes.shape)
    return layers.fence(matrix.astype(dtype))


def quantize(params: Any, kind: str) -> Any:
  """The same weights, with the kernels of all stacked blocks quantised and the others as they are.

  int8: codes are w / scale, rounded; scale = max |w| / 127 of each output channel. nf4: the nearest of
  16 levels; scale = max |w| of each block of 64 inputs of an output channel. With jax.checkpoint around
  the blocks (remat "full") a kernel in the compute dtype lives as long as its block is at work; without,
  the backward pass keeps them all.

  Args:
    params: the frozen weights, a nested dict of arrays on the devices, or of shapes for shapes in
      return; kernels of stacks are [blocks, D, F]. Arrays that are quantised are deleted one by one,
      so that memory never holds both trees.
    kind: "int8" or "nf4".

  Returns:
    The tree for the same graphdef, with a `Quantized` for each kernel, laid out as the kernel was.

  Raises:
    ValueError: an unknown kind, no such kernel, or an nf4 kernel whose D is no multiple of 64.
  """
  if kind not in _KINDS:
    raise ValueError(f"model.quantize={kind!r}: must be '' or one of {', '.join(_KINDS)}.")
  if not any(map(_is_stacked_kernel, *zip(*jax.tree.leaves_with_path(params)))):
    raise ValueError(
      f"model.quantize={kind!r}: no frozen kernel of a stack of blocks. Only weights that are not "
      "trained can be quantised: set lora.rank above 0."
    )
  convert = lambda path, w: _convert(path, w, kind) if _is_stacked_kernel(path, w) else w
  return jax.tree_util.tree_map_with_path(convert, params)


def _is_stacked_kernel(path, leaf):
  return path[-1].key == "kernel" and leaf.ndim == 3


def _convert(path, kernel, kind):
  rows = kernel.shape[-2]
  if kind == "nf4" and rows % BLOCK:
    name = ".".join(str(k.key) for k in path)
    raise ValueError(
      f"model.quantize='nf4': {name} has {rows} rows, no multiple of {BLOCK}. Use int8."
    )
  convert = functools.partial(jax.lax.map, _KINDS[kind])  # a block at a time
  if isinstance(kernel, jax.ShapeDtypeStruct):
    shapes = jax.eval_shape(convert, kernel)
    return Quantized(shapes.codes.update(sharding=kernel.sharding), shapes.scale)
  # The codes lie as the kernel does; XLA carries its layout over to the scales.
  layout: Any = kernel.sharding, None
  result = jax.jit(convert, out_shardings=Quantized(*layout))(kernel)
  kernel.delete()
  return result


def _in_blocks(matrix, count):
  """[..., D, F] -> [..., count, D / count, F]."""
  return matrix.reshape(*matrix.shape[:-2], count, -1, matrix.shape[-1])


def _int8(kernel):
  w = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127
  codes = jnp.round(w / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
  return Quantized(codes, scale)


def _nf4(kernel):
  blocks = _in_blocks(kernel.astype(jnp.float32), kernel.shape[-2] // BLOCK)
  scale = jnp.max(jnp.abs(blocks), axis=-2)
  levels = jnp.asarray(NF4)
  between = (levels[1:] + levels[:-1]) / 2
  codes = jnp.searchsorted(between, blocks / jnp.where(scale == 0, 1, scale)[..., None, :])
  return Quantized(codes.reshape(kernel.shape).astype(jnp.uint4), scale)


_KINDS = {"int8": _int8, "nf4": _nf4}
