"""The TPU's attention kernel is softmax attention, on any mesh, and compiles for a TPU from a CPU process."""

import importlib.util

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tpgrpo_jax.models import flux, layers, mmdit, splash

AXES = ("data", "fsdp", "tensor")
AUTO = (AxisType.Auto,) * len(AXES)
SPEC = P(("data", "fsdp"), None, "tensor", None)  # the layout of [B, N, heads, head_dim]
# Relative to the largest value: sums over up to 600 keys in another order; eight bits of mantissa.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def draw(shape, dtype):
  """Query, key, value and the cotangent of the result."""
  keys = jax.random.split(jax.random.key(0), 4)
  return [jax.random.normal(key, shape, dtype) for key in keys]


def value_and_gradients(function):
  """Jitted (q, k, v, cotangent) -> (value, dq, dk, dv)."""

  def run(q, k, v, cotangent):
    value, pull = jax.vjp(function, q, k, v)
    return value, *pull(cotangent)

  return jax.jit(run)


def interpreted(spec):
  return value_and_gradients(lambda *qkv: splash.attention(*qkv, spec=spec, interpret=True))


def plain(q, k, v):
  logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)


def check_equals_plain(found, inputs, dtype):
  wanted = value_and_gradients(plain)(*(x.astype(jnp.float32) for x in inputs))
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == dtype
    error = jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max()
    assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(3, 333, 2, 16)])
def test_only_the_first_tokens_of_each_sample_are_seen(shape):
  inputs, length = draw(shape, "float32"), jnp.asarray([1, 200, shape[1]])
  found = value_and_gradients(
    lambda *qkv: splash.attention(*qkv, spec=None, length=length, interpret=True)
  )(*inputs)
  wanted = value_and_gradients(
    lambda *qkv: jax.nn.dot_product_attention(*qkv, key_value_seq_lengths=length)
  )(*inputs)
  for a, b in zip(found, wanted, strict=True):
    assert float(jnp.abs(a - b).max() / jnp.abs(b).max()) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
  "shape", [(2, 7, 2, 64), (1, 333, 3, 16), (1, 600, 1, 128), (1, 512, 1, 64)]
)
def test_value_and_gradient_equal_softmax_attention(shape, dtype):
  inputs = draw(shape, dtype)
  check_equals_plain(interpreted(None)(*inputs), inputs, dtype)


@pytest.mark.parametrize("mesh_shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_samples_and_heads_divided_over_devices_give_the_same(mesh_shape):
  mesh = jax.make_mesh(mesh_shape, AXES, axis_types=AUTO)
  with jax.set_mesh(mesh):
    inputs = jax.device_put(draw((8, 13, 4, 16), jnp.float32), NamedSharding(mesh, SPEC))
    found = interpreted(SPEC)(*inputs)
    assert all(a.sharding.is_equivalent_to(inputs[0].sharding, 4) for a in found)
  check_equals_plain(jax.device_get(found), jax.device_get(inputs), "float32")


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
  with jax.set_mesh(jax.make_mesh((8, 1, 1), AXES, axis_types=AUTO)):
    with pytest.raises(ValueError, match="divisible"):
      interpreted(SPEC)(*draw((6, 13, 4, 16), jnp.float32))


@pytest.mark.parametrize(
  "tokens, blocks",
  [
    (1024 + 333, (1408, 352, 1408, 128)),
    (1024 + 512, (1536, 768, 512, 768)),
    (1024 + 256, (1280, 640, 640, 640)),
    (24, (128, 128, 128, 128)),
  ],
)
def test_blocks_pad_little_and_are_large(tokens, blocks):
  assert splash.choose_blocks(tokens) == blocks


@pytest.mark.parametrize("tokens", [1, 700, 1357, 2560, 4736, 4737])
def test_blocks_divide_the_tokens_and_fit_the_memory_of_a_core(tokens):
  padded, *blocks = splash.choose_blocks(tokens)
  assert 0 <= padded - tokens < 5 * 128 and all(padded % block == 0 for block in blocks)
  queries, keys, queries_back = blocks
  assert max(queries, queries_back) * keys <= 512 * 1024
  assert keys % 128 == queries_back % 128 == 0


def described(shape, platform):
  """A mesh without devices: what is known of a machine that the program is compiled for."""
  device = jax.sharding.AbstractDevice("described", None, platform)
  return jax.sharding.AbstractMesh(shape, AXES, axis_types=AUTO, abstract_device=device)


def traced(platform, shape):
  """The program of attention and its gradient, as traced for a mesh of that platform."""
  loss = lambda q: layers.attention(q, q, q).astype(jnp.float32).sum()
  with jax.sharding.use_abstract_mesh(described(shape, platform)):
    return str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((4, 5, 2, 8), jnp.bfloat16)))


def test_what_is_compiled_for_is_the_devices_of_the_mesh():
  assert layers.platform() == "cpu"
  for name in ("cpu", "gpu", "tpu"):
    with jax.sharding.use_abstract_mesh(described((1, 1, 1), name)):
      assert layers.platform() == name


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)])
def test_kernel_and_fences_are_those_of_the_mesh_and_not_of_this_process(shape):
  tpu, cpu = traced("tpu", shape), traced("cpu", shape)
  assert "pallas_call" in tpu and "optimization_barrier" not in tpu
  assert ("shard_map" in tpu) == (shape != (1, 1, 1))
  assert "pallas_call" not in cpu and "optimization_barrier" in cpu


@pytest.fixture(scope="module")
def v5e():
  """A described TPU v5e slice of 2 x 2; samples and heads are divided."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the TPU's compiler, is not installed: pip install -e '.[tpu]'")
  from jax.experimental import topologies

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU: do not ask what it is part of
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
  devices = np.asarray(topology.devices).reshape(2, 1, 2)
  return jax.sharding.Mesh(devices, AXES, axis_types=AUTO)


def sd3_block(rngs):
  """The first block of SD3.5-Medium, with its second attention."""
  config = mmdit.MMDiTConfig(
    num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm"
  )
  return mmdit.JointBlock(config, dual=True, context_pre_only=False, dtype=jnp.bfloat16, rngs=rngs)


def flux_block(rngs):
  """A single block of FLUX.1."""
  return flux.SingleBlock(flux.FluxConfig(), dtype=jnp.bfloat16, rngs=rngs)


# At 512 x 512: name -> (block, shapes of its inputs, shapes of what is not divided, attentions).
BLOCKS = {
  "sd3": (sd3_block, [(4, 1024, 1536), (4, 333, 1536), (4, 1536)], [], 2),
  "flux": (flux_block, [(2, 1536, 3072), (2, 3072)], [(1536, 128)] * 2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_block_and_its_gradient_compile_for_a_tpu_from_a_cpu_process(v5e, name):
  create, shapes, tables, attentions = BLOCKS[name]
  graphdef, weights = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

  def loss(weights, inputs, tables):
    outputs = nnx.merge(graphdef, weights)(*inputs, *([tables] if tables else []))
    return sum(y.astype(jnp.float32).sum() for y in outputs)

  spread = NamedSharding(v5e, P(("data", "fsdp")))
  inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=spread) for shape in shapes]
  tables = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in tables]
  with jax.set_mesh(v5e):
    compiled = jax.jit(jax.grad(loss)).lower(weights, inputs, tables).compile()
  # Each attention is three kernels: forward, and backward for the queries and for keys and values.
  assert compiled.as_text().count("tpu_custom_call") >= 3 * attentions
