"""Full attention on TPU by the Pallas kernel that ships with JAX (splash attention)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

BLOCKS = (512, 384, 256)  # tokens; three 512 x 512 float32 tiles of logits fit the 16 MiB of VMEM


def block_size(tokens: int) -> int:
  """The block that pads the fewest tokens, the largest of equals: 512 for 1024 + 333 tokens."""
  return min(BLOCKS, key=lambda block: -tokens % block)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  spec: P | None,
  length: jax.Array | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Softmax attention over all tokens, or each sample's first; all are [B, N, heads, head_dim].

  The kernel wants whole blocks: q, k and v are padded with tokens of a segment of their own, which
  the others do not attend to, so the result is that of the N tokens alone. The partitioner cannot
  look into a kernel: on a mesh every device runs it on its own samples and heads, by shard_map.

  Args:
    q: queries.
    k: keys.
    v: values.
    spec: how the mesh divides all three and the result along samples and heads; None without a mesh.
    length: [B] int32, how many keys of each sample are seen; None for all.
    interpret: runs the kernel's program as XLA operations, on any device; for tests.

  Raises:
    ValueError: a batch that the mesh does not divide.
  """
  local = functools.partial(_attention, interpret=interpret)
  inputs = (q, k, v) if length is None else (q, k, v, length)
  if spec is not None:
    specs = (spec,) * 3 if length is None else (spec,) * 3 + (P(spec[0]),)
    mesh = jax.sharding.get_abstract_mesh()
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)  # those that divide x still
    local = jax.shard_map(local, in_specs=specs, out_specs=spec, axis_names=axes, check_vma=False)
  return local(*inputs)


def _attention(q, k, v, length=None, *, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention

  tokens, heads, head_dim = q.shape[1:]
  block = block_size(tokens)
  pad = -tokens % block
  sizes = splash_attention.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
  )  # fmt: skip
  mask = splash_attention.FullMask((tokens + pad,) * 2)
  kernel: Any = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=sizes,
    interpret=interpret,
  )
  segments: Any = None
  axis: Any = None
  if pad or length is not None:
    place = jnp.arange(tokens + pad)
    segment = keys = (place >= tokens).astype(jnp.int32)
    if length is not None:
      keys, axis = (place >= length[:, None]).astype(jnp.int32), 0
    segments = (segment, keys)
    axis = (None, axis)
  whole = lambda a: jnp.pad(a.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0)))
  scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)  # the kernel does not scale

  def run(q, k, v, segments):
    ids = None if segments is None else splash_attention.SegmentIds(*segments)
    return kernel(q, k, v, segment_ids=ids)

  batched: Any = jax.vmap(run, in_axes=(0, 0, 0, axis))
  y = batched(*map(whole, (scaled, k, v)), segments)
  return y[:, :, :tokens].swapaxes(1, 2)
