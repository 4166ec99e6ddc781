"""The layers that the encoders of text and images are made of, beside those of layers.py.

Encoders are never trained here, so nothing has a hand-written backward pass.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import layers

ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
}
"""The activations under transformers' names; "gelu" is the exact one, "gelu_new" has the tanh."""


class Projection(nnx.Module):
  """y = x kernel on the last axis, without a bias; the output is in `out_dtype`, else in `dtype`."""

  def __init__(self, d_in, d_out, *, dtype, rngs, out_dtype=None):
    self.dtype, self.out_dtype = dtype, out_dtype or dtype
    init = nnx.initializers.xavier_uniform()
    self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))

  def __call__(self, x):
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    return layers.fence(jnp.matmul(x, kernel, preferred_element_type=self.out_dtype))


class LayerNorm(nnx.Module):
  """(x - mean) / std * scale + bias over the last axis, in float32; the output is in `dtype`."""

  def __init__(self, dim, *, eps, dtype):
    self.eps, self.dtype = eps, dtype
    self.scale, self.bias = nnx.Param(jnp.ones((dim,))), nnx.Param(jnp.zeros((dim,)))

  def __call__(self, x):
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return layers.fence((x * self.scale[...] + self.bias[...]).astype(self.dtype))


def embed_tokens(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of table [V, D] at ids [B, L] -> [B, L, D]; ids must be below V."""
  return layers.lay_out(jnp.take(table, ids, axis=0))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
  """[B, N, heads * head_dim] -> [B, N, heads, head_dim]."""
  return layers.lay_out(x.reshape(*x.shape[:2], heads, -1), tensor=2)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, bias: jax.Array | None = None
) -> jax.Array:
  """softmax(scale q k^T + bias) v, the softmax in float32, by plain XLA on every backend.

  Args:
    q: [B, N, heads, head_dim], as k and v.
    k: keys.
    v: values.
    scale: of the logits.
    bias: broadcastable against [B, heads, N, N], -inf where nothing may be seen.

  Returns:
    [B, N, heads * head_dim].
  """
  logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
  logits = logits if bias is None else logits + bias
  p = jax.nn.softmax(logits).astype(v.dtype)
  y = layers.lay_out(jnp.einsum("bhqk,bkhd->bqhd", p, v), tensor=2)
  return layers.fence(y.reshape(*y.shape[:2], -1))


def causal_bias(length: int) -> jax.Array:
  """0 where a token may look (itself and those before it), -inf elsewhere; [length, length]."""
  return jnp.where(jnp.tri(length, dtype=bool), 0.0, -jnp.inf)


def stack(create: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
  """`count` equal blocks, their weights stacked along a leading axis."""

  @nnx.split_rngs(splits=count)
  @nnx.vmap(in_axes=0, out_axes=0)
  def blocks(rngs):
    return create(rngs)

  return blocks(rngs)


def scan(
  blocks: nnx.Module, x: jax.Array, *inputs: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """Applies stacked blocks in turn.

  Args:
    blocks: as `stack` returns them; each is called as block(x, *inputs).
    x: [B, N, D].
    *inputs: the same for every block.

  Returns:
    (the last block's output, its input).
  """
  graphdef, weights = nnx.split(blocks)

  def body(carry, weights):
    x, _ = carry
    return (nnx.merge(graphdef, weights)(x, *inputs), x), None

  (x, before), _ = jax.lax.scan(body, (x, x), weights)
  return x, before
