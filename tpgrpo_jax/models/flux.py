"""The FLUX.1 flow transformer, as diffusers' FluxTransformer2DModel.

Double blocks keep the text and the image apart but for a joint attention; single blocks run attention
and feed-forward side by side over both. Attributes carry diffusers' names, so that models/hf/flux.py maps
weights by one short table. The blocks of either kind are stacked along a leading axis and scanned.
Latents come and go unpacked, as those of the SD3 family do. FLUX.1-Kontext is the same network: it reads
the latents of a picture behind those that it denoises.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import adapter_layers, layers, mmdit, rotary

PACK = 2  # a token is PACK x PACK latent pixels
THETA = 10000
SIDE = 128  # latents, as diffusers' FluxPipeline has it


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """Sizes, under the names of diffusers' config.json.

  Attributes:
    patch_size: 1; a token is a packed square of 2 x 2 latent pixels.
    in_channels: of a token: four times the latent's.
    out_channels: of a token of the velocity.
    num_layers: double blocks.
    num_single_layers: single blocks.
    guidance_embeds: the guidance scale is an input (dev), or there is none (schnell).
    axes_dims_rope: channels of a head that rotate with the text position (always 0), row and column.
  """

  patch_size: int = 1
  in_channels: int = 64
  out_channels: int = 64
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  @property
  def latents(self) -> layers.Latents:
    return layers.Latents(self.in_channels // PACK**2, PACK, SIDE)

  def __post_init__(self):
    if self.patch_size != 1:
      raise ValueError(f"patch_size={self.patch_size}: must be 1; tokens are packed 2 x 2 squares.")
    for name in ("in_channels", "out_channels"):
      if getattr(self, name) % PACK**2:
        raise ValueError(
          f"{name}={getattr(self, name)}: must be a multiple of 4, the latent pixels of a token."
        )
    for name in ("num_layers", "num_single_layers"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
    axes = self.axes_dims_rope
    if len(axes) != 3 or any(n % 2 for n in axes) or sum(axes) != self.attention_head_dim:
      raise ValueError(
        f"axes_dims_rope={axes}: must be three even numbers that add up to "
        f"attention_head_dim={self.attention_head_dim}."
      )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "FluxConfig":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(k for k in config if not k.startswith("_") and k not in names)
    if unknown:
      raise ValueError(f"{', '.join(unknown)}: not fields of FluxTransformer2DModel.")
    known = {k: v for k, v in config.items() if k in names}
    known["axes_dims_rope"] = tuple(known.get("axes_dims_rope", cls.axes_dims_rope))
    if known.get("out_channels") is None:
      known["out_channels"] = known.get("in_channels", cls.in_channels)
    return cls(**known)


def pack_latents(x: jax.Array) -> jax.Array:
  """Latents [B, h, w, c] -> tokens [B, h w / 4, 4 c], ordered as FluxPipeline._pack_latents has them."""
  b, height, width, c = x.shape
  x = x.reshape(b, height // PACK, PACK, width // PACK, PACK, c).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(b, -1, c * PACK**2)


def unpack_latents(x: jax.Array, height: int, width: int) -> jax.Array:
  """The inverse of `pack_latents`: tokens [B, h w / 4, 4 c] -> latents [B, h, w, c]."""
  b, _, channels = x.shape
  x = x.reshape(b, height // PACK, width // PACK, channels // PACK**2, PACK, PACK)
  return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, -1)


def rotary_tables(
  axes: tuple[int, ...], tokens: int, height: int, width: int, edited: Sequence[int] = (0, 0)
) -> tuple[np.ndarray, np.ndarray]:
  """`rotary.tables` of text (0, 0, 0), then image (0, row, column), then edited tokens (1, row, column).

  Args:
    axes: channels of a head for each of the three ids.
    tokens: L of the text.
    height: rows of image tokens.
    width: columns of image tokens.
    edited: rows and columns of the tokens of the picture that is edited.

  Returns:
    Two [L + height width + those of `edited`, head_dim] float32.
  """
  grids = rotary.grid(height, width), rotary.grid(*edited, first=1)
  ids = np.concatenate([np.zeros((tokens, 3)), *grids])
  return rotary.tables(ids, axes, THETA)


class Attention(nnx.Module):
  """Attention within one stream, [B, N, D] -> [B, N, D]; its block projects what comes out.

  `config` holds the sizes of a FLUX.1 or a FLUX.2.
  """

  def __init__(self, config: Any, *, dtype, rngs, use_bias=True):
    kw = dict(dtype=dtype, rngs=rngs, use_bias=use_bias)
    linear = functools.partial(layers.Linear, config.width, config.width, **kw)
    norm = functools.partial(layers.RMSNorm, config.attention_head_dim, rngs=rngs)
    self.heads = config.num_attention_heads
    self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
    self.norm_q, self.norm_k = norm(), norm()

  def __call__(self, x, rotation):
    return self._attend(*self._project(x), rotation)

  def _project(self, x):
    q, k, v = map(self._heads, adapter_layers.together(x, self.to_q, self.to_k, self.to_v))
    return self.norm_q(q), self.norm_k(k), v

  def _attend(self, q, k, v, rotation):
    y = layers.attention(rotary.rotate(q, *rotation), rotary.rotate(k, *rotation), v)
    y = layers.lay_out(y, tensor=2)
    return y.reshape(*y.shape[:2], -1)

  def _heads(self, x):
    return layers.lay_out(x.reshape(*x.shape[:2], self.heads, -1), tensor=2)


class JointAttention(Attention):
  """Attention over text and image, the text first; each has projections of its own, before and after."""

  def __init__(self, config: Any, *, dtype, rngs, use_bias=True):
    kw = dict(dtype=dtype, rngs=rngs, use_bias=use_bias)
    super().__init__(config, **kw)
    linear = functools.partial(layers.Linear, config.width, config.width, **kw)
    norm = functools.partial(layers.RMSNorm, config.attention_head_dim, rngs=rngs)
    self.to_out, self.to_add_out = linear(), linear()
    self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
    self.norm_added_q, self.norm_added_k = norm(), norm()

  def __call__(self, x, context, rotation):
    added = self.add_q_proj, self.add_k_proj, self.add_v_proj
    cq, ck, cv = map(self._heads, adapter_layers.together(context, *added))
    added = self.norm_added_q(cq), self.norm_added_k(ck), cv
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(added, self._project(x)))
    y, tokens = self._attend(q, k, v, rotation), context.shape[1]
    c, y = layers.fence((y[:, :tokens], y[:, tokens:]))
    return layers.lay_out(self.to_out(y)), layers.lay_out(self.to_add_out(c))


class DoubleBlock(nnx.Module):
  """Joint attention, then a feed-forward for each of the two streams."""

  def __init__(self, config: FluxConfig, *, dtype, rngs):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    mlp = functools.partial(layers.MLP, width, 4 * width, width, activation=layers.gelu_tanh, **kw)
    self.norm1, self.norm1_context = mmdit.AdaNorm(width, 6, **kw), mmdit.AdaNorm(width, 6, **kw)
    self.attn = JointAttention(config, **kw)
    self.ff, self.ff_context = mlp(), mlp()

  def __call__(self, x, context, conditioning, rotation):
    shift, scale, gate, *mlp = self.norm1(conditioning)
    c_shift, c_scale, c_gate, *c_mlp = self.norm1_context(conditioning)
    y, c = layers.modulate(x, shift, scale), layers.modulate(context, c_shift, c_scale)
    y, c = self.attn(y, c, rotation)
    x = feed_forward(self.ff, layers.gated_residual(x, gate, y), *mlp)
    context = feed_forward(self.ff_context, layers.gated_residual(context, c_gate, c), *c_mlp)
    return x, context


def feed_forward(mlp, x, shift, scale, gate):
  """x + gate mlp(norm(x) (1 + scale) + shift)."""
  return layers.gated_residual(x, gate, mlp(layers.modulate(x, shift, scale)))


class SingleBlock(nnx.Module):
  """Attention and feed-forward side by side, over text and image as one stream."""

  def __init__(self, config: FluxConfig, *, dtype, rngs):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    self.norm = mmdit.AdaNorm(width, 3, **kw)
    self.attn = Attention(config, **kw)
    self.proj_mlp = layers.Linear(width, 4 * width, **kw)
    self.proj_out = layers.Linear(5 * width, width, **kw)

  def __call__(self, x, conditioning, rotation):
    shift, scale, gate = self.norm(conditioning)
    y = layers.modulate(x, shift, scale)
    hidden = layers.lay_out(layers.gelu_tanh(self.proj_mlp(y)), tensor=2)
    # The two parts are divided over "tensor" each for itself, so their concatenation cannot be: it is
    # gathered, and proj_out divided by columns (training/mesh.py).
    both = layers.lay_out(jnp.concatenate([self.attn(y, rotation), hidden], axis=-1))
    y = layers.lay_out(self.proj_out(layers.fence(both)))
    return (layers.gated_residual(x, gate, y),)


class Flux(nnx.Module):
  """velocity = Flux(x [B, h, w, c], sigma [B], text [R, L, E], pooled [R, F]) -> [B, h, w, c] float32.

  R divides B: as many neighbours share a text, which is embedded once for them.
  Computes in `dtype` from its own door on, but the angles of sigma and guidance, which are float32.

  Attributes:
    guidance: the scale that a model with guidance_embeds (FLUX.1-dev) is told, unless a call says
      otherwise. None for FLUX.1-schnell, which has no such input.
  """

  def __init__(
    self,
    config: FluxConfig,
    *,
    dtype=jnp.float32,
    remat: str = "none",
    guidance: float | None = None,
    rngs: nnx.Rngs,
  ):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype, self.remat, self.guidance = config, dtype, remat, guidance
    check_guidance(config, guidance, wanted=False)
    mlp = functools.partial(layers.MLP, activation=layers.silu, **kw)
    self.x_embedder = layers.Linear(config.in_channels, width, **kw)
    self.context_embedder = layers.Linear(config.joint_attention_dim, width, **kw)
    self.timestep_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    if config.guidance_embeds:
      self.guidance_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    self.text_embedder = mlp(config.pooled_projection_dim, width, width)
    block, single = functools.partial(DoubleBlock, config), functools.partial(SingleBlock, config)
    self.transformer_blocks = mmdit.stack_blocks(block, config.num_layers, **kw)
    self.single_transformer_blocks = mmdit.stack_blocks(single, config.num_single_layers, **kw)
    self.norm_out = mmdit.AdaNorm(width, 2, **kw)
    zeros = nnx.initializers.zeros_init()
    self.proj_out = layers.Linear(width, config.out_channels, kernel_init=zeros, **kw)

  def __call__(
    self,
    x,
    sigma,
    text,
    pooled,
    guidance: jax.Array | float | None = None,
    image: jax.Array | None = None,
  ):
    """Velocity of x; `guidance`, a scalar or [B], takes the place of the model's own.

    `image` [R, h', w', c] are the latents of a picture that is edited (FLUX.1-Kontext): their tokens stand
    behind those of x, and no velocity is taken of them.

    Raises:
      ValueError: sides that are odd, channels other than the config's, a guidance scale that is missing
        or that the model cannot be told.
    """
    _, height, width, _ = x.shape
    for latent in (x,) if image is None else (x, image):
      self._check(latent)
    guidance = self.guidance if guidance is None else guidance
    conditioning = self._conditioning(sigma, pooled, guidance)
    tokens, sides = text.shape[1], (height // PACK, width // PACK)
    edited = (0, 0) if image is None else (image.shape[1] // PACK, image.shape[2] // PACK)
    rotation = rotary_tables(self.config.axes_dims_rope, tokens, *sides, edited)
    terms = (conditioning, tuple(jnp.asarray(table) for table in rotation))
    x = pack_latents(x.astype(self.dtype))
    if image is not None:
      image = layers.per_sample(pack_latents(image.astype(self.dtype)), x)
      x = jnp.concatenate([x, image], axis=1)
    x = layers.lay_out(self.x_embedder(layers.fence(x)))
    context = layers.lay_out(layers.per_sample(self.context_embedder(text), x))
    x, context = mmdit.scan_blocks(self.transformer_blocks, (x, context), *terms, remat=self.remat)
    x = layers.lay_out(layers.fence(jnp.concatenate([context, x], axis=1)))
    (x,) = mmdit.scan_blocks(self.single_transformer_blocks, (x,), *terms, remat=self.remat)
    x = layers.lay_out(layers.fence(x[:, tokens : tokens + math.prod(sides)]))
    scale, shift = self.norm_out(conditioning)
    x = self.proj_out(layers.modulate(x, shift, scale))
    return layers.fence(unpack_latents(x, height, width).astype(jnp.float32))

  def _check(self, latent):
    """Raises ValueError for a latent [B, h, w, c] that cannot be packed."""
    _, height, width, c = latent.shape
    if height % PACK or width % PACK or c * PACK**2 != self.config.in_channels:
      raise ValueError(
        f"latent {height} x {width} x {c}: sides must be even, and channels in_channels / 4 = "
        f"{self.config.in_channels // PACK**2}."
      )

  def _conditioning(self, sigma, pooled, guidance):
    """[B, D] from time, guidance and pooled text."""
    check_guidance(self.config, guidance, wanted=True)
    vector = self.timestep_embedder(layers.timestep_embedding(sigma).astype(self.dtype))
    if self.config.guidance_embeds:
      vector = layers.fence(vector + tell(self.guidance_embedder, guidance, sigma, self.dtype))
    return layers.fence(vector + layers.per_sample(self.text_embedder(pooled), sigma))


def tell(embedder, guidance, sigma, dtype):
  """The guidance scale, a scalar or [B], as a vector [B, D]."""
  # Behind a fence, a bound scale is not folded into a constant, which other functions would round.
  scale = layers.fence(jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), sigma.shape))
  return embedder(layers.timestep_embedding(scale).astype(dtype))


def check_guidance(config: Any, guidance: Any, *, wanted: bool) -> None:
  """Raises ValueError for a guidance scale that a model cannot be told, or that is wanted and missing."""
  if guidance is not None and not config.guidance_embeds:
    raise ValueError(
      f"guidance={guidance}: this model has no guidance embedding (config.json: guidance_embeds is "
      "false, as in FLUX.1-schnell). Leave guidance None."
    )
  if wanted and guidance is None and config.guidance_embeds:
    raise ValueError(
      "guidance=None: this model is told its guidance scale (config.json: guidance_embeds is true, as "
      "in FLUX.1-dev). Give one to the model or the call, such as 3.5."
    )
