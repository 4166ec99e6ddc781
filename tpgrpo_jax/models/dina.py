"""A reward model of latents, DiNa-LRM (arXiv 2602.11146): the first blocks of an MMDiT, and a head.

Source: the authors' code, HKUST-C4G/diffusion-rm, sd3_rm.py and reward_head.py. The backbone's attributes
carry diffusers' names and the head's those of that code, so that models/hf/dina.py maps weights by short
tables.
"""

from collections.abc import Mapping
import dataclasses
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import encoder_layers, layers, mmdit

NORM_EPS = float(
  jnp.finfo(jnp.float32).eps
)  # torch's RMSNorm without one, which computes in float32


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  """Sizes of the backbone.

  Attributes:
    transformer: of the whole MMDiT that it is the beginning of.
    taps: blocks, counted from 1, whose outputs the head reads; the last is the backbone's last.
  """

  transformer: mmdit.MMDiTConfig
  taps: tuple[int, ...] = (4, 8, 12)

  def __post_init__(self):
    layers_of = self.transformer.num_layers
    if not self.taps or list(self.taps) != sorted({*self.taps}) or self.taps[0] < 1:
      raise ValueError(f"taps={self.taps}: must be rising numbers of blocks, such as (4, 8, 12).")
    if self.taps[-1] >= layers_of:  # the last block of all has no text states
      raise ValueError(
        f"taps={self.taps}: must be below the {layers_of} blocks of the transformer, whose last one ends "
        "without text states."
      )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "BackboneConfig":
    """Reads the config.json of the whole transformer."""
    return cls(mmdit.MMDiTConfig.from_diffusers(config))

  @property
  def runs(self) -> list[tuple[bool, int]]:
    """Consecutive blocks that are stacked together, none across a tap: (dual, the block after the last)."""
    part = lambda i: sum(tap <= i for tap in self.taps)
    dual = lambda i: i in self.transformer.dual_attention_layers
    groups = itertools.groupby(range(self.taps[-1]), lambda i: (part(i), dual(i)))
    return [(kind, max(blocks) + 1) for (_, kind), blocks in groups]


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  """Sizes of the head.

  Attributes:
    token_dim: D, of the backbone's states and of its conditioning vector.
    width: of the head.
    taps: how many states of the image, and as many of the text, it reads.
    queries: learned tokens that ask.
    heads: of its attention.
    projects: whether an adapter begins with a linear layer.
  """

  token_dim: int = 1536
  width: int = 1536
  taps: int = 3
  queries: int = 4
  heads: int = 8
  projects: bool = False


class Backbone(nnx.Module):
  """(x [B, h, w, c], sigma [B], text [B, L, E], pooled [B, F]) -> what the head reads.

  That is the conditioning vector [B, D], and a list of (image [B, N, D], text [B, L, D]), one for each tap.
  """

  def __init__(self, config: BackboneConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    sizes, width = config.transformer, config.transformer.width
    kw = dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype = config, dtype
    mlp = functools.partial(layers.MLP, activation=layers.silu, **kw)
    self.pos_embed = mmdit.PatchEmbed(sizes, **kw)
    self.timestep_embedder = mlp(layers.TIMESTEP_DIM, width, width)
    self.text_embedder = mlp(sizes.pooled_projection_dim, width, width)
    self.context_embedder = layers.Linear(sizes.joint_attention_dim, width, **kw)
    begin = 0
    for i, (dual, end) in enumerate(config.runs):
      block = functools.partial(mmdit.JointBlock, sizes, dual=dual, context_pre_only=False)
      setattr(self, f"blocks_{i}", mmdit.stack_blocks(block, end - begin, **kw))
      begin = end

  def __call__(self, x, sigma, text, pooled):
    x = layers.lay_out(self.pos_embed(x.astype(self.dtype)))
    conditioning = self.timestep_embedder(layers.timestep_embedding(sigma).astype(self.dtype))
    conditioning = layers.fence(conditioning + self.text_embedder(pooled))
    context = layers.lay_out(self.context_embedder(text))
    states = []
    for i, (_, end) in enumerate(self.config.runs):
      stack = getattr(self, f"blocks_{i}")
      x, context = mmdit.scan_blocks(stack, (x, context), conditioning, remat="none")
      if end in self.config.taps:
        states.append((x, context))
    return conditioning, states


class Adapter(nnx.Module):
  """One tap's tokens [B, N, D] for the head: scaled and shifted by the noise level, then made narrow."""

  def __init__(self, config: HeadConfig, *, dtype, rngs):
    width, kw = config.width, dict(dtype=dtype, rngs=rngs)
    if config.projects:
      self.proj_in = layers.Linear(config.token_dim, width, **kw)
    self.projects = config.projects
    self.layer_embed = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
    self.cond_mlp = layers.MLP(config.token_dim, 2 * width, 2 * width, activation=layers.silu, **kw)
    self.proj = layers.Linear(width, width // 4, **kw)

  def __call__(self, x, conditioning):
    x = self.proj_in(x) if self.projects else x
    scale, shift = jnp.split(self.cond_mlp(conditioning)[:, None], 2, axis=-1)
    x = x * (1 + scale) + shift + self.layer_embed[...].astype(x.dtype)
    return self.proj(layers.fence(x))


class CrossAttention(nnx.Module):
  """Queries look at image tokens, and apart from them at text tokens; each value has a gate of its own."""

  def __init__(self, width: int, heads: int, *, reads_text: bool, gated: bool, dtype, rngs):
    self.heads, self.reads_text, self.gated = heads, reads_text, gated
    linear = functools.partial(layers.Linear, width, width, dtype=dtype, rngs=rngs)
    norm = functools.partial(layers.RMSNorm, width, rngs=rngs, eps=NORM_EPS)
    gate = functools.partial(
      layers.MLP, width, width, 1, activation=layers.silu, dtype=dtype, rngs=rngs
    )
    self.norm_q, self.norm_v, self.to_q, self.to_out = norm(), norm(), linear(), linear()
    self.to_k_vis, self.to_v_vis = linear(), linear()
    if gated:
      self.gate_vis = gate()
    if reads_text:
      self.norm_t, self.to_k_text, self.to_v_text = norm(), linear(), linear()
      if gated:
        self.gate_text = gate()

  def __call__(self, queries, image, text):
    q = self.to_q(self.norm_q(queries))
    y = self._look(q, self.norm_v(image), "vis")
    if self.reads_text:
      y = y + self._look(q, self.norm_t(text), "text")
    return layers.fence(queries + self.to_out(y))

  def _look(self, q, tokens, kind):
    k, v = getattr(self, f"to_k_{kind}")(tokens), getattr(self, f"to_v_{kind}")(tokens)
    if self.gated:
      v = v * jax.nn.sigmoid(getattr(self, f"gate_{kind}")(tokens))
    q, k, v = (encoder_layers.split_heads(a, self.heads) for a in (q, k, v))
    return encoder_layers.attention(q, k, v, scale=q.shape[-1] ** -0.5)


class Head(nnx.Module):
  """(conditioning [B, D], the taps' states) -> the raw score [B] in float32."""

  def __init__(self, config: HeadConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    width, kw = config.width, dict(dtype=dtype, rngs=rngs)
    self.config, self.dtype = config, dtype
    adapter = lambda rngs: Adapter(config, dtype=dtype, rngs=rngs)
    self.layer_adapters_visual = encoder_layers.stack(adapter, config.taps, rngs)
    self.layer_adapters_text = encoder_layers.stack(adapter, config.taps, rngs)
    narrow = config.taps * (width // 4)
    self.agg_visual = layers.Linear(narrow, width, **kw)
    self.agg_text = layers.Linear(narrow, width, **kw)
    self.query_tokens = nnx.Param(jnp.zeros((1, config.queries, width), jnp.float32))
    self.attn1 = CrossAttention(width, config.heads, reads_text=True, gated=True, **kw)
    self.attn2 = CrossAttention(width, config.heads, reads_text=False, gated=False, **kw)
    self.norm_ff = layers.RMSNorm(width, rngs=rngs, eps=NORM_EPS)
    gelu = encoder_layers.ACTIVATIONS["gelu"]
    self.ff = layers.MLP(width, 4 * width, width, activation=gelu, **kw)
    self.head = layers.Linear(width, 1, **kw)

  def __call__(self, conditioning, states):
    images, texts = zip(*states)
    image = self.agg_visual(self._adapted(self.layer_adapters_visual, images, conditioning))
    text = self.agg_text(self._adapted(self.layer_adapters_text, texts, conditioning))
    queries = jnp.repeat(self.query_tokens[...].astype(self.dtype), len(conditioning), axis=0)
    queries = self.attn1(queries, image, text)
    queries = self.attn2(queries, image, None)
    queries = queries + self.ff(self.norm_ff(queries))
    return jnp.mean(self.head(queries)[..., 0].astype(jnp.float32), axis=1)

  def _adapted(self, adapters, tokens, conditioning):
    """[B, N, taps width / 4] of the taps' tokens [B, N, D]."""
    graphdef, weights = nnx.split(adapters)
    of = lambda i: nnx.merge(graphdef, jax.tree.map(lambda a: a[i], weights))
    return jnp.concatenate([of(i)(x, conditioning) for i, x in enumerate(tokens)], axis=-1)
