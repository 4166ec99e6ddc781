"""The image autoencoder of SD3 and FLUX.1, as diffusers' AutoencoderKL (arXiv 2112.10752).

Images are NHWC here. Attributes carry diffusers' names, so that models/hf/vae.py maps weights by one
short table; no more than three neighbouring blocks are alike, so they are not stacked. Norms, softmax
and everything outside the network are float32; the convolutions compute in `dtype`.
"""

import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import layers
from tpgrpo_jax.models.vae_config import VAEConfig

_QUERIES = 1024  # attention rows computed at a time: 16 MiB of float32 logits an image of 512 x 512


class Conv(nnx.Module):
  """A 2-D convolution; x [N, H, W, d_in] -> [N, H', W', d_out]."""

  def __init__(self, d_in, d_out, *, dtype, rngs, size=3, stride=1, padding=None, biased=True):
    self.dtype, self.stride, self.biased = dtype, stride, biased
    self.padding = padding or ((size // 2, size // 2),) * 2
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (size, size, d_in, d_out), jnp.float32))
    if biased:
      self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32))

  def __call__(self, x):
    cast = lambda a: a.astype(self.dtype)
    y = jax.lax.conv_general_dilated(
      cast(x), cast(self.kernel[...]), (self.stride,) * 2, self.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return layers.lay_out(y + cast(self.bias[...]) if self.biased else y)


class GroupNorm(nnx.Module):
  """(x - mean) / std over the pixels and channels of a group, then scale and bias; in float32."""

  def __init__(self, dim, groups, *, rngs):
    del rngs
    self.groups = groups
    self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

  def __call__(self, x):
    n, height, width, c = x.shape
    y = x.astype(jnp.float32).reshape(n, height, width, self.groups, c // self.groups)
    # Rows first: one sum over a million pixels would lose digits.
    mean = lambda a: a.mean((2, 4), keepdims=True).mean(1, keepdims=True)
    y = y - mean(y)
    y = (y * jax.lax.rsqrt(mean(y * y) + layers.EPS)).reshape(x.shape)
    cast = lambda a: a.astype(jnp.float32)
    return (y * cast(self.scale[...]) + cast(self.bias[...])).astype(x.dtype)


class ResnetBlock(nnx.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution of x where widths differ."""

  def __init__(self, d_in, d_out, groups, *, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    self.widens = d_in != d_out
    self.norm1, self.conv1 = GroupNorm(d_in, groups, rngs=rngs), Conv(d_in, d_out, **kw)
    self.norm2, self.conv2 = GroupNorm(d_out, groups, rngs=rngs), Conv(d_out, d_out, **kw)
    if self.widens:
      self.conv_shortcut = Conv(d_in, d_out, size=1, **kw)

  def __call__(self, x):
    y = self.conv1(jax.nn.silu(self.norm1(x)))
    y = self.conv2(jax.nn.silu(self.norm2(y)))
    return (self.conv_shortcut(x) if self.widens else x) + y


class Attention(nnx.Module):
  """x + attention of every pixel to every pixel, one head as wide as x."""

  def __init__(self, dim, groups, *, dtype, rngs):
    linear = lambda: layers.Linear(dim, dim, dtype=dtype, rngs=rngs)
    self.group_norm = GroupNorm(dim, groups, rngs=rngs)
    self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()

  def __call__(self, x):
    y = self.group_norm(x)
    q, k, v = (layers.lay_out(project(y)) for project in (self.to_q, self.to_k, self.to_v))
    return x + layers.lay_out(self.to_out(layers.lay_out(_attend(q, k, v))))


def _attend(q, k, v):
  """Softmax attention over pixels, [N, H, W, D], some rows of queries at a time.

  Not layers.attention: flash kernels do not take a head of 512, and the whole table of an image of
  1024 x 1024 would be 1 GiB.
  """
  n, height, width, dim = q.shape
  k, v = (a.reshape(n, height * width, dim) for a in (k, v))
  fits = [r for r in range(1, height + 1) if height % r == 0 and r * width <= _QUERIES]
  rows = max(fits, default=1)

  def attend(q):
    logits = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(logits * dim**-0.5).astype(v.dtype)
    return layers.lay_out(jnp.einsum("nqk,nkd->nqd", p, v))

  blocks = q.reshape(n, height // rows, rows * width, dim).swapaxes(0, 1)
  return jax.lax.map(attend, blocks).swapaxes(0, 1).reshape(n, height, width, dim)


def chain(x: jax.Array, *modules: nnx.Module) -> jax.Array:
  """Each module of what the one before it gives."""
  for module in modules:
    x = module(x)
  return x


def double(x: jax.Array) -> jax.Array:
  """Twice the sides, by repetition: [N, h, w, c] -> [N, 2 h, 2 w, c]."""
  n, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class MidBlock(nnx.Module):
  """Residual block, attention, residual block, at the lowest resolution."""

  def __init__(self, config: VAEConfig, *, dtype, rngs):
    dim, groups, kw = config.block_out_channels[-1], config.norm_num_groups, dict(dtype=dtype)
    attentions = [Attention(dim, groups, rngs=rngs, **kw)] if config.mid_block_add_attention else []
    self.resnets = nnx.List([ResnetBlock(dim, dim, groups, rngs=rngs, **kw) for _ in range(2)])
    self.attentions = nnx.List(attentions)

  def __call__(self, x):
    return chain(x, self.resnets[0], *self.attentions, self.resnets[1])


class Downsample(nnx.Module):
  """Halves the sides by a convolution, padded below and right only as the reference's."""

  def __init__(self, dim, *, dtype, rngs):
    self.conv = Conv(dim, dim, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles the sides by repetition, then a convolution."""

  def __init__(self, dim, *, dtype, rngs):
    self.conv = Conv(dim, dim, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.conv(double(x))


class DownBlock(nnx.Module):
  """The residual blocks of one resolution, then half the sides unless it is the last."""

  def __init__(self, d_in, d_out, config: VAEConfig, *, last: bool, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    self.resnets = _resnets(d_in, d_out, config.layers_per_block, config.norm_num_groups, kw)
    self.downsamplers = nnx.List([] if last else [Downsample(d_out, **kw)])

  def __call__(self, x):
    return chain(x, *self.resnets, *self.downsamplers)


class UpBlock(nnx.Module):
  """The residual blocks of one resolution, then twice the sides unless it is the last."""

  def __init__(self, d_in, d_out, config: VAEConfig, *, last: bool, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    self.resnets = _resnets(d_in, d_out, config.layers_per_block + 1, config.norm_num_groups, kw)
    self.upsamplers = nnx.List([] if last else [Upsample(d_out, **kw)])

  def __call__(self, x):
    return chain(x, *self.resnets, *self.upsamplers)


def _resnets(d_in, d_out, count, groups, kw):
  widths = [d_in] + [d_out] * count
  return nnx.List([ResnetBlock(a, b, groups, **kw) for a, b in zip(widths[:-1], widths[1:])])


class Encoder(nnx.Module):
  """x [N, H, W, in_channels] in [-1, 1] -> mean and log-variance [N, h, w, 2 latent_channels]."""

  def __init__(self, config: VAEConfig, *, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    widths = config.block_out_channels
    pairs = list(zip((widths[0], *widths), widths))
    self.conv_in = Conv(config.in_channels, widths[0], **kw)
    self.down_blocks = nnx.List(
      [DownBlock(*pair, config, last=i == len(pairs) - 1, **kw) for i, pair in enumerate(pairs)]
    )
    self.mid_block = MidBlock(config, **kw)
    self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, rngs=rngs)
    self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **kw)

  def __call__(self, x):
    x = chain(x, self.conv_in, *self.down_blocks, self.mid_block)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
  """Latents [N, h, w, latent_channels], not scaled -> [N, H, W, out_channels], about [-1, 1]."""

  def __init__(self, config: VAEConfig, *, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    widths = config.block_out_channels[::-1]
    pairs = list(zip((widths[0], *widths), widths))
    self.conv_in = Conv(config.latent_channels, widths[0], **kw)
    self.mid_block = MidBlock(config, **kw)
    self.up_blocks = nnx.List(
      [UpBlock(*pair, config, last=i == len(pairs) - 1, **kw) for i, pair in enumerate(pairs)]
    )
    self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, rngs=rngs)
    self.conv_out = Conv(widths[-1], config.out_channels, **kw)

  def __call__(self, x):
    x = chain(x, self.conv_in, self.mid_block, *self.up_blocks)
    return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
  """Images <-> latents; both methods work on latents that are not scaled, and return float32."""

  def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype = config, dtype
    self.encoder, self.decoder = Encoder(config, **kw), Decoder(config.decoder, **kw)
    if config.use_quant_conv:
      self.quant_conv = Conv(2 * config.latent_channels, 2 * config.latent_channels, size=1, **kw)
    if config.use_post_quant_conv:
      self.post_quant_conv = Conv(config.latent_channels, config.latent_channels, size=1, **kw)

  def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pixels [N, H, W, c] in [-1, 1] -> mean and log-variance of the latents, [N, h, w, c] each."""
    y = self.encoder(x.astype(self.dtype))
    y = self.quant_conv(y) if self.config.use_quant_conv else y
    mean, log_variance = jnp.split(y.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)

  def pixels(self, x: jax.Array) -> jax.Array:
    """Latents [N, h, w, c] -> pixels [N, H, W, c], about [-1, 1]."""
    x = x.astype(self.dtype)
    x = self.post_quant_conv(x) if self.config.use_post_quant_conv else x
    return self.decoder(x).astype(jnp.float32)

  def scale(self, latents: jax.Array) -> jax.Array:
    """Latents as the encoder makes them -> as the diffusion model makes them."""
    return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

  def unscale(self, latents: jax.Array) -> jax.Array:
    """The inverse of `scale`."""
    return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def decode(graphdef: Any, params: Any, latents: jax.Array) -> jax.Array:
  """Images [N, H, W, 3] float32 in [0, 1] of scaled latents [N, h, w, c], all at once.

  Args:
    graphdef: of an AutoencoderKL or AutoencoderTiny, as nnx.split gives it.
    params: all its weights, a nested dict.
    latents: scaled, as the diffusion model makes them.
  """
  model = nnx.merge(graphdef, params)
  latents = layers.lay_out(latents.astype(jnp.float32))
  pixels = model.pixels(model.unscale(latents))
  return jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0)


def decode_chunked(
  graphdef: Any, params: Any, latents: jax.Array, *, images_per_chunk: int
) -> jax.Array:
  """`decode`, some whole images at a time, so that memory does not grow with N.

  Images are never cut into tiles: their seams could be seen by a reward.

  Args:
    graphdef: as of `decode`.
    params: as of `decode`.
    latents: [N, h, w, c]; on a mesh N must divide over its batch axes.
    images_per_chunk: on one device at a time, at most.

  Raises:
    ValueError: images_per_chunk below 1, or N not divided by the mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = math.prod(size for name, size in mesh.shape.items() if name != "tensor")
  if images_per_chunk < 1:
    raise ValueError(f"images_per_chunk={images_per_chunk}: must be at least 1.")
  if len(latents) % shards:
    raise ValueError(f"{len(latents)} latents: must be a multiple of the mesh's {shards} shards.")
  count = len(latents) // shards  # a device's images
  chunks = -(-count // images_per_chunk)
  if chunks <= 1:
    return decode(graphdef, params, latents)
  size = -(-count // chunks)
  # A chunk takes `size` images from every device, so that none of them moves.
  x = layers.lay_out(latents.reshape(shards, count, *latents.shape[1:]))
  x = jnp.pad(x, ((0, 0), (0, chunks * size - count), (0, 0), (0, 0), (0, 0)))
  x = x.reshape(shards, chunks, size, *latents.shape[1:]).swapaxes(0, 1)
  x = x.reshape(chunks, shards * size, *latents.shape[1:])
  images = jax.lax.map(lambda x: layers.lay_out(decode(graphdef, params, x)), x)
  shape = images.shape[2:]
  images = images.reshape(chunks, shards, size, *shape).swapaxes(0, 1)
  images = layers.lay_out(images.reshape(shards, chunks * size, *shape))[:, :count]
  return layers.lay_out(images.reshape(-1, *shape))


def encode(graphdef: Any, params: Any, images: jax.Array, key: Any = None) -> jax.Array:
  """Scaled latents [N, h, w, c] float32 of images [N, H, W, 3] in [0, 1].

  Args:
    graphdef: as of `decode`.
    params: as of `decode`.
    images: sides that are no multiple of `config.downscale` lose their last pixels.
    key: draws from the posterior; None takes its mean.
  """
  model = nnx.merge(graphdef, params)
  latents, log_variance = model.moments(layers.lay_out(images.astype(jnp.float32)) * 2.0 - 1.0)
  if key is not None:
    noise = jax.random.normal(key, latents.shape)
    latents = latents + jnp.exp(0.5 * log_variance) * noise
  return model.scale(latents)
