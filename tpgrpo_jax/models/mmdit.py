"""The SD3 family of flow transformers (MMDiT, arXiv 2403.03206), as diffusers' SD3Transformer2DModel.

Attributes carry diffusers' names, so that models/hf/sd3.py maps weights by one short table. Blocks of
one kind are stacked along a leading axis and scanned.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import adapter_layers, in_turn, layers

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_only_these_names(layers.PRODUCT),
}


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """Sizes, under the names of diffusers' config.json.

  Attributes:
    sample_size: latent side that the position table is centred on.
    dual_attention_layers: blocks with a second, image-only attention (SD3.5-Medium).
    qk_norm: "rms_norm", or None (SD3-Medium).
  """

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int = 16
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  @property
  def latents(self) -> layers.Latents:
    largest = self.pos_embed_max_size * self.patch_size
    return layers.Latents(self.in_channels, self.patch_size, self.sample_size, largest)

  def __post_init__(self):
    if self.caption_projection_dim != self.width:
      raise ValueError(
        f"caption_projection_dim={self.caption_projection_dim}: must equal num_attention_heads x "
        f"attention_head_dim = {self.width}."
      )
    if self.qk_norm not in (None, "rms_norm"):
      raise ValueError(f"qk_norm={self.qk_norm!r}: must be 'rms_norm' or null.")

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model."""
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(k for k in config if not k.startswith("_") and k not in names)
    if unknown:
      raise ValueError(f"{', '.join(unknown)}: not fields of SD3Transformer2DModel.")
    known = {k: v for k, v in config.items() if k in names}
    known["dual_attention_layers"] = tuple(known.get("dual_attention_layers", ()))
    if known.get("out_channels") is None:
      known["out_channels"] = known.get("in_channels", cls.in_channels)
    return cls(**known)


def sincos_positions(width: int, max_size: int, base_size: int) -> jax.Array:
  """The 2-D sin-cos position table of diffusers' PatchEmbed, [max_size, max_size, width] float32.

  Only the sines of one axis are computed here and now, in float64: the table, 0.9 GB for
  SD3.5-Medium, is part of the program that makes the model, and nothing under jax.eval_shape.
  """
  quarter = width // 4
  omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
  angle = (np.arange(max_size) / (max_size / base_size))[:, None] * omega
  axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
  shape = (max_size, max_size, width // 2)
  column, row = (jnp.broadcast_to(a, shape) for a in (axis[None, :, :], axis[:, None, :]))
  return jnp.concatenate([column, row], axis=-1)  # the column comes first, as in the reference


class PatchEmbed(nnx.Module):
  """Patches -> tokens plus the centre crop of the position table."""

  def __init__(self, config: MMDiTConfig, *, dtype, rngs):
    p, base = config.patch_size, config.sample_size // config.patch_size
    self.patch_size = p
    self.proj = layers.Linear(p * p * config.in_channels, config.width, dtype=dtype, rngs=rngs)
    self.pos_embed = layers.Buffer(sincos_positions(config.width, config.pos_embed_max_size, base))

  def __call__(self, x):
    b, height, width, c = x.shape
    p, size = self.patch_size, self.pos_embed.shape[0]
    if height % p or width % p or max(height, width) > size * p:
      raise ValueError(
        f"latent {height} x {width}: sides must be multiples of patch_size={p} and at most "
        f"pos_embed_max_size x patch_size = {size * p}."
      )
    h, w = height // p, width // p
    x = x.reshape(b, h, p, w, p, c).transpose(0, 1, 3, 2, 4, 5)
    x = layers.fence(x.reshape(b, h * w, p * p * c))
    top, left = (size - h) // 2, (size - w) // 2
    positions = self.pos_embed[top : top + h, left : left + w].reshape(h * w, -1)
    return layers.fence(self.proj(x) + positions.astype(self.proj.dtype))


class AdaNorm(nnx.Module):
  """`chunks` vectors of width D from the conditioning vector (adaLN-zero)."""

  def __init__(self, width, chunks, *, dtype, rngs, use_bias=True):
    self.chunks = chunks
    kw = dict(dtype=dtype, rngs=rngs, use_bias=use_bias)
    zeros = nnx.initializers.zeros_init()
    self.linear = layers.Linear(width, chunks * width, kernel_init=zeros, **kw)

  def __call__(self, conditioning):
    chunks = layers.lay_out(self.linear(layers.silu(conditioning)))
    return layers.fence(jnp.split(chunks, self.chunks, axis=-1))


class Attention(nnx.Module):
  """Attention over image tokens, or over image and text tokens jointly."""

  def __init__(self, config: MMDiTConfig, *, joint: bool, context_out: bool, dtype, rngs):
    width = config.width
    self.heads = config.num_attention_heads
    linear = functools.partial(layers.Linear, width, width, dtype=dtype, rngs=rngs)
    norm = functools.partial(layers.RMSNorm, config.attention_head_dim, rngs=rngs)
    self.joint, self.normed, self.context_out = joint, config.qk_norm is not None, context_out
    self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()
    if self.normed:
      self.norm_q, self.norm_k = norm(), norm()
    if joint:
      self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
      if self.normed:
        self.norm_added_q, self.norm_added_k = norm(), norm()
    if context_out:
      self.to_add_out = linear()

  def __call__(self, x, context: Any = None):
    tokens = x.shape[1]
    q, k, v = map(self._heads, adapter_layers.together(x, self.to_q, self.to_k, self.to_v))
    if self.normed:
      q, k = self.norm_q(q), self.norm_k(k)
    if self.joint:
      added = self.add_q_proj, self.add_k_proj, self.add_v_proj
      cq, ck, cv = map(self._heads, adapter_layers.together(context, *added))
      if self.normed:
        cq, ck = self.norm_added_q(cq), self.norm_added_k(ck)
      q, k = jnp.concatenate([q, cq], axis=1), jnp.concatenate([k, ck], axis=1)
      v = jnp.concatenate([v, cv], axis=1)
    y = layers.lay_out(layers.attention(q, k, v), tensor=2)
    y = y.reshape(*y.shape[:2], -1)
    y, c = layers.fence((y[:, :tokens], y[:, tokens:]))
    x = layers.lay_out(self.to_out(y))
    return x, layers.lay_out(self.to_add_out(c)) if self.context_out else None

  def _heads(self, x):
    return layers.lay_out(x.reshape(*x.shape[:2], self.heads, -1), tensor=2)


class JointBlock(nnx.Module):
  """One MMDiT block: joint attention, then a feed-forward for each of the two streams.

  `dual` adds the image-only attention of SD3.5-Medium; `context_pre_only` is the last block, whose
  text stream ends here.
  """

  def __init__(self, config: MMDiTConfig, *, dual: bool, context_pre_only: bool, dtype, rngs):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    mlp = functools.partial(layers.MLP, width, 4 * width, width, activation=layers.gelu_tanh, **kw)
    self.dual, self.context_pre_only = dual, context_pre_only
    self.norm1 = AdaNorm(width, 9 if dual else 6, **kw)
    self.norm1_context = AdaNorm(width, 2 if context_pre_only else 6, **kw)
    self.attn = Attention(config, joint=True, context_out=not context_pre_only, **kw)
    if dual:
      self.attn2 = Attention(config, joint=False, context_out=False, **kw)
    self.ff = mlp()
    if not context_pre_only:
      self.ff_context = mlp()

  def __call__(self, x, context, conditioning):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *second = self.norm1(conditioning)
    if self.context_pre_only:
      c_scale, c_shift = self.norm1_context(conditioning)  # this one has the scale first
    else:
      c_shift, c_scale, c_gate, *c_mlp = self.norm1_context(conditioning)
    y, c = self.attn(layers.modulate(x, shift, scale), layers.modulate(context, c_shift, c_scale))
    if self.dual:
      shift2, scale2, gate2 = second
      x2, _ = self.attn2(layers.modulate(x, shift2, scale2))
      x = layers.gated_residual(x, gate2, x2)
    x = layers.gated_residual(x, gate, y)
    y = self.ff(layers.modulate(x, mlp_shift, mlp_scale))
    x = layers.gated_residual(x, mlp_gate, y)
    if not self.context_pre_only:
      context = layers.gated_residual(context, c_gate, c)
      c_mlp_shift, c_mlp_scale, c_mlp_gate = c_mlp
      y = self.ff_context(layers.modulate(context, c_mlp_shift, c_mlp_scale))
      context = layers.gated_residual(context, c_mlp_gate, y)
    return x, context


class MMDiT(nnx.Module):
  """velocity = MMDiT(x [B, h, w, c], sigma [B], text [R, L, E], pooled [R, F]) -> [B, h, w, c].

  R divides B: as many neighbours share a text, which is embedded once for them.
  Computes in `dtype` from its own door on, and returns float32.
  """

  def __init__(
    self, config: MMDiTConfig, *, dtype=jnp.float32, remat: str = "none", rngs: nnx.Rngs
  ):
    width = config.width
    kw = dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype, self.remat = config, dtype, remat
    mlp = functools.partial(layers.MLP, activation=layers.silu, **kw)
    self.pos_embed = PatchEmbed(config, **kw)
    self.timestep_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    self.text_embedder = mlp(config.pooled_projection_dim, width, width)
    self.context_embedder = layers.Linear(config.joint_attention_dim, width, **kw)
    self.num_stacks = len(block_runs(config))
    for i, (dual, pre_only, count) in enumerate(block_runs(config)):
      block = functools.partial(JointBlock, config, dual=dual, context_pre_only=pre_only)
      setattr(self, f"blocks_{i}", stack_blocks(block, count, **kw))
    self.norm_out = AdaNorm(width, 2, **kw)
    zeros = nnx.initializers.zeros_init()
    p = config.patch_size
    self.proj_out = layers.Linear(width, p * p * config.out_channels, kernel_init=zeros, **kw)

  def __call__(self, x, sigma, text, pooled):
    b, height, width, _ = x.shape
    p = self.config.patch_size
    x = layers.lay_out(self.pos_embed(x.astype(self.dtype)))
    conditioning = self.timestep_embedder(layers.timestep_embedding(sigma).astype(self.dtype))
    pooled = layers.per_sample(self.text_embedder(pooled), x)
    conditioning = layers.fence(conditioning + pooled)
    context = layers.lay_out(layers.per_sample(self.context_embedder(text), x))
    for i in range(self.num_stacks):
      stack = getattr(self, f"blocks_{i}")
      x, context = scan_blocks(stack, (x, context), conditioning, remat=self.remat)
    scale, shift = self.norm_out(conditioning)
    x = self.proj_out(layers.modulate(x, shift, scale))
    x = x.reshape(b, height // p, width // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return layers.fence(x.reshape(b, height, width, -1).astype(jnp.float32))


def block_runs(config: MMDiTConfig) -> list[tuple[bool, bool, int]]:
  """Consecutive blocks of one kind, as (dual, context_pre_only, count)."""
  last = config.num_layers - 1
  kinds = [(i in config.dual_attention_layers, i == last) for i in range(config.num_layers)]
  return [(*kind, len(list(group))) for kind, group in itertools.groupby(kinds)]


def stack_blocks(block, count: int, *, dtype, rngs: nnx.Rngs):
  """`count` blocks of one kind as one module, whose weights have a leading axis."""

  @nnx.split_rngs(splits=count)
  @nnx.vmap(in_axes=0, out_axes=0)
  def create(rngs):
    return block(dtype=dtype, rngs=rngs)

  return create(rngs)


def scan_blocks(stack: nnx.Module, carry: tuple, *terms, remat: str) -> tuple:
  """Applies the blocks of a stack in turn: carry = block(*carry, *terms).

  Args:
    stack: as of `stack_blocks`.
    carry: what a block takes first, and returns changed.
    terms: what every block sees.
    remat: "none", or which intermediates the backward pass keeps (REMAT_POLICIES).
  """
  graphdef, weights = nnx.split(stack)

  def apply(weights, carry, terms):
    return nnx.merge(graphdef, weights)(*carry, *terms)

  def keeps_less(function):
    if remat == "none":
      return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[remat], prevent_cse=False)

  block = in_turn.block(apply, keeps_less)
  return jax.lax.scan(lambda carry, w: (block(w, carry, terms), None), carry, weights)[0]
