"""Full attention on TPU by the Pallas kernel that ships with JAX (splash attention)."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

LANES = 128  # tokens, of which keys come in multiples
SUBLANES = 16  # and queries in these, in bfloat16; the backward pass has them in LANES too
TILE = (
  2**19
)  # logits of a block; the backward pass holds three float32 ones, 6 of the 16 MiB of VMEM
STEP = 2**17  # logits that take as long as a step of the grid costs beside them, some .35 us


class Blocks(NamedTuple):
  """How attention is cut.

  Attributes:
    tokens: with those that pad them.
    queries: of a block; divides the tokens.
    keys: likewise.
    queries_back: likewise, of the backward pass.
  """

  tokens: int
  queries: int
  keys: int
  queries_back: int


@functools.cache
def choose_blocks(tokens: int) -> Blocks:
  """The blocks that should take the least time; reckoned, not measured.

  Padding costs logits, quadratically, and small blocks cost steps of the grid. Blocks must divide the tokens,
  so a few tokens more may allow larger ones. The size of a head plays no part: up to 128, the depth of the
  matrix units, all take them as long.

  | tokens | padded | queries x keys | who |
  | ------ | ------ | -------------- | --- |
  | 1357   | 1408   | 352 x 1408, backward 128 x 1408 | SD3.5 at 512 x 512, 333 of text |
  | 1536   | 1536   | 768 x 512      | FLUX.1 at 512 x 512, 512 of text |
  | 1280   | 1280   | 640 x 640      | Z-Image at 512 x 512, 256 of text |
  """

  def time(blocks):
    logits = blocks.tokens**2
    steps = [logits / (queries * blocks.keys) for queries in (blocks.queries, blocks.queries_back)]
    return logits + STEP * sum(steps) / 2, abs(blocks.queries - blocks.keys)

  first = -(-tokens // LANES) * LANES
  padded = range(first, first + 4 * LANES, LANES)
  return min(itertools.chain.from_iterable(map(_fitting, padded)), key=time)


def _fitting(tokens):
  """The Blocks of so many tokens: for each number of keys as many queries as TILE allows."""
  divisors = lambda of, most: [n for n in range(of, most + 1, of) if tokens % n == 0]
  for keys in divisors(LANES, min(tokens, TILE // LANES)):
    widest = min(tokens, TILE // keys)
    yield Blocks(tokens, max(divisors(SUBLANES, widest)), keys, max(divisors(LANES, widest)))


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
  padded, queries, keys, queries_back = choose_blocks(tokens)
  pad = padded - tokens
  sizes = splash_attention.BlockSizes(
    block_q=queries, block_kv=keys, block_kv_compute=keys, block_q_dq=queries_back, block_kv_dq=keys,
    block_q_dkv=queries_back, block_kv_dkv=keys, block_kv_dkv_compute=keys,
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
