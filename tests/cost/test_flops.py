"""The count of a program's operations equals closed forms."""

import dataclasses

from flax import nnx
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.cost import flops
from tpgrpo_jax.models import layers, mmdit, splash

N, D, F = 6, 8, 10
X, W, V = jnp.ones((N, D)), jnp.ones((D, D)), jnp.ones((D, F))
PRODUCT = 2 * N * D * D  # of X @ W


def matmul(function, *args):
  found = flops.count(function, *args)
  assert found.conv == 0
  return found.matmul


def test_a_product_is_two_operations_a_term():
  assert matmul(lambda x, v: x @ v, X, V) == 2 * N * D * F
  shapes = (
    jax.ShapeDtypeStruct((3, 4, N, D), jnp.float32),
    jax.ShapeDtypeStruct((3, 4, F, D), jnp.float32),
  )
  assert matmul(lambda a, b: jnp.einsum("abnd,abfd->abnf", a, b), *shapes) == 2 * 12 * N * F * D


def test_elementwise_operations_are_not_counted():
  assert flops.count(lambda x: jnp.sum(jnp.exp(x) * x), X) == flops.Flops(0, 0, {}, {})


def test_a_jitted_function_counts_as_its_body():
  assert matmul(jax.jit(lambda x: jax.jit(jnp.matmul)(x, W)), X) == PRODUCT


def repeated(x, count, body=lambda x: x @ W):
  return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=count)[0]


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
  assert matmul(lambda x: repeated(x, 7), X) == 7 * PRODUCT


def test_nested_scans_multiply():
  nested = lambda x: repeated(x, 3, lambda x: repeated(x @ W, 5))
  assert matmul(nested, X) == (3 * 5 + 3) * PRODUCT


def test_a_loop_of_known_length_counts_as_a_scan():
  assert matmul(lambda x: jax.lax.fori_loop(0, 4, lambda _, x: x @ W, x), X) == 4 * PRODUCT


def test_a_loop_that_ends_by_a_condition_counts_once_and_is_named():
  loop = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ W, x)
  assert flops.count(loop, X) == flops.Flops(PRODUCT, 0, {}, {"while": 1})
  assert flops.count(lambda x: repeated(x, 3, loop), X).uncounted == {"while": 3}


def test_the_dearest_branch_counts():
  choose = lambda x, i: jax.lax.switch(i, [lambda x: x, lambda x: x @ W @ W, lambda x: x @ W], x)
  assert matmul(choose, X, 0) == 2 * PRODUCT


def test_a_gradient_is_one_product_more_for_each_input_that_is_asked_for():
  loss = lambda x, w: jnp.sum((x @ w) ** 2)
  assert matmul(jax.grad(loss, argnums=(0, 1)), X, W) == 3 * PRODUCT
  assert matmul(jax.grad(loss), X, W) == 2 * PRODUCT


def test_gradients_through_a_scan_multiply_too():
  assert matmul(jax.grad(lambda x: jnp.sum(repeated(x, 7) ** 2)), X) == 2 * 7 * PRODUCT


def test_the_gradient_of_a_frozen_kernel_is_not_counted_though_the_layer_computes_it():
  loss = lambda x: jnp.sum(layers.linear(x, W, jnp.zeros(D)) ** 2)
  assert matmul(jax.grad(loss), X) == 2 * PRODUCT


def test_a_rematerialised_block_counts_its_second_forward_pass():
  # x -> tanh(x W) W: the gradient needs tanh, so one product of the two is computed again.
  block = lambda x: jnp.tanh(x @ W) @ W
  plain = jax.grad(lambda x: jnp.sum(repeated(x, 5, block)))
  rematerialised = jax.grad(lambda x: jnp.sum(repeated(x, 5, jax.checkpoint(block))))
  assert matmul(plain, X) == 5 * 4 * PRODUCT
  assert matmul(rematerialised, X) == 5 * 5 * PRODUCT


def test_a_convolution_is_its_taps_times_its_outputs():
  x, kernel = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 6))
  convolve = lambda x, k, **kw: jax.lax.conv_general_dilated(
    x, k, kw.pop("strides", (1, 1)), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kw
  )
  found = flops.count(convolve, x, kernel)
  assert found == flops.Flops(0, 2 * (2 * 9 * 9 * 6) * (3 * 3 * 4), {}, {})
  grouped = lambda x, k: convolve(x, k, feature_group_count=2)
  assert flops.count(grouped, x, kernel[:, :, :2]).conv == found.conv / 2
  # Three convolutions of the same size: forward, of the kernel, of the input.
  loss = lambda x, k: jnp.sum(convolve(x, k) ** 2)
  assert flops.count(jax.grad(loss, argnums=(0, 1)), x, kernel).conv == 3 * found.conv


def test_a_pallas_kernel_counts_as_often_as_its_grid_says():
  def body(x, w, y):
    y[...] = x[...] @ w[...]

  call = pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((4 * N, D), jnp.float32),
    grid=(4,),
    in_specs=[pl.BlockSpec((N, D), lambda i: (i, 0)), pl.BlockSpec((D, D), lambda i: (0, 0))],
    out_specs=pl.BlockSpec((N, D), lambda i: (i, 0)),
    name="product",
  )
  x = jnp.ones((4 * N, D))
  assert flops.count(call, x, W) == flops.Flops(4 * PRODUCT, 0, {"product": 1}, {})


def test_splash_attention_counts_its_padded_blocks():
  batch, tokens, heads, dim = 2, 600, 3, 64  # padded to 640
  q = jnp.ones((batch, tokens, heads, dim))
  found = flops.count(lambda q: splash.attention(q, q, q, spec=None), q)
  assert found.matmul == 2 * (2 * batch * heads * 640 * 640 * dim)
  assert list(found.kernels.values()) == [1]


def test_devices_of_a_mesh_count_together():
  kinds = (jax.sharding.AxisType.Auto,)
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=kinds)):
    spec = jax.sharding.PartitionSpec("data")
    shared = jax.shard_map(lambda x, w: x @ w, in_specs=(spec, jax.P()), out_specs=spec)
    assert matmul(shared, jnp.ones((8 * N, D)), W) == 8 * PRODUCT


def test_a_call_that_hides_its_work_is_named():
  result = jax.ShapeDtypeStruct((N, D), jnp.float32)
  hidden = lambda x: jax.pure_callback(np.asarray, result, x)
  assert flops.count(lambda x: repeated(x, 3, hidden), X).uncounted == {"pure_callback": 3}


@pytest.mark.parametrize("layers_", [2, 5])
def test_a_transformer_of_more_blocks_costs_so_many_blocks_more(layers_):
  base = mmdit.MMDiTConfig(
    sample_size=8, num_layers=2, num_attention_heads=2, caption_projection_dim=128,
    joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=4,
  )  # fmt: skip

  def cost(count):
    config = dataclasses.replace(base, num_layers=count)
    model = nnx.eval_shape(lambda: mmdit.MMDiT(config, rngs=nnx.Rngs(0)))
    graphdef, weights = nnx.split(model)
    inputs = jnp.ones((3, 8, 8, 16)), jnp.ones(3), jnp.ones((3, 5, 32)), jnp.ones((3, 32))
    return matmul(lambda weights, *inputs: nnx.merge(graphdef, weights)(*inputs), weights, *inputs)

  width, image, text, batch = 128, 16, 5, 3
  rows = (image + text) * (
    4 + 8
  ) + 2 * 6  # projections and feed-forward; modulation of both streams
  attention = 2 * 2 * (image + text) ** 2 * width
  block = batch * (2 * rows * width**2 + attention)
  assert cost(layers_ + 1) - cost(layers_) == block
