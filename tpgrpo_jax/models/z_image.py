"""The Z-Image flow transformer (arXiv 2511.22699), as diffusers' ZImageTransformer2DModel.

Two blocks refine the image tokens and two the caption's, each alone; all others see both as one sequence, the
image first. Captions differ in length: each is padded with a learned token to a multiple of 32, and such
tokens are attended to; the image's place on the first axis of positions is behind its own caption. Here all
captions of a batch lie in one array of L tokens, of which attention skips those behind the padded caption. So
L decides what is computed, and not what comes out. Attributes carry diffusers' names where they can, so that
models/hf/z_image.py maps weights by one short table.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import adapter_layers, layers, mmdit, rotary

MULTIPLE = 32  # of tokens, that captions and images are padded to
CONDITIONING = 256  # widest conditioning vector
_TIME_HIDDEN = 1024
_HEAD_EPS = 1e-5  # of the norms of queries and keys
SIDE = 128  # latents, as diffusers' pipeline has it
# What diffusers offers and this module does not: field -> the one value it knows.
_FIXED = {
  "all_f_patch_size": (1,), "qk_norm": True, "siglip_feat_dim": None, "t_scale": 1000.0
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
  """Sizes, under the names (and with the defaults) of diffusers' config.json.

  Attributes:
    all_patch_size: one number, latents along each side of a token.
    dim: width.
    n_refiner_layers: blocks of the image alone, and as many of the caption alone.
    n_kv_heads: as n_heads.
    cap_feat_dim: of a caption's token.
    axes_dims: channels of a head that rotate with the place in the caption, row and column.
    axes_lens: places on each axis.
  """

  all_patch_size: tuple[int, ...] = (2,)
  in_channels: int = 16
  dim: int = 3840
  n_layers: int = 30
  n_refiner_layers: int = 2
  n_heads: int = 30
  n_kv_heads: int = 30
  norm_eps: float = 1e-5
  cap_feat_dim: int = 2560
  rope_theta: float = 256.0
  axes_dims: tuple[int, ...] = (32, 48, 48)
  axes_lens: tuple[int, ...] = (1024, 512, 512)

  @property
  def patch(self) -> int:
    return self.all_patch_size[0]

  @property
  def joint_attention_dim(self) -> int:
    """Of a caption's token, under the other models' name."""
    return self.cap_feat_dim

  @property
  def most_tokens(self) -> int:
    """Of a caption, padding included, that there are places for; image and its padding take one each."""
    return (self.axes_lens[0] - 2) // MULTIPLE * MULTIPLE

  @property
  def latents(self) -> layers.Latents:
    largest = min(self.axes_lens[1:]) * self.patch
    return layers.Latents(self.in_channels, self.patch, SIDE, largest)

  def __post_init__(self):
    if len(self.all_patch_size) != 1 or not self.all_patch_size[0] > 0:
      raise ValueError(f"all_patch_size={self.all_patch_size}: must be one number above 0.")
    if self.n_kv_heads != self.n_heads:
      raise ValueError(f"n_kv_heads={self.n_kv_heads}: must be n_heads={self.n_heads}.")
    axes = self.axes_dims
    if not (
      len(axes) == 3 and all(map(rotary.is_axis, axes)) and sum(axes) * self.n_heads == self.dim
    ):
      raise ValueError(
        f"axes_dims={axes}: must be three even numbers that add up to dim / n_heads = "
        f"{self.dim / self.n_heads:g}."
      )
    if len(self.axes_lens) != 3 or not all(isinstance(n, int) and n > 0 for n in self.axes_lens):
      raise ValueError(f"axes_lens={self.axes_lens}: must be three whole numbers above 0.")
    if self.most_tokens < MULTIPLE:
      raise ValueError(
        f"axes_lens={self.axes_lens}: must begin with at least {MULTIPLE + 2}, for the shortest caption."
      )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "ZImageConfig":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(k for k in config if k[0] != "_" and k not in names | _FIXED.keys())
    if unknown:
      raise ValueError(f"{', '.join(unknown)}: not fields of ZImageTransformer2DModel.")

    def listed(value: Any) -> Any:
      return tuple(value) if isinstance(value, list) else value

    for field, value in _FIXED.items():
      if listed(config.get(field, value)) != value:
        raise ValueError(f"{field}={config[field]!r}: must be {value!r}; no other is known.")
    return cls(**{k: listed(v) for k, v in config.items() if k in names})


def padded_length(length: Any) -> Any:
  """The next multiple of 32, of a number or an array."""
  return -(-length // MULTIPLE) * MULTIPLE


def rotary_tables(
  config: ZImageConfig, captions: jax.Array, tokens: int, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
  """Cosine and signed sine of every token's rotation angles, as `rotary.tables`, the image first.

  Caption token j, padding or not, is at (1 + j, 0, 0); image token at (1 + its padded caption, row, column);
  the padding of the image at (0, 0, 0).

  Args:
    config: sizes.
    captions: [B] int32, length of each padded caption.
    tokens: L of all captions.
    height: rows of image tokens.
    width: columns of image tokens.

  Returns:
    Two [B, N + L, head_dim] float32, N being height width padded.
  """
  axes, theta = config.axes_dims, config.rope_theta
  places = np.zeros((tokens + 2, 3))
  places[:, 0] = np.arange(tokens + 2)
  pad = padded_length(height * width) - height * width
  grid = np.pad(rotary.grid(height, width), ((0, pad), (0, 0)))
  is_pad = np.arange(height * width + pad)[:, None] >= height * width
  made = []
  for text, image in zip(
    rotary.tables(places, axes, theta), rotary.tables(grid, axes, theta), strict=True
  ):
    behind = jnp.asarray(text)[captions + 1][:, None, : axes[0]]
    first = jnp.where(is_pad, image[:, : axes[0]], behind)
    shape = (len(captions), *image.shape)
    image = jnp.concatenate([first, jnp.broadcast_to(image, shape)[..., axes[0] :]], axis=-1)
    text = jnp.broadcast_to(text[1:-1], (len(captions), tokens, sum(axes)))
    made.append(layers.lay_out(layers.fence(jnp.concatenate([image, text], axis=1))))
  return made[0], made[1]


class Attention(nnx.Module):
  """Attention within one sequence, of which the first `length` tokens are seen."""

  def __init__(self, config: ZImageConfig, *, dtype, rngs):
    dim, heads = config.dim, config.n_heads
    linear = functools.partial(layers.Linear, dim, dim, dtype=dtype, rngs=rngs, use_bias=False)
    norm = functools.partial(layers.RMSNorm, dim // heads, eps=_HEAD_EPS, rngs=rngs)
    self.heads = heads
    self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()
    self.norm_q, self.norm_k = norm(), norm()

  def __call__(self, x, rotation, length):
    q, k, v = map(self._heads, adapter_layers.together(x, self.to_q, self.to_k, self.to_v))
    q, k = rotary.rotate(self.norm_q(q), *rotation), rotary.rotate(self.norm_k(k), *rotation)
    y = layers.lay_out(layers.attention(q, k, v, length=length), tensor=2)
    return layers.lay_out(self.to_out(layers.fence(y.reshape(*y.shape[:2], -1))))

  def _heads(self, x):
    return layers.lay_out(x.reshape(*x.shape[:2], self.heads, -1), tensor=2)


class FeedForward(nnx.Module):
  """(silu(x W_1) * (x W_3)) W_2."""

  def __init__(self, config: ZImageConfig, *, dtype, rngs):
    dim, hidden = config.dim, int(config.dim / 3 * 8)
    linear = functools.partial(layers.Linear, dtype=dtype, rngs=rngs, use_bias=False)
    self.w1, self.w2, self.w3 = linear(dim, hidden), linear(hidden, dim), linear(dim, hidden)

  def __call__(self, x):
    gate, value = (layers.lay_out(w(x), tensor=2) for w in (self.w1, self.w3))
    return layers.lay_out(self.w2(layers.lay_out(layers.swiglu(gate, value), tensor=2)))


class Block(nnx.Module):
  """Attention and feed-forward, with norms before and after each."""

  def __init__(self, config: ZImageConfig, *, dtype, rngs):
    norm = functools.partial(layers.RMSNorm, config.dim, eps=config.norm_eps, rngs=rngs)
    self.attention = Attention(config, dtype=dtype, rngs=rngs)
    self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)
    self.attention_norm1, self.attention_norm2 = norm(), norm()
    self.ffn_norm1, self.ffn_norm2 = norm(), norm()

  def __call__(self, x, rotation, length):
    y = self.attention(self.attention_norm1(x), rotation, length)
    x = layers.fence(x + self.attention_norm2(y))
    y = self.feed_forward(self.ffn_norm1(x))
    return (layers.fence(x + self.ffn_norm2(y)),)


class ModulatedBlock(Block):
  """A Block whose inputs are scaled, and whose outputs gated, as the conditioning says."""

  def __init__(self, config: ZImageConfig, *, dtype, rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    d_in = min(config.dim, CONDITIONING)
    self.modulation = layers.Linear(d_in, 4 * config.dim, dtype=dtype, rngs=rngs)

  def __call__(self, x, conditioning, rotation, length):
    chunks = layers.lay_out(self.modulation(conditioning))
    scale, gate, mlp_scale, mlp_gate = layers.fence(jnp.split(chunks, 4, axis=-1))
    y = layers.scaled(self.attention_norm1(x), scale)
    y = self.attention_norm2(self.attention(y, rotation, length))
    x = layers.gated_residual(x, layers.tanh(gate), y)
    y = self.ffn_norm2(self.feed_forward(layers.scaled(self.ffn_norm1(x), mlp_scale)))
    return (layers.gated_residual(x, layers.tanh(mlp_gate), y),)


class ZImage(nnx.Module):
  """velocity = ZImage(x [B, h, w, c], sigma [B], text [R, L, E], length [R]) -> [B, h, w, c] float32.

  R divides B: as many neighbours share a caption, which is embedded and refined once for them.
  `length` says how many of the L tokens are the caption's; what the others hold does not matter. Computes in
  `dtype` from its own door on, but the angles of sigma, which are float32.
  """

  def __init__(
    self, config: ZImageConfig, *, dtype=jnp.float32, remat: str = "none", rngs: nnx.Rngs
  ):
    dim, kw = config.dim, dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype, self.remat = config, dtype, remat
    channels, narrow = config.patch**2 * config.in_channels, min(dim, CONDITIONING)
    mlp = functools.partial(layers.MLP, activation=layers.silu, **kw)
    block, plain = functools.partial(ModulatedBlock, config), functools.partial(Block, config)
    self.t_embedder = mlp(layers.TIMESTEP_DIM, _TIME_HIDDEN, narrow)
    self.x_embedder = layers.Linear(channels, dim, **kw)
    self.cap_norm = layers.RMSNorm(config.cap_feat_dim, eps=config.norm_eps, rngs=rngs)
    self.cap_embedder = layers.Linear(config.cap_feat_dim, dim, **kw)
    self.x_pad_token = nnx.Param(jnp.zeros((1, dim), jnp.float32))
    self.cap_pad_token = nnx.Param(jnp.zeros((1, dim), jnp.float32))
    self.noise_refiner = mmdit.stack_blocks(block, config.n_refiner_layers, **kw)
    self.context_refiner = mmdit.stack_blocks(plain, config.n_refiner_layers, **kw)
    self.layers = mmdit.stack_blocks(block, config.n_layers, **kw)
    self.final_modulation = layers.Linear(narrow, dim, **kw)
    zeros = nnx.initializers.zeros_init()
    self.final_linear = layers.Linear(dim, channels, kernel_init=zeros, **kw)

  def __call__(self, x, sigma, text, length):
    b, height, width, c = x.shape
    p = self.config.patch
    rows, columns = height // p, width // p
    self._check(height, width, text.shape[1])
    x = x.astype(self.dtype).reshape(b, rows, p, columns, p, c).transpose(0, 1, 3, 2, 4, 5)
    x = self.x_embedder(layers.fence(x.reshape(b, rows * columns, -1)))
    x = self._pad(x, self.x_pad_token, jnp.full((b,), rows * columns))
    text = self.cap_embedder(self.cap_norm(text.astype(self.dtype)))
    context = self._pad(text, self.cap_pad_token, length)
    captions, tokens = padded_length(length), x.shape[1]
    rotation = rotary_tables(self.config, captions, context.shape[1], rows, columns)
    text_rotation = tuple(a[:, tokens:] for a in rotation)
    rotation = tuple(layers.lay_out(layers.per_sample(a, x)) for a in rotation)
    image_rotation = tuple(a[:, :tokens] for a in rotation)
    conditioning = self.t_embedder(layers.timestep_embedding(1.0 - sigma).astype(self.dtype))
    scan = functools.partial(mmdit.scan_blocks, remat=self.remat)
    (x,) = scan(self.noise_refiner, (x,), conditioning, image_rotation, None)
    (context,) = scan(self.context_refiner, (context,), text_rotation, captions)
    context, captions = layers.per_sample(context, x), layers.per_sample(captions, x)
    x = layers.lay_out(layers.fence(jnp.concatenate([x, context], axis=1)))
    (x,) = scan(self.layers, (x,), conditioning, rotation, tokens + captions)
    x = layers.lay_out(layers.fence(x[:, : rows * columns]))
    scale = self.final_modulation(layers.silu(conditioning))
    x = self.final_linear(layers.modulate(x, jnp.zeros_like(scale), scale))
    x = x.reshape(b, rows, columns, p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return -layers.fence(x.reshape(b, height, width, c).astype(jnp.float32))

  def _pad(self, x, token, length):
    """x [B, N, D] -> [B, N padded, D], with the token in place of those from `length` on."""
    x = jnp.pad(x, ((0, 0), (0, padded_length(x.shape[1]) - x.shape[1]), (0, 0)))
    is_token = jnp.arange(x.shape[1]) < length[:, None]
    x = jnp.where(is_token[..., None], x, token[...].astype(x.dtype))
    return layers.lay_out(layers.fence(x))

  def _check(self, height, width, tokens):
    """Raises ValueError for sides that do not fit the patches, or without places."""
    p, (_, *sides) = self.config.patch, self.config.axes_lens
    if height % p or width % p or height > sides[0] * p or width > sides[1] * p:
      raise ValueError(
        f"latent {height} x {width}: sides must be multiples of {p} and at most {sides[0] * p} x "
        f"{sides[1] * p}, the places of axes_lens."
      )
    if tokens > self.config.most_tokens:
      raise ValueError(
        f"{tokens} tokens of text: there are places for {self.config.most_tokens} (axes_lens); shorten the "
        "captions."
      )
