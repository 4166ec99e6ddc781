"""Quantised weights are near the true ones, small, and the same in rollout and update."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields
from tpgrpo_jax.models import flux, lora, mmdit, quantize
from tpgrpo_jax.training import mesh as mesh_lib

KINDS = ("int8", "nf4")
NF4_LATER = ("int8", pytest.param("nf4", marks=pytest.mark.slow))
SD3 = mmdit.MMDiTConfig(
  sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=32,
  num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=64, pooled_projection_dim=12,
  pos_embed_max_size=4, qk_norm="rms_norm", dual_attention_layers=(0, 1),
)  # fmt: skip
FLUX = flux.FluxConfig(
  in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
  num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
CONFIGS = {"sd3": SD3, "flux": FLUX}
SD3_LATER = (pytest.param("sd3", marks=pytest.mark.slow), "flux")


def kernel(seed=0, shape=(2, 128, 24)):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def restored(w, kind):
  """What a layer multiplies with when the kernel is w."""
  return quantize.quantize({"kernel": jnp.copy(w)}, kind)["kernel"][...].astype(jnp.float32)


def test_int8_is_within_half_a_step_of_each_channel():
  w = kernel()
  step = jnp.abs(w).max(axis=1, keepdims=True) / 127
  assert bool((jnp.abs(restored(w, "int8") - w) <= 0.5001 * step).all())


def test_nf4_is_the_nearest_level_of_each_block():
  w = kernel()
  blocks = w.reshape(2, 2, 64, 24)
  levels = jnp.abs(blocks).max(axis=2, keepdims=True)[..., None] * jnp.asarray(quantize.NF4)
  nearest = jnp.abs(levels - blocks[..., None]).min(axis=-1).reshape(w.shape)
  np.testing.assert_allclose(jnp.abs(restored(w, "nf4") - w), nearest, atol=1e-6)


@pytest.mark.parametrize("kind, error", [("int8", 0.008), ("nf4", 0.1)])
def test_error_of_normal_weights(kind, error):
  """Of 64 or 128 normal numbers the largest is about 2.5; a step of int8 is 0.02, of nf4 about 0.3."""
  w = kernel()
  assert float(jnp.linalg.norm(restored(w, kind) - w) / jnp.linalg.norm(w)) < error


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_extremes_are_exact(kind):
  w = jnp.zeros((1, 64, 3)).at[0, 5, 1].set(-2.0).at[0, 7, 2].set(0.5)
  np.testing.assert_array_equal(restored(w, kind), w)


@functools.cache
def abstract(name):
  """(graphdef, shapes of the adapters, of the frozen weights) in float32, each block rematerialised."""

  def create():
    kind = flux.Flux if name == "flux" else mmdit.MMDiT
    model = kind(CONFIGS[name], remat="full", rngs=nnx.Rngs(0))
    targets = model_fields.REFERENCE_LORA_TARGETS
    lora.add_lora(model, jax.random.key(0), rank=2, alpha=4.0, init="gaussian", targets=targets)
    return model

  return lora.split_trainable(nnx.eval_shape(create), rank=2)


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  scale = lambda leaf: leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1
  draw = lambda leaf: jnp.asarray(scale(leaf) * rng.standard_normal(leaf.shape), jnp.float32)
  return jax.tree.map(draw, tree)


def weights(name):
  """(adapters, frozen), random."""
  return tuple(random_like(tree, seed) for seed, tree in enumerate(abstract(name)[1:]))


@functools.cache
def functions(name):
  """(velocity, (loss, velocity) with gradient) of (adapters, frozen), jitted."""
  graphdef = abstract(name)[0]
  x = (8, 8, 8, 4)
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, (8, 5, 12), (8, 12))]
  x, text, pooled = random_like(shapes, 7)
  condition = types.Condition(text, pooled)

  def velocity(trainable, frozen):
    params = {"frozen": frozen, "trainable": trainable}
    return models.velocity_fn(graphdef, params, x, jnp.full(8, 0.6), condition)

  def loss(trainable, frozen):
    value = velocity(trainable, frozen)
    return jnp.mean(value**2), value

  return jax.jit(velocity), jax.jit(jax.value_and_grad(loss, has_aux=True))


def is_quantized(leaf):
  return isinstance(leaf, quantize.Quantized)


def flatten(params):
  """Dotted path -> array, or Quantized."""
  leaves = jax.tree.leaves_with_path(params, is_leaf=is_quantized)
  return {".".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_of_blocks_are_quantised_and_nothing_else_is_touched(name):
  frozen = flatten(weights(name)[1])
  for path, leaf in flatten(quantize.quantize(weights(name)[1], "int8")).items():
    assert is_quantized(leaf) == ("blocks" in path and path.endswith(".kernel")), path
    if is_quantized(leaf):
      assert leaf.codes.shape == frozen[path].shape
    else:
      np.testing.assert_array_equal(leaf, frozen[path])


@pytest.mark.parametrize("kind, share", [("int8", 1 / 4 + 1 / 64), ("nf4", 1 / 8 + 1 / 64)])
def test_a_quantised_kernel_takes_so_much_of_a_float32_one(kind, share):
  w = kernel(shape=(2, 64, 48))
  size = lambda tree: jax.jit(lambda t: t).lower(tree).compile().memory_analysis()
  whole = w.nbytes
  found = size(quantize.quantize({"kernel": w}, kind)).argument_size_in_bytes
  assert found == pytest.approx(share * whole, rel=1e-3)


def test_kernels_are_given_back_as_they_are_quantised():
  w = kernel()
  quantize.quantize({"kernel": w, "bias": jnp.ones(3)}, "int8")
  assert w.is_deleted()


@pytest.mark.parametrize("name", SD3_LATER)
@pytest.mark.parametrize("kind", NF4_LATER)
def test_forward_inside_value_and_grad_is_bit_identical_to_forward_alone(name, kind):
  """The first update must see a log-ratio of exactly 0."""
  velocity, gradient = functions(name)
  trainable, frozen = weights(name)
  frozen = quantize.quantize(frozen, kind)
  (_, inside), _ = gradient(trainable, frozen)
  np.testing.assert_array_equal(velocity(trainable, frozen), inside)


@pytest.mark.parametrize("name", SD3_LATER)
@pytest.mark.parametrize("kind", KINDS)
def test_velocity_and_gradient_are_those_of_the_restored_weights(name, kind):
  _, gradient = functions(name)
  trainable, frozen = weights(name)
  frozen = quantize.quantize(frozen, kind)
  plain = lambda leaf: leaf.astype(jnp.float32) if is_quantized(leaf) else leaf
  wanted = gradient(trainable, jax.tree.map(plain, frozen, is_leaf=is_quantized))
  # The same numbers in the same formula; only where XLA fuses the products may differ.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, gradient(trainable, frozen), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind, error", [("int8", 0.03), ("nf4", 0.3)])
def test_velocity_is_near_that_of_the_true_weights(name, kind, error):
  """The error of the weights, .007 and .09, through a few layers of each of three or four blocks."""
  velocity, _ = functions(name)
  trainable, frozen = weights(name)
  wanted = velocity(trainable, frozen)
  found = velocity(trainable, quantize.quantize(frozen, kind))
  assert 0 < float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < error


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_codes_lie_on_the_mesh_as_the_kernels_do(kind):
  velocity, _ = functions("sd3")
  trainable, frozen = weights("sd3")
  wanted = velocity(trainable, quantize.quantize(weights("sd3")[1], kind))
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  layout = mesh_lib.param_shardings(mesh, frozen)
  with jax.set_mesh(mesh):
    spread = quantize.quantize(jax.device_put(frozen, layout), kind)
    layout = flatten(layout)
    for path, leaf in flatten(spread).items():
      if is_quantized(leaf):
        assert leaf.codes.sharding.is_equivalent_to(layout[path], 3)
    found = jax.jit(lambda *trees: velocity(*trees))(trainable, spread)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_give_the_shapes_of_what_arrays_give(kind):
  arrays = quantize.quantize(weights("sd3")[1], kind)
  shapes = quantize.quantize(abstract("sd3")[2], kind)
  assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
  same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
  assert all(jax.tree.leaves(jax.tree.map(same, shapes, arrays)))


def test_what_cannot_be_quantised_is_refused():
  with pytest.raises(ValueError, match="model.quantize='int4': must be '' or one of int8, nf4"):
    quantize.quantize({"kernel": kernel()}, "int4")
  with pytest.raises(ValueError, match=r"no frozen kernel.*set lora.rank above 0"):
    quantize.quantize({"pos_embed": kernel(), "proj": {"kernel": jnp.ones((64, 64))}}, "int8")
  with pytest.raises(ValueError, match=r"ff.kernel has 48 rows, no multiple of 64. Use int8"):
    quantize.quantize({"ff": {"kernel": kernel(shape=(1, 48, 8))}}, "nf4")
