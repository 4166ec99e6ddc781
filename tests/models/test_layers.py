"""Layers with a hand-written backward pass have the gradient of their plain formula."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import models
from tpgrpo_jax.models import hf, layers, lora, tiny

B, N, D, F, HEADS = 3, 5, 8, 6, 2
LENGTH = jnp.asarray([2, 5, 1])  # of N tokens


def plain_layer_norm(x):
  y = x - x.mean(-1, keepdims=True)
  return y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)


def plain_attention(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, implementation="xla")


# name -> (the layer, its formula in plain jnp, shapes of its inputs)
OPERATIONS = {
  "linear": (layers.linear, lambda x, w, b: x @ w + b, [(B, N, D), (D, F), (F,)]),
  "linear_on_vectors": (layers.linear, lambda x, w, b: x @ w + b, [(B, D), (D, F), (F,)]),
  "product": (layers.product, lambda x, w: x @ w, [(B, N, D), (D, F)]),
  "modulate": (
    layers.modulate,
    lambda x, shift, scale: plain_layer_norm(x) * (1 + scale[:, None]) + shift[:, None],
    [(B, N, D), (B, D), (B, D)],
  ),
  "rms_norm": (
    layers.make_rms_norm(1e-6),
    lambda x, scale: scale * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6),
    [(B, N, HEADS, D), (D,)],
  ),
  "gelu_tanh": (layers.gelu_tanh, lambda x: jax.nn.gelu(x, approximate=True), [(B, N, D)]),
  "silu": (layers.silu, jax.nn.silu, [(B, D)]),
  "swiglu": (layers.swiglu, lambda g, v: jax.nn.silu(g) * v, [(B, N, D), (B, N, D)]),
  "gated_residual": (
    layers.gated_residual,
    lambda x, gate, y: x + gate[:, None] * y,
    [(B, N, D), (B, D), (B, N, D)],
  ),
  "scaled": (layers.scaled, lambda x, s: x * (1 + s[:, None]), [(B, N, D), (B, D)]),
  "tanh": (layers.tanh, jnp.tanh, [(B, D)]),
  "attention": (layers.attention, plain_attention, [(B, N, HEADS, D)] * 3),
  "attention_of_the_first": (
    functools.partial(layers.attention, length=LENGTH),
    lambda q, k, v: jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=LENGTH),
    [(B, N, HEADS, D)] * 3,
  ),
}


def draw(shapes, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [2 * jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes)]


def value_and_gradients(function, inputs):
  """The output, and the gradients of its product with a fixed random cotangent."""
  value, pull = jax.vjp(function, *inputs)
  return value, pull(jax.random.normal(jax.random.key(9), value.shape, value.dtype))


@pytest.mark.parametrize("name", OPERATIONS)
def test_value_and_gradient_equal_those_of_the_plain_formula(name):
  layer, plain, shapes = OPERATIONS[name]
  inputs = draw(shapes)
  found, wanted = value_and_gradients(layer, inputs), value_and_gradients(plain, inputs)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    # Both are float32 sums of up to B N D = 120 terms of size 1 to 10.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bfloat16_gradients_are_finite_and_keep_the_dtype_of_their_input(name):
  layer, _, shapes = OPERATIONS[name]
  inputs = draw(shapes, jnp.bfloat16)
  if name == "rms_norm":
    inputs[1] = inputs[1].astype(jnp.float32)  # its scale is float32 in every model
  value, gradients = value_and_gradients(layer, inputs)
  assert value.dtype == jnp.bfloat16
  for gradient, x in zip(gradients, inputs, strict=True):
    assert gradient.dtype == x.dtype
    assert bool(jnp.isfinite(gradient.astype(jnp.float32)).all())


def test_attention_ignores_the_order_of_keys():
  q, k, v = draw([(B, N, HEADS, D)] * 3)
  order = np.asarray([4, 2, 0, 1, 3])
  np.testing.assert_allclose(
    layers.attention(q, k, v), layers.attention(q, k[:, order], v[:, order]), rtol=1e-5, atol=1e-5
  )


def test_timestep_embedding_at_zero_is_cosine_one_and_sine_zero():
  embedding = layers.timestep_embedding(jnp.zeros(2))
  np.testing.assert_array_equal(embedding[:, :128], 1.0)
  np.testing.assert_array_equal(embedding[:, 128:], 0.0)


def test_slowest_timestep_frequency_is_that_of_diffusers():
  # Its period is 10000^(127/128) x 2 pi timesteps, so at sigma = 1 the last sine is nearly linear.
  embedding = layers.timestep_embedding(jnp.ones(1))
  assert embedding[0, -1] == pytest.approx(math.sin(1000 / 10000 ** (127 / 128)), rel=1e-5)


def test_forward_inside_value_and_grad_is_bit_identical_to_forward_alone():
  """At the sizes of the shipped model, whose first update must see a log-ratio of exactly 0."""
  abstract = nnx.eval_shape(models.build_transformer(tiny.TEXT.config), jax.random.key(0))
  graphdef, trainable, buffers = lora.split_trainable(abstract, rank=0)
  weights = hf.load_transformer(tiny.TEXT.folder, lora.merge_trees(trainable, buffers))
  condition = tiny.TEXT.encode(tiny.TEXT.config, ["CAT3", "XY7"] * 16)
  x = jax.random.normal(jax.random.key(1), (32, *tiny.TEXT.latent_shape))
  inputs = (x, jnp.full(32, 0.7), condition)

  def velocity(weights, x, sigma, condition):
    return models.velocity_fn(graphdef, {"frozen": {}, "trainable": weights}, x, sigma, condition)

  def loss(weights, *inputs):
    value = velocity(weights, *inputs)
    return jnp.mean(value**2), value

  alone = jax.jit(velocity)(weights, *inputs)
  (_, inside), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights, *inputs)
  np.testing.assert_array_equal(alone, inside)
