"""CLIP's text and image towers (arXiv 2103.00020), as transformers' CLIPModel and its parts.

Serves CLIP-L, CLIP-G and CLIP-H. Blocks are stacked along a leading axis and scanned.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import registry
from tpgrpo_jax.models import encoder_layers, layers

LEGACY_EOS = 2
"""Configs older than transformers 4.31 say so, whatever the vocabulary: the largest id is the end."""


def _check_tower(config):
  if config.hidden_size % config.num_attention_heads:
    raise ValueError(
      f"hidden_size={config.hidden_size}: must be a multiple of "
      f"num_attention_heads={config.num_attention_heads}."
    )
  registry.check(config.hidden_act, encoder_layers.ACTIVATIONS, field="hidden_act")


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Sizes of a text tower, under the names and with the defaults of transformers' config.json."""

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407

  def __post_init__(self):
    _check_tower(self)

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPTextConfig":
    """Reads config.json of a CLIPTextModel or a CLIPTextModelWithProjection.

    Raises:
      ValueError: a config of another kind of model.
    """
    return cls(**_known(cls, config, "clip_text_model"))


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """Sizes of an image tower, under the names and with the defaults of transformers' config.json."""

  hidden_size: int = 768
  intermediate_size: int = 3072
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 32
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    _check_tower(self)
    if self.image_size % self.patch_size:
      raise ValueError(
        f"image_size={self.image_size}: must be a multiple of patch_size={self.patch_size}."
      )

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPVisionConfig":
    """Reads config.json of a CLIPVisionModelWithProjection.

    Raises:
      ValueError: a config of another kind of model.
    """
    return cls(**_known(cls, config, "clip_vision_model"))


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Sizes of both towers and of the space that they share."""

  text: CLIPTextConfig = CLIPTextConfig()
  vision: CLIPVisionConfig = CLIPVisionConfig()
  projection_dim: int = 512

  @classmethod
  def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPConfig":
    """Reads config.json of a CLIPModel.

    Old files say the sizes twice; as in transformers, `text_config_dict` is the one that holds.

    Raises:
      ValueError: a config of another kind of model.
    """
    if config.get("model_type", "clip") != "clip":
      raise ValueError(
        f"config.json: model_type={config['model_type']!r}: must be 'clip'. Give such a model's folder."
      )
    tower = lambda name: config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
    return cls(
      CLIPTextConfig.from_transformers(tower("text")),
      CLIPVisionConfig.from_transformers(tower("vision")),
      config.get("projection_dim", cls.projection_dim),
    )


# config.json of the hub: PickScore is a ViT-H/14, CLIPScore's usual one and the aesthetic tower a ViT-L/14.
VIT_H_14 = CLIPConfig(
  CLIPTextConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
  ),
  CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    patch_size=14,
    hidden_act="gelu",
  ),
  projection_dim=1024,
)
VIT_L_14 = CLIPConfig(
  CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12
  ),
  CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=768,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
  ),
  projection_dim=768,
)


def _known(cls, config, model_type):
  found = config.get("model_type", model_type)
  if found != model_type:
    raise ValueError(
      f"config.json: model_type={found!r}: must be {model_type!r}. Give such a model's folder."
    )
  names = {f.name for f in dataclasses.fields(cls)}
  return {k: v for k, v in config.items() if k in names}


class TextOutput(NamedTuple):
  """What a text tower says of ids [B, L].

  Attributes:
    last_hidden_state: [B, L, D] after the last norm.
    penultimate: [B, L, D] the last block's input, transformers' hidden_states[-2].
    pooled: [B, D] the last hidden state at the first end-of-text token.
    projected: [B, E] pooled in the shared space; None where the model has no projection.
  """

  last_hidden_state: jax.Array
  penultimate: jax.Array
  pooled: jax.Array
  projected: jax.Array | None


class VisionOutput(NamedTuple):
  """What an image tower says of pixels [B, H, W, 3].

  Attributes:
    last_hidden_state: [B, 1 + N, D] of the class token and the patches, without the last norm.
    pooled: [B, D] the class token after the last norm.
    projected: [B, E] pooled in the shared space.
  """

  last_hidden_state: jax.Array
  pooled: jax.Array
  projected: jax.Array


class SelfAttention(nnx.Module):
  """Multi-head attention, with a bias on the logits where one is given."""

  def __init__(self, config, *, dtype, rngs):
    width = config.hidden_size
    linear = functools.partial(layers.Linear, width, width, dtype=dtype, rngs=rngs)
    self.heads = config.num_attention_heads
    self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), linear()

  def __call__(self, x, bias):
    q, k, v = (
      encoder_layers.split_heads(project(x), self.heads)
      for project in (self.to_q, self.to_k, self.to_v)
    )
    y = encoder_layers.attention(q, k, v, scale=q.shape[-1] ** -0.5, bias=bias)
    return layers.lay_out(self.to_out(y))


class Block(nnx.Module):
  """A pre-norm transformer block."""

  def __init__(self, config, *, dtype, rngs):
    width, kw = config.hidden_size, dict(dtype=dtype, rngs=rngs)
    norm = functools.partial(_norm, config, dtype=dtype)
    activation = encoder_layers.ACTIVATIONS[config.hidden_act]
    self.layer_norm1, self.layer_norm2 = norm(), norm()
    self.self_attn = SelfAttention(config, **kw)
    self.mlp = layers.MLP(width, config.intermediate_size, width, activation=activation, **kw)

  def __call__(self, x, bias):
    x = layers.fence(x + self.self_attn(self.layer_norm1(x), bias))
    return layers.fence(x + self.mlp(self.layer_norm2(x)))


def _norm(config, *, dtype):
  return encoder_layers.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)


def _blocks(config, dtype, rngs):
  create = lambda rngs: Block(config, dtype=dtype, rngs=rngs)
  return encoder_layers.stack(create, config.num_hidden_layers, rngs)


def _table(rows, config, rngs):
  return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, config.hidden_size)))


def end_positions(ids: jax.Array, eos_token_id: int) -> jax.Array:
  """Where each prompt ends: the first end-of-text token, ids [B, L] -> [B].

  With the legacy eos_token_id == 2 it is the first of the largest ids, as in transformers.
  """
  return jnp.argmax(ids if eos_token_id == LEGACY_EOS else ids == eos_token_id, axis=-1)


class TextTower(nnx.Module):
  """ids [B, L] -> TextOutput without a projection."""

  def __init__(self, config: CLIPTextConfig, *, dtype, rngs):
    self.config, self.dtype = config, dtype
    self.token_embedding = _table(config.vocab_size, config, rngs)
    self.position_embedding = _table(config.max_position_embeddings, config, rngs)
    self.blocks_0 = _blocks(config, dtype, rngs)
    self.final_layer_norm = _norm(config, dtype=dtype)

  def __call__(self, ids) -> TextOutput:
    length, limit = ids.shape[1], self.config.max_position_embeddings
    if length > limit:
      raise ValueError(f"{length} tokens a prompt: max_position_embeddings={limit}. Truncate them.")
    x = encoder_layers.embed_tokens(self.token_embedding[...].astype(self.dtype), ids)
    x = layers.lay_out(x + self.position_embedding[:length].astype(self.dtype))
    x, penultimate = encoder_layers.scan(self.blocks_0, x, encoder_layers.causal_bias(length))
    x = self.final_layer_norm(x)
    end = end_positions(ids, self.config.eos_token_id)
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    return TextOutput(x, penultimate, layers.lay_out(pooled), None)


class VisionTower(nnx.Module):
  """pixels [B, H, W, 3] -> (last hidden state, pooled)."""

  def __init__(self, config: CLIPVisionConfig, *, dtype, rngs):
    p, side = config.patch_size, config.image_size // config.patch_size
    self.config, self.dtype = config, dtype
    self.class_embedding = nnx.Param(jnp.zeros((config.hidden_size,)))
    self.patch_embedding = encoder_layers.Projection(
      p * p * config.num_channels, config.hidden_size, dtype=dtype, rngs=rngs
    )
    self.position_embedding = _table(1 + side * side, config, rngs)
    self.pre_layernorm = _norm(config, dtype=dtype)
    self.blocks_0 = _blocks(config, dtype, rngs)
    self.post_layernorm = _norm(config, dtype=dtype)

  def __call__(self, pixels):
    b, height, width, c = pixels.shape
    size, p = self.config.image_size, self.config.patch_size
    if (height, width) != (size, size):
      raise ValueError(f"pixels {height} x {width}: this tower reads {size} x {size}. Resize them.")
    x = pixels.astype(self.dtype).reshape(b, size // p, p, size // p, p, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
    x = layers.lay_out(self.patch_embedding(layers.lay_out(x)))
    first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype), (b, 1, x.shape[-1]))
    x = jnp.concatenate([layers.lay_out(first), x], axis=1)
    x = layers.lay_out(x + self.position_embedding[...].astype(self.dtype))
    x, _ = encoder_layers.scan(self.blocks_0, self.pre_layernorm(x), None)
    return x, self.post_layernorm(layers.lay_out(x[:, 0]))


def _project(d_in, d_out, dtype, rngs):
  return encoder_layers.Projection(d_in, d_out, dtype=dtype, rngs=rngs)


class CLIPText(nnx.Module):
  """A text tower alone: CLIPTextModelWithProjection, or CLIPTextModel when not `projected`."""

  def __init__(self, config: CLIPTextConfig, *, projected: bool, dtype=jnp.float32, rngs: nnx.Rngs):
    self.projected = projected
    self.text_model = TextTower(config, dtype=dtype, rngs=rngs)
    if projected:
      self.text_projection = _project(config.hidden_size, config.projection_dim, dtype, rngs)

  def __call__(self, ids) -> TextOutput:
    """Computes a TextOutput of ids int [B, L], in the model's dtype."""
    output = self.text_model(ids)
    if not self.projected:
      return output
    return output._replace(projected=layers.lay_out(self.text_projection(output.pooled)))


class CLIPVision(nnx.Module):
  """An image tower alone: CLIPVisionModelWithProjection."""

  def __init__(self, config: CLIPVisionConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.vision_model = VisionTower(config, dtype=dtype, rngs=rngs)
    self.visual_projection = _project(config.hidden_size, config.projection_dim, dtype, rngs)

  def __call__(self, pixels) -> VisionOutput:
    """Computes a VisionOutput of normalised pixels [B, H, W, 3], in the model's dtype."""
    x, pooled = self.vision_model(pixels)
    return VisionOutput(x, pooled, layers.lay_out(self.visual_projection(pooled)))


class CLIP(nnx.Module):
  """Both towers: CLIPModel.

  The scores of transformers are exp(logit_scale) times the products of normalised projections.
  """

  def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.config = config
    self.text_model = TextTower(config.text, dtype=dtype, rngs=rngs)
    self.vision_model = VisionTower(config.vision, dtype=dtype, rngs=rngs)
    dim = config.projection_dim
    self.text_projection = _project(config.text.hidden_size, dim, dtype, rngs)
    self.visual_projection = _project(config.vision.hidden_size, dim, dtype, rngs)
    self.logit_scale = nnx.Param(jnp.asarray(2.6592))

  def embed_text(self, ids) -> TextOutput:
    """Computes a TextOutput of ids int [B, L]; its `projected` is not normalised."""
    output = self.text_model(ids)
    return output._replace(projected=layers.lay_out(self.text_projection(output.pooled)))

  def embed_images(self, pixels) -> VisionOutput:
    """Computes a VisionOutput of normalised pixels [B, H, W, 3]; `projected` is not normalised."""
    x, pooled = self.vision_model(pixels)
    return VisionOutput(x, pooled, layers.lay_out(self.visual_projection(pooled)))

  def __call__(self, ids, pixels) -> tuple[TextOutput, VisionOutput]:
    return self.embed_text(ids), self.embed_images(pixels)
