"""The Qwen3 decoder (arXiv 2505.09388) as an encoder of prompts, as transformers' Qwen3Model.

What diffusion models read of it are the states between its layers: FLUX.2-klein those after 9, 18 and 27
layers side by side, Z-Image those after all layers but the last. So there is neither a final norm nor a
head, and layers after the last state asked for are not even loaded. Layers are stacked along a leading axis
and scanned.
"""

from collections.abc import Mapping
import dataclasses
import functools
import sys
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import encoder_layers, layers
from tpgrpo_jax.models.t5 import RMSNorm

# What transformers offers and this module does not: field -> the one value it knows.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
_ROPE_SCALING = ("default", None)  # kinds that leave the angles alone


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
  """Sizes, under the names and with the defaults of transformers' config.json.

  Attributes:
    num_key_value_heads: heads of keys and values; each serves as many heads of queries.
    head_dim: of a head; heads x head_dim need not be hidden_size.
    rope_theta: base of the rotary frequencies.
  """

  vocab_size: int = 151936
  hidden_size: int = 4096
  intermediate_size: int = 22016
  num_hidden_layers: int = 32
  num_attention_heads: int = 32
  num_key_value_heads: int = 32
  head_dim: int = 128
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0

  def __post_init__(self):
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_key_value_heads={self.num_key_value_heads}: must divide num_attention_heads="
        f"{self.num_attention_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim}: must be even; its channels turn in pairs.")

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "Qwen3Config":
    """Reads config.json of a Qwen3Model or Qwen3ForCausalLM, of transformers 4 or 5.

    Raises:
      ValueError: a config of another kind of model, or a choice that is not known here.
    """
    found = config.get("model_type", "qwen3")
    if found != "qwen3":
      raise ValueError(f"model_type={found!r}: must be 'qwen3'.")
    for field, value in _FIXED.items():
      if config.get(field, value) != value:
        raise ValueError(f"{field}={config[field]!r}: must be {value!r}; no other kind is known.")
    names = {f.name for f in dataclasses.fields(cls)}
    known: dict[str, Any] = {k: v for k, v in config.items() if k in names}
    known["rope_theta"] = _read_theta(config, cls.rope_theta)
    return cls(**known)


def _read_theta(config, default):
  """The base of the rotary frequencies, wherever it is, if they are not scaled."""
  # transformers 5 keeps theta among rope_parameters; 4 had a field for it, and rope_scaling.
  for field in ("rope_parameters", "rope_scaling"):
    rope = config.get(field)
    if rope is not None:
      break
  else:
    rope = {}
  if not isinstance(rope, Mapping):
    raise ValueError(f"{field}={rope!r}: must be an object or null. Fetch the file again.")
  if rope.get("rope_type", rope.get("type")) not in _ROPE_SCALING:
    raise ValueError(f"{field}={rope!r}: must be of rope_type 'default'; no other is known.")
  theta = rope.get("rope_theta", config.get("rope_theta", default))
  if type(theta) not in (int, float) or not 0 < theta <= sys.float_info.max:
    raise ValueError(
      f"rope_theta={theta!r}: must be a finite number above 0. Fetch the file again."
    )
  return float(theta)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
  """Cosine and sine of the rotation angles (arXiv 2104.09864), [length, head_dim / 2] float32 each.

  Place p turns channels i and i + head_dim / 2 by p / theta^(2i / head_dim).
  """
  frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  angle = np.arange(length)[:, None] * frequencies
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns channel i with channel i + D / 2 of x [B, L, heads, D], in float32."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, None], sin[:, None]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class SelfAttention(nnx.Module):
  """Causal attention whose keys and values serve several heads of queries; q and k are normed."""

  def __init__(self, config: Qwen3Config, *, dtype, rngs):
    linear = functools.partial(encoder_layers.Projection, dtype=dtype, rngs=rngs)
    norm = functools.partial(RMSNorm, config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
    width, dim = config.hidden_size, config.head_dim
    self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
    self.to_q, self.norm_q = linear(width, self.heads * dim), norm()
    self.to_k, self.norm_k = linear(width, self.kv_heads * dim), norm()
    self.to_v = linear(width, self.kv_heads * dim)
    self.to_out = linear(self.heads * dim, width, out_dtype=jnp.float32)

  def __call__(self, x, rotation, bias):
    q = encoder_layers.split_heads(self.to_q(x), self.heads)
    k = encoder_layers.split_heads(self.to_k(x), self.kv_heads)
    v = encoder_layers.split_heads(self.to_v(x), self.kv_heads)
    q, k = rotate(self.norm_q(q), *rotation), rotate(self.norm_k(k), *rotation)
    k, v = (jnp.repeat(a, self.heads // self.kv_heads, axis=2) for a in (k, v))
    y = encoder_layers.attention(q, k, v, scale=q.shape[-1] ** -0.5, bias=bias)
    return layers.lay_out(self.to_out(y))


class FeedForward(nnx.Module):
  """(silu(x W_gate) * (x W_up)) W_down."""

  def __init__(self, config: Qwen3Config, *, dtype, rngs):
    linear = functools.partial(encoder_layers.Projection, dtype=dtype, rngs=rngs)
    width, hidden = config.hidden_size, config.intermediate_size
    self.gate_proj, self.up_proj = linear(width, hidden), linear(width, hidden)
    self.down_proj = linear(hidden, width, out_dtype=jnp.float32)

  def __call__(self, x):
    gate, value = (w(x).astype(jnp.float32) for w in (self.gate_proj, self.up_proj))
    hidden = layers.lay_out(jax.nn.silu(gate) * value, tensor=2)
    return layers.lay_out(self.down_proj(hidden))


class Block(nnx.Module):
  """A pre-norm block whose residual stream is float32."""

  def __init__(self, config: Qwen3Config, *, dtype, rngs):
    norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
    self.attention_norm, self.attention = norm(), SelfAttention(config, dtype=dtype, rngs=rngs)
    self.mlp_norm, self.mlp = norm(), FeedForward(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, rotation, bias):
    x = layers.fence(x + self.attention(self.attention_norm(x), rotation, bias))
    return layers.fence(x + self.mlp(self.mlp_norm(x)))


class Qwen3Encoder(nnx.Module):
  """(ids [B, L], length [B]) -> the states after some of the layers side by side, [B, L, S D].

  A token sees itself and those before it. Those from `length` on are padding that no other sees; their
  states are computed all the same, as FLUX.2 reads them. `dtype` is that of the matrix products' terms and
  of the result; the residual stream is float32.

  Attributes:
    states: ascending; the state after so many layers, 1 ... num_hidden_layers - 1. Of the last layer
      transformers gives the normed one, which is not made here.
  """

  def __init__(
    self, config: Qwen3Config, states: tuple[int, ...], *, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.config, self.states, self.dtype = config, states, dtype
    shape = (config.vocab_size, config.hidden_size)
    self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), shape))
    create = lambda rngs: Block(config, dtype=dtype, rngs=rngs)
    self.blocks_0 = encoder_layers.stack(create, states[-1], rngs)

  def __call__(self, ids, length):
    config = self.config
    x = encoder_layers.embed_tokens(self.token_embedding[...].astype(self.dtype), ids)
    x = x.astype(jnp.float32)
    tables = rotary_tables(ids.shape[1], config.head_dim, config.rope_theta)
    rotation = tuple(jnp.asarray(table) for table in tables)
    is_padding = jnp.arange(ids.shape[1]) >= length[:, None]
    bias = encoder_layers.causal_bias(ids.shape[1]) + jnp.where(
      is_padding[:, None, None], -jnp.inf, 0.0
    )
    graphdef, weights = nnx.split(self.blocks_0)
    # Where the state after each layer goes; those that nobody asked for overwrite a place at the end.
    place = np.full(self.states[-1], len(self.states), np.int32)
    place[np.asarray(self.states) - 1] = np.arange(len(self.states))

    def body(carry, layer):
      x, kept = carry
      weights, where = layer
      x = nnx.merge(graphdef, weights)(x, rotation, bias)
      kept = jax.lax.dynamic_update_index_in_dim(kept, x.astype(self.dtype), where, 2)
      return (x, layers.lay_out(kept)), None

    b, tokens, width = x.shape
    kept = layers.lay_out(jnp.zeros((b, tokens, len(self.states) + 1, width), self.dtype))
    (_, kept), _ = jax.lax.scan(body, (x, kept), (weights, place))
    return layers.lay_out(kept[:, :, :-1].reshape(b, tokens, -1))
