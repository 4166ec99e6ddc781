"""Adapters start as nothing, learn alone, and equal a change of the weights that they sit beside."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields
from tpgrpo_jax.models import adapter_layers, hf, layers, lora, mmdit

RANK, ALPHA = 3, 12.0
TARGETS = model_fields.REFERENCE_LORA_TARGETS
SIZES = mmdit.MMDiTConfig(
  sample_size=8,
  patch_size=2,
  in_channels=1,
  num_layers=2,
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=6,
  caption_projection_dim=16,
  pooled_projection_dim=6,
  out_channels=1,
  pos_embed_max_size=4,
)


def build(key, *, rank=RANK, alpha=ALPHA, init="gaussian", targets=TARGETS):
  """(graphdef, trainable, frozen) of a model with adapters."""
  model = models.build_transformer(SIZES)(key)
  lora.add_lora(model, key, rank=rank, alpha=alpha, init=init, targets=targets)
  return lora.split_trainable(model, rank=rank)


def shapes(**options):
  """The same, of shapes; nothing is computed."""
  return lora.split_trainable(nnx.eval_shape(lambda: adapted(**options)), rank=RANK)


def adapted(init="gaussian", targets=TARGETS, sizes=SIZES):
  model = models.build_transformer(sizes)(jax.random.key(0))
  key = jax.random.key(1)
  lora.add_lora(model, key, rank=RANK, alpha=ALPHA, init=init, targets=targets)
  return model


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
  return jax.tree.map(draw, tree)


@pytest.fixture(scope="module")
def small():
  """(velocity of (trainable, frozen), that of the bare weights, random trainable, random frozen)."""
  graphdef, trainable, frozen = shapes()
  base = nnx.eval_shape(models.build_transformer(SIZES), jax.random.key(0))
  base_graphdef, _, _ = lora.split_trainable(base, rank=0)
  rng = np.random.default_rng(5)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  condition = types.Condition(draw(2, 3, 6), draw(2, 6))
  x, sigma = draw(2, 8, 8, 1), jnp.asarray([0.9, 0.3])

  @jax.jit
  def velocity(trainable, frozen):
    params = {"frozen": frozen, "trainable": trainable}
    return models.velocity_fn(graphdef, params, x, sigma, condition)

  @jax.jit
  def base_velocity(frozen):
    params = {"frozen": frozen, "trainable": {}}
    return models.velocity_fn(base_graphdef, params, x, sigma, condition)

  return velocity, base_velocity, random_like(trainable, 1), random_like(frozen, 2)


def zero_b(trainable):
  """The adapters as they are at init, their B zero."""
  is_b = lambda path: path[-1].key == "lora_b"
  return jax.tree_util.tree_map_with_path(lambda p, x: x * 0 if is_b(p) else x, trainable)


def test_fresh_adapters_leave_the_output_as_it_is(small):
  velocity, base_velocity, trainable, frozen = small
  np.testing.assert_array_equal(velocity(zero_b(trainable), frozen), base_velocity(frozen))


def test_fresh_adapters_have_b_zero_and_a_not(small):
  trainable = jax.jit(lambda key: build(key)[1])(jax.random.key(0))
  for name, leaf in hf.flatten(trainable).items():
    assert bool((leaf == 0).all()) == name.endswith("lora_b"), name


def test_first_gradient_is_that_of_b_alone(small):
  velocity, _, trainable, frozen = small
  gradient = jax.grad(lambda t: jnp.sum(velocity(t, frozen) ** 2))(zero_b(trainable))
  # The last block's text stream ends in it, so nothing ever asks what its text queries attend to.
  idle = "blocks_1.attn.add_q_proj.lora_b"
  for name, leaf in hf.flatten(gradient).items():
    assert bool((leaf != 0).any()) == (name.endswith("lora_b") and name != idle), name


def test_adapter_equals_merged_weights(small):
  velocity, base_velocity, trainable, frozen = small
  merged, adapters = hf.flatten(frozen), hf.flatten(trainable)
  for name, a in adapters.items():
    if name.endswith("lora_a"):
      b = adapters[name.replace("lora_a", "lora_b")]
      merged[name.replace("lora_a", "kernel")] += ALPHA / RANK * a @ b
  merged = jax.tree_util.tree_map_with_path(
    lambda path, _: merged[".".join(p.key for p in path)], frozen
  )
  wanted = base_velocity(merged)
  assert float(jnp.abs(wanted - base_velocity(frozen)).max()) > 0.01  # the adapters do something
  # Float32 products in another order; the adapters are as large as the weights.
  np.testing.assert_allclose(velocity(trainable, frozen), wanted, rtol=1e-4, atol=1e-4)


def test_scaled_adapters_change_the_merged_weights_as_much_less():
  _, trainable, frozen = shapes()
  params = {"frozen": random_like(frozen, 3), "trainable": random_like(trainable, 4)}
  merge = lambda trainable: hf.merge_lora(params | {"trainable": trainable}, rank=RANK, alpha=ALPHA)
  whole, half, none = (merge(lora.scale(params["trainable"], a)) for a in (1.0, 0.5, 0.0))
  jax.tree.map(lambda n, p: np.testing.assert_array_equal(n, p), none, params["frozen"])
  jax.tree.map(
    lambda w, h, n: np.testing.assert_allclose(h, (w + n) / 2, rtol=1e-5, atol=1e-5),
    whole, half, none,
  )  # fmt: skip
  changed = jax.tree.map(lambda w, n: float(np.abs(w - n).max()) > 0, whole, none)
  assert any(jax.tree.leaves(changed))


def test_trainable_and_frozen_share_no_weight():
  _, trainable, frozen = shapes()
  assert not hf.flatten(trainable).keys() & hf.flatten(frozen).keys()
  assert all(name.endswith(("lora_a", "lora_b")) for name in hf.flatten(trainable))
  assert not any("lora" in name for name in hf.flatten(frozen))


def test_reference_targets_match_the_attention_of_every_tiny_block():
  sizes = models.tiny.TEXT.config
  _, trainable, _ = lora.split_trainable(nnx.eval_shape(lambda: adapted(sizes=sizes)), rank=RANK)
  names = [name for name in hf.flatten(trainable) if name.endswith("lora_a")]
  layers = {name.split(".", 2)[2].removesuffix(".lora_a") for name in names}
  image, text = ("to_q", "to_k", "to_v", "to_out"), ("add_q_proj", "add_k_proj", "add_v_proj")
  assert layers == {*image, *text, "to_add_out"}
  # The first three blocks are one stack; the last block's text stream has no output.
  assert len(names) == 8 + 7


def test_target_may_be_the_end_of_a_name():
  _, trainable, _ = shapes(targets=("ff.net.0.proj", "proj_out"))
  names = {name for name in hf.flatten(trainable) if name.endswith("lora_a")}
  assert names == {
    "blocks_0.ff.linear_1.lora_a",
    "blocks_1.ff.linear_1.lora_a",
    "proj_out.lora_a",
  }


def test_unmatched_targets_are_all_named():
  with pytest.raises(ValueError) as caught:
    shapes(targets=("attn.to_q", "attn.to_z", "mlp"))
  message = str(caught.value)
  assert "lora.targets: attn.to_z, mlp" in message
  assert "'attn.to_q', 'attn.to_out.0' or 'ff.net.0.proj'" in message


def test_unknown_init_is_refused():
  with pytest.raises(ValueError, match="lora.init='normal': must be 'gaussian' or 'kaiming'"):
    shapes(init="normal")


def test_merge_trees_refuses_a_shared_leaf():
  with pytest.raises(ValueError, match="share a leaf"):
    lora.merge_trees({"a": {"b": 1}}, {"a": {"b": 2}})


@pytest.mark.parity
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_adapter_shapes_and_spread_are_those_of_peft(init):
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  wide, rank = 256, 8
  torch.manual_seed(0)
  theirs = peft.get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(wide, wide)),
    peft.LoraConfig(
      r=rank, lora_alpha=16, target_modules=["0"],
      init_lora_weights="gaussian" if init == "gaussian" else True,
    ),
  ).base_model.model[0]  # fmt: skip
  theirs_a = theirs.lora_A["default"].weight.detach().numpy().T
  ours_a = np.asarray(lora._init_a(jax.random.key(0), (wide, rank), init))
  assert ours_a.shape == theirs_a.shape
  assert theirs.scaling["default"] == 16 / rank
  # 2048 draws: the sample's spread is within 3 / sqrt(2 x 2048) = 5 % of the law's, twice.
  assert ours_a.std() == pytest.approx(theirs_a.std(), rel=0.1)
  if init == "kaiming":
    assert np.abs(ours_a).max() == pytest.approx(np.abs(theirs_a).max(), rel=0.02)


def test_adapters_of_one_input_share_their_first_product_and_change_nothing():
  rngs, draw = nnx.Rngs(0), lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  linears = [layers.Linear(8, 6, dtype=jnp.float32, rngs=rngs) for _ in range(3)]
  for i in (0, 2):  # the one between them has none
    linears[i] = adapter_layers.LoraLinear(linears[i], draw(i, 8, RANK), draw(i + 5, RANK, 6), 2.0)
  x = draw(9, 4, 5, 8)
  wanted = [linear(x) for linear in linears]
  for found, alone in zip(adapter_layers.together(x, *linears), wanted, strict=True):
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
  dots = lambda function: str(jax.make_jaxpr(function)(x)).count("dot_general")
  assert dots(lambda x: adapter_layers.together(x, *linears)) == 3 + 1 + 2
  assert dots(lambda x: [linear(x) for linear in linears]) == 3 + 2 + 2
