"""The FLUX.2 flow transformer, as diffusers' Flux2Transformer2DModel.

The blocks are FLUX.1's without biases, with four differences. Shift, scale and gate are computed once, and
all blocks of a kind share them. Feed-forwards are gated (SwiGLU, the gate first). A single block has one
projection into queries, keys, values and hidden units, and one out of them. Text tokens have places of their
own, on a fourth axis. Attributes carry diffusers' names, so that models/hf/flux2.py maps weights by one short
table. The autoencoder packs its latents itself: a token is one latent.
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

from tpgrpo_jax.models import flux, layers, mmdit, rotary

# What diffusers offers and this module does not: field -> the one value it knows.
_FIXED = {"patch_size": 1, "timestep_guidance_channels": layers.TIMESTEP_DIM, "eps": layers.EPS}
SIDE = 64  # latents of 16 pixels, as diffusers' pipeline has it


@dataclasses.dataclass(frozen=True)
class Flux2Config:
  """Sizes, under the names of diffusers' config.json; the defaults are FLUX.2-dev's, as there.

  Attributes:
    in_channels: of a token, which is a latent.
    out_channels: of a token of the velocity.
    num_layers: double blocks.
    num_single_layers: single blocks.
    joint_attention_dim: of a text token.
    mlp_ratio: hidden units of a feed-forward, in widths.
    axes_dims_rope: channels of a head that rotate with the picture's number (always 0), row, column, and
      with the place in the text.
    rope_theta: base of the rotary frequencies.
    guidance_embeds: the guidance scale is an input (dev), or there is none (klein).
  """

  in_channels: int = 128
  out_channels: int = 128
  num_layers: int = 8
  num_single_layers: int = 48
  attention_head_dim: int = 128
  num_attention_heads: int = 48
  joint_attention_dim: int = 15360
  mlp_ratio: float = 3.0
  axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
  rope_theta: int = 2000
  guidance_embeds: bool = True

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  @property
  def hidden(self) -> int:
    """Units of a feed-forward."""
    return int(self.width * self.mlp_ratio)

  @property
  def latents(self) -> layers.Latents:
    return layers.Latents(self.in_channels, 1, SIDE)

  def __post_init__(self):
    for name in ("num_layers", "num_single_layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
    if not 0 < self.mlp_ratio < math.inf:
      raise ValueError(f"mlp_ratio={self.mlp_ratio}: must be above 0, and finite.")
    axes = self.axes_dims_rope
    if not (
      len(axes) == 4 and all(map(rotary.is_axis, axes)) and sum(axes) == self.attention_head_dim
    ):
      raise ValueError(
        f"axes_dims_rope={axes}: must be four even numbers that add up to "
        f"attention_head_dim={self.attention_head_dim}."
      )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "Flux2Config":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(k for k in config if k[0] != "_" and k not in names | _FIXED.keys())
    if unknown:
      raise ValueError(f"{', '.join(unknown)}: not fields of Flux2Transformer2DModel.")
    for field, value in _FIXED.items():
      if config.get(field, value) != value:
        raise ValueError(f"{field}={config[field]!r}: must be {value!r}; no other is known.")
    known = {k: v for k, v in config.items() if k in names}
    known["axes_dims_rope"] = tuple(known.get("axes_dims_rope", cls.axes_dims_rope))
    if known.get("out_channels") is None:
      known["out_channels"] = known.get("in_channels", cls.in_channels)
    return cls(**known)


def rotary_tables(
  config: Flux2Config, tokens: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
  """`rotary.tables` of text tokens (0, 0, 0, place), then of image tokens (0, row, column, 0)."""
  ids = np.zeros((tokens + height * width, 4))
  ids[:tokens, 3] = np.arange(tokens)
  ids[tokens:, :3] = rotary.grid(height, width)
  return rotary.tables(ids, config.axes_dims_rope, config.rope_theta)


class FeedForward(nnx.Module):
  """(silu(gate) * value) W_out, where one projection makes gate and value, side by side."""

  def __init__(self, config: Flux2Config, *, dtype, rngs):
    linear = functools.partial(layers.Linear, dtype=dtype, rngs=rngs, use_bias=False)
    self.linear_in = linear(config.width, 2 * config.hidden)
    self.linear_out = linear(config.hidden, config.width)

  def __call__(self, x):
    # Gathered over "tensor", whose parts hold gates or values alone.
    gate, value = layers.fence(jnp.split(layers.lay_out(self.linear_in(x)), 2, axis=-1))
    return layers.lay_out(self.linear_out(layers.lay_out(layers.swiglu(gate, value), tensor=2)))


class DoubleBlock(nnx.Module):
  """Joint attention, then a feed-forward for each of the two streams."""

  def __init__(self, config: Flux2Config, *, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    self.attn = flux.JointAttention(config, use_bias=False, **kw)
    self.ff, self.ff_context = FeedForward(config, **kw), FeedForward(config, **kw)

  def __call__(self, x, context, modulation, rotation):
    (shift, scale, gate, *mlp), (c_shift, c_scale, c_gate, *c_mlp) = modulation
    y, c = layers.modulate(x, shift, scale), layers.modulate(context, c_shift, c_scale)
    y, c = self.attn(y, c, rotation)
    x = flux.feed_forward(self.ff, layers.gated_residual(x, gate, y), *mlp)
    context = flux.feed_forward(self.ff_context, layers.gated_residual(context, c_gate, c), *c_mlp)
    return x, context


class ParallelAttention(nnx.Module):
  """Attention and a gated feed-forward side by side, with one projection in and one out."""

  def __init__(self, config: Flux2Config, *, dtype, rngs):
    width, hidden = config.width, config.hidden
    linear = functools.partial(layers.Linear, dtype=dtype, rngs=rngs, use_bias=False)
    self.heads = config.num_attention_heads
    self.bounds = tuple(np.cumsum([width, width, width, hidden]).tolist())
    self.to_qkv_mlp_proj = linear(width, 3 * width + 2 * hidden)
    self.to_out = linear(width + hidden, width)
    self.norm_q = layers.RMSNorm(config.attention_head_dim, rngs=rngs)
    self.norm_k = layers.RMSNorm(config.attention_head_dim, rngs=rngs)

  def __call__(self, x, rotation):
    # The five parts are not the "tensor" axis's parts: they are gathered, and each divided for itself.
    parts = jnp.split(layers.lay_out(self.to_qkv_mlp_proj(x)), self.bounds, axis=-1)
    q, k, v, gate, value = layers.fence(parts)
    q, k, v = map(self._heads, (q, k, v))
    q, k = rotary.rotate(self.norm_q(q), *rotation), rotary.rotate(self.norm_k(k), *rotation)
    y = layers.lay_out(layers.attention(q, k, v), tensor=2)
    hidden = layers.lay_out(layers.swiglu(gate, value), tensor=2)
    both = layers.lay_out(jnp.concatenate([y.reshape(*y.shape[:2], -1), hidden], axis=-1))
    return layers.lay_out(self.to_out(layers.fence(both)))

  def _heads(self, x):
    return layers.lay_out(x.reshape(*x.shape[:2], self.heads, -1), tensor=2)


class SingleBlock(nnx.Module):
  """Attention and feed-forward side by side, over text and image as one stream."""

  def __init__(self, config: Flux2Config, *, dtype, rngs):
    self.attn = ParallelAttention(config, dtype=dtype, rngs=rngs)

  def __call__(self, x, modulation, rotation):
    shift, scale, gate = modulation
    y = self.attn(layers.modulate(x, shift, scale), rotation)
    return (layers.gated_residual(x, gate, y),)


class Flux2(nnx.Module):
  """velocity = Flux2(x [B, h, w, c], sigma [B], text [R, L, E]) -> [B, h, w, c] float32.

  R divides B: as many neighbours share a text, which is embedded once for them.
  Computes in `dtype` from its own door on, but the angles of sigma and guidance, which are float32.

  Attributes:
    guidance: the scale that a model with guidance_embeds (FLUX.2-dev) is told, unless a call says
      otherwise. None for FLUX.2-klein, which has no such input.
  """

  def __init__(
    self,
    config: Flux2Config,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    guidance: float | None = None,
    rngs: nnx.Rngs,
  ):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype, self.remat, self.guidance = config, dtype, remat, guidance
    flux.check_guidance(config, guidance, wanted=False)
    linear = functools.partial(layers.Linear, use_bias=False, **kw)
    mlp = functools.partial(layers.MLP, activation=layers.silu, use_bias=False, **kw)
    norm = functools.partial(mmdit.AdaNorm, width, use_bias=False, **kw)
    self.timestep_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    if config.guidance_embeds:
      self.guidance_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    self.double_stream_modulation_img = norm(6)
    self.double_stream_modulation_txt = norm(6)
    self.single_stream_modulation = norm(3)
    self.x_embedder = linear(config.in_channels, width)
    self.context_embedder = linear(config.joint_attention_dim, width)
    block, single = functools.partial(DoubleBlock, config), functools.partial(SingleBlock, config)
    self.transformer_blocks = mmdit.stack_blocks(block, config.num_layers, **kw)
    self.single_transformer_blocks = mmdit.stack_blocks(single, config.num_single_layers, **kw)
    self.norm_out = norm(2)
    self.proj_out = linear(width, config.out_channels, kernel_init=nnx.initializers.zeros_init())

  def __call__(self, x, sigma, text, guidance: jax.Array | float | None = None):
    """Velocity of x; `guidance`, a scalar or [B], takes the place of the model's own.

    Raises:
      ValueError: channels other than the config's, a guidance scale that is missing or that the model
        cannot be told.
    """
    b, height, width, c = x.shape
    if c != self.config.in_channels:
      raise ValueError(f"latent of {c} channels: must be in_channels={self.config.in_channels}.")
    tokens = text.shape[1]
    conditioning = self._conditioning(sigma, self.guidance if guidance is None else guidance)
    tables = rotary_tables(self.config, tokens, height, width)
    rotation = tuple(jnp.asarray(table) for table in tables)
    double = self.double_stream_modulation_img, self.double_stream_modulation_txt
    double = tuple(tuple(modulate(conditioning)) for modulate in double)
    single = tuple(self.single_stream_modulation(conditioning))
    x = layers.lay_out(self.x_embedder(layers.fence(x.astype(self.dtype).reshape(b, -1, c))))
    streams = x, layers.lay_out(layers.per_sample(self.context_embedder(text), x))
    scan = functools.partial(mmdit.scan_blocks, remat=self.remat)
    x, context = scan(self.transformer_blocks, streams, double, rotation)
    x = layers.lay_out(layers.fence(jnp.concatenate([context, x], axis=1)))
    (x,) = scan(self.single_transformer_blocks, (x,), single, rotation)
    x = layers.lay_out(layers.fence(x[:, tokens:]))
    scale, shift = self.norm_out(conditioning)
    x = self.proj_out(layers.modulate(x, shift, scale))
    return layers.fence(x.reshape(b, height, width, -1).astype(jnp.float32))

  def _conditioning(self, sigma, guidance):
    """[B, D] from time and guidance."""
    flux.check_guidance(self.config, guidance, wanted=True)
    vector = self.timestep_embedder(layers.timestep_embedding(sigma).astype(self.dtype))
    if not self.config.guidance_embeds:
      return vector
    return layers.fence(vector + flux.tell(self.guidance_embedder, guidance, sigma, self.dtype))
