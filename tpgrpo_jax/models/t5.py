"""The T5 v1.1 encoder (arXiv 1910.10683, 2002.05202), as transformers' T5EncoderModel.

Every token attends to every other, padding included: diffusers passes no mask. Blocks are stacked along
a leading axis and scanned.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import encoder_layers, layers


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes, under the names and with the defaults of transformers' config.json."""

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  layer_norm_epsilon: float = 1e-6
  feed_forward_proj: str = "relu"

  def __post_init__(self):
    if self.feed_forward_proj != "gated-gelu":
      raise ValueError(
        f"feed_forward_proj={self.feed_forward_proj!r}: must be 'gated-gelu', as in T5 v1.1."
      )

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "T5Config":
    """Reads config.json of a T5EncoderModel.

    Raises:
      ValueError: a config of another kind of model.
    """
    found = config.get("model_type", "t5")
    if found != "t5":
      raise ValueError(f"model_type={found!r}: must be 't5'.")
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in config.items() if k in names})


def relative_buckets(length: int, *, buckets: int, max_distance: int) -> np.ndarray:
  """Which learned bias a pair of places shares, int32 [query, key] (the paper's section 2.1).

  Half of the buckets are for keys after the query. Of each half, one half counts single places and
  the other grows geometrically up to max_distance, where the last bucket holds all the rest.
  """
  place = np.arange(length)
  offset = place[None, :] - place[:, None]
  half = buckets // 2
  exact = half // 2
  distance = np.abs(offset)
  # float32, as in the reference: the rounding decides at the borders of the buckets.
  ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
  ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
  far = np.minimum(exact + ratio.astype(np.int32), half - 1)
  return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis, in float32; the output is in `dtype`."""

  def __init__(self, dim, *, eps, dtype):
    self.eps, self.dtype = eps, dtype
    self.scale = nnx.Param(jnp.ones((dim,)))

  def __call__(self, x):
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return layers.fence((x * self.scale[...]).astype(self.dtype))


class SelfAttention(nnx.Module):
  """Multi-head attention with a bias for the relative place, and logits that are not scaled."""

  def __init__(self, config: T5Config, *, dtype, rngs):
    inner = config.num_heads * config.d_kv
    linear = functools.partial(encoder_layers.Projection, dtype=dtype, rngs=rngs)
    self.heads = config.num_heads
    self.to_q, self.to_k, self.to_v = (linear(config.d_model, inner) for _ in range(3))
    self.to_out = linear(inner, config.d_model, out_dtype=jnp.float32)

  def __call__(self, x, bias):
    q, k, v = (
      encoder_layers.split_heads(project(x), self.heads)
      for project in (self.to_q, self.to_k, self.to_v)
    )
    y = encoder_layers.attention(q, k, v, scale=1.0, bias=bias)
    return layers.lay_out(self.to_out(y))


class FeedForward(nnx.Module):
  """(gelu(x W_0) * (x W_1)) W_o."""

  def __init__(self, config: T5Config, *, dtype, rngs):
    linear = functools.partial(encoder_layers.Projection, dtype=dtype, rngs=rngs)
    self.wi_0, self.wi_1 = linear(config.d_model, config.d_ff), linear(config.d_model, config.d_ff)
    self.wo = linear(config.d_ff, config.d_model, out_dtype=jnp.float32)

  def __call__(self, x):
    gate, value = (w(x).astype(jnp.float32) for w in (self.wi_0, self.wi_1))
    hidden = encoder_layers.ACTIVATIONS["gelu_new"](gate) * value
    return layers.lay_out(self.wo(layers.lay_out(hidden, tensor=2)))


class Block(nnx.Module):
  """A pre-norm block whose residual stream is float32."""

  def __init__(self, config: T5Config, *, dtype, rngs):
    norm = functools.partial(RMSNorm, config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)
    self.attention_norm, self.attention = norm(), SelfAttention(config, dtype=dtype, rngs=rngs)
    self.ff_norm, self.ff = norm(), FeedForward(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, bias):
    x = layers.fence(x + self.attention(self.attention_norm(x), bias))
    return layers.fence(x + self.ff(self.ff_norm(x)))


class T5Encoder(nnx.Module):
  """ids [B, L] -> last hidden state [B, L, D] in `dtype`.

  `dtype` is that of the matrix products' terms. Their sums that go to the residual stream, and the
  stream itself, are float32, as T5's activations grow far beyond float16 and lose digits in bfloat16
  (which is why transformers keeps `wo` in float32 beside float16; bfloat16 has float32's range).
  """

  def __init__(self, config: T5Config, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    draw = lambda *shape: nnx.Param(jax.random.normal(rngs.params(), shape))
    self.token_embedding = draw(config.vocab_size, config.d_model)
    self.relative_bias = draw(config.relative_attention_num_buckets, config.num_heads)
    create = lambda rngs: Block(config, dtype=dtype, rngs=rngs)
    self.blocks_0 = encoder_layers.stack(create, config.num_layers, rngs)
    self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon, dtype=dtype)

  def __call__(self, ids):
    config = self.config
    x = encoder_layers.embed_tokens(self.token_embedding[...].astype(self.dtype), ids)
    buckets = relative_buckets(
      ids.shape[1],
      buckets=config.relative_attention_num_buckets,
      max_distance=config.relative_attention_max_distance,
    )
    bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)
    x, _ = encoder_layers.scan(self.blocks_0, x.astype(jnp.float32), bias)
    return layers.lay_out(self.final_layer_norm(x))
