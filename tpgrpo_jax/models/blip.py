"""BLIP's image tower (arXiv 2201.12086) and the text tower that looks at it, as ImageReward has them.

The image tower is a plain pre-norm vision transformer, the text tower BERT with an attention to the image's
tokens in every block ("med" in BLIP's code). Neither is ever trained here.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import clip, encoder_layers, layers

HEAD_DIM = 64  # of every attention, in both of BLIP's sizes


@dataclasses.dataclass(frozen=True)
class BERTConfig:
  """Sizes of the text tower, under transformers' names."""

  vocab_size: int = 30524
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  max_position_embeddings: int = 512
  layer_norm_eps: float = 1e-12

  @property
  def num_attention_heads(self) -> int:
    return self.hidden_size // HEAD_DIM


VIT_L_16 = clip.CLIPVisionConfig(
  hidden_size=1024,
  intermediate_size=4096,
  num_hidden_layers=24,
  num_attention_heads=16,
  image_size=224,
  patch_size=16,
  hidden_act="gelu",
  layer_norm_eps=1e-6,
)


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
  """Sizes of both towers; by default those of ImageReward."""

  vision: clip.CLIPVisionConfig = VIT_L_16
  text: BERTConfig = BERTConfig()


class VisionTower(nnx.Module):
  """Normalised pixels [B, H, W, 3] -> tokens [B, 1 + N, D] after the last norm, the class token first."""

  def __init__(self, config: clip.CLIPVisionConfig, *, dtype, rngs):
    p, width = config.patch_size, config.hidden_size
    self.config, self.dtype = config, dtype
    self.class_embedding = nnx.Param(jnp.zeros((width,)))
    self.patch_embedding = layers.Linear(p * p * config.num_channels, width, dtype=dtype, rngs=rngs)
    tokens = 1 + (config.image_size // p) ** 2
    self.position_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tokens, width)))
    create = lambda rngs: clip.Block(config, dtype=dtype, rngs=rngs)
    self.blocks_0 = encoder_layers.stack(create, config.num_hidden_layers, rngs)
    self.post_layernorm = encoder_layers.LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)

  def __call__(self, pixels):
    b, height, width, c = pixels.shape
    size, p = self.config.image_size, self.config.patch_size
    if (height, width) != (size, size):
      raise ValueError(f"pixels {height} x {width}: this tower reads {size} x {size}. Resize them.")
    x = pixels.astype(self.dtype).reshape(b, size // p, p, size // p, p, c)
    x = layers.lay_out(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c))
    x = layers.lay_out(self.patch_embedding(x))
    first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, x.shape[-1]))
    x = jnp.concatenate([layers.lay_out(first), x], axis=1)
    x = layers.lay_out(x + self.position_embedding[...].astype(self.dtype))
    x, _ = encoder_layers.scan(self.blocks_0, x, None)
    return self.post_layernorm(x)


class Attention(nnx.Module):
  """norm(x + attention of x to `seen`), with a bias on the logits where one is given."""

  def __init__(self, config: BERTConfig, seen: int, *, dtype, rngs):
    width, linear = config.hidden_size, functools.partial(layers.Linear, dtype=dtype, rngs=rngs)
    self.heads = config.num_attention_heads
    self.to_q, self.to_out = linear(width, width), linear(width, width)
    self.to_k, self.to_v = linear(seen, width), linear(seen, width)
    self.norm = encoder_layers.LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)

  def __call__(self, x, seen, bias):
    parts = self.to_q(x), self.to_k(seen), self.to_v(seen)
    q, k, v = (encoder_layers.split_heads(part, self.heads) for part in parts)
    y = encoder_layers.attention(q, k, v, scale=q.shape[-1] ** -0.5, bias=bias)
    return self.norm(layers.lay_out(x + self.to_out(y)))


class TextBlock(nnx.Module):
  """Attention to the text, attention to the image, and a feed-forward, each with its norm behind it."""

  def __init__(self, config: BERTConfig, image_width: int, *, dtype, rngs):
    width, kw = config.hidden_size, dict(dtype=dtype, rngs=rngs)
    gelu = encoder_layers.ACTIVATIONS["gelu"]
    self.attention = Attention(config, width, **kw)
    self.crossattention = Attention(config, image_width, **kw)
    self.mlp = layers.MLP(width, config.intermediate_size, width, activation=gelu, **kw)
    self.norm = encoder_layers.LayerNorm(width, eps=config.layer_norm_eps, dtype=dtype)

  def __call__(self, x, bias, image):
    x = self.attention(x, x, bias)
    x = self.crossattention(x, image, None)
    return self.norm(layers.lay_out(x + self.mlp(x)))


class TextTower(nnx.Module):
  """ids [B, L], which of them are words [B, L], image tokens [B, N, D'] -> [B, L, D]."""

  def __init__(self, config: BERTConfig, image_width: int, *, dtype, rngs):
    self.config, self.dtype = config, dtype
    table = lambda rows: nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (rows, config.hidden_size))
    )
    self.token_embedding = table(config.vocab_size)
    self.position_embedding = table(config.max_position_embeddings)
    eps = config.layer_norm_eps
    self.norm = encoder_layers.LayerNorm(config.hidden_size, eps=eps, dtype=dtype)
    create = lambda rngs: TextBlock(config, image_width, dtype=dtype, rngs=rngs)
    self.blocks_0 = encoder_layers.stack(create, config.num_hidden_layers, rngs)

  def __call__(self, ids, is_word, image):
    x = encoder_layers.embed_tokens(self.token_embedding[...].astype(self.dtype), ids)
    x = x + self.position_embedding[: ids.shape[1]].astype(self.dtype)
    bias = jnp.where(is_word, 0.0, -jnp.inf)[:, None, None]
    x, _ = encoder_layers.scan(self.blocks_0, self.norm(layers.lay_out(x)), bias, image)
    return x


class BLIP(nnx.Module):
  """What the text tower makes of a prompt's first token when it looks at the image, [B, D]."""

  def __init__(self, config: BLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.vision_model = VisionTower(config.vision, dtype=dtype, rngs=rngs)
    image_width = config.vision.hidden_size
    self.text_encoder = TextTower(config.text, image_width, dtype=dtype, rngs=rngs)

  def __call__(self, ids, is_word, pixels):
    return layers.lay_out(self.text_encoder(ids, is_word, self.vision_model(pixels))[:, 0])
