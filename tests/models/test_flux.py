"""The Flux transformer computes what diffusers' FluxTransformer2DModel computes, with the same weights."""

import functools
import json
import pathlib

from families import random_like
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import models, types
from tpgrpo_jax.models import flux, hf, lora, rotary
from tpgrpo_jax.models.hf import flux as table

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = ("dev_like", "schnell_like", "one_token", "more_channels_out")
# Float32 sums over widths of 16 to 120, in another order than torch's, through up to four blocks.
TOLERANCE = 1e-4
INPUTS = ("x", "sigma", "text", "pooled")
SMALL = flux.FluxConfig(
  in_channels=16,
  out_channels=16,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=16,
  num_attention_heads=4,
  joint_attention_dim=24,
  pooled_projection_dim=20,
  guidance_embeds=True,
  axes_dims_rope=(4, 6, 6),
)
# Those of Flow-GRPO for FLUX: every matrix of the double blocks' attention and feed-forward.
TARGETS = (
  "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
  "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
  "ff_context.net.2",
)  # fmt: skip


@functools.cache
def split(config, *, rank=0, targets=TARGETS, **options):
  """(graphdef, shapes of the trainable weights, of the frozen ones)."""

  def create():
    model = flux.Flux(config, rngs=nnx.Rngs(0), **options)
    if rank:
      add = functools.partial(lora.add_lora, rank=rank, alpha=8.0, init="gaussian")
      add(model, jax.random.key(0), targets=targets)
    return model

  return lora.split_trainable(nnx.eval_shape(create), rank=rank)


def entries_of(config, tree):
  return table.names(config, {k: tuple(v.shape) for k, v in hf.flatten(tree).items()})


def to_diffusers(config, params):
  """Our weights under diffusers' names."""
  flat = hf.flatten(params)
  pick = lambda e: flat[e.path] if e.block is None else flat[e.path][e.block]
  return {e.name: np.ascontiguousarray(e.to_foreign(pick(e))) for e in entries_of(config, params)}


def from_diffusers(config, tensors, abstract):
  """Their tensors in our tree; each of them is wanted, and none is missing or misshapen."""
  entries = entries_of(config, abstract)
  assert {e.name: e.shape for e in entries} == {k: v.shape for k, v in tensors.items()}
  flat = {k: np.empty(v.shape, np.float32) for k, v in hf.flatten(abstract).items()}
  for e in entries:
    flat[e.path][() if e.block is None else e.block] = e.from_foreign(tensors[e.name])
  return jax.tree_util.tree_map_with_path(
    lambda path, _: flat[".".join(k.key for k in path)], abstract
  )


def bind(config, tensors, **options):
  """(x, sigma, text, pooled) -> velocity of the model with diffusers' tensors."""
  graphdef, abstract, _ = split(config, **options)
  weights = from_diffusers(config, tensors, abstract)

  @jax.jit
  def velocity(weights, x, sigma, text, pooled):
    params = {"frozen": {}, "trainable": weights}
    return models.velocity_fn(graphdef, params, x, sigma, types.Condition(text, pooled))

  return functools.partial(velocity, weights)


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "flux.npz")


def golden_model(golden, case, **options):
  prefix = f"{case}/weights/"
  keys = [key for key in golden.files if key.startswith(prefix)]
  tensors = {key.removeprefix(prefix): golden[key].astype(np.float32) for key in keys}
  config = flux.FluxConfig.from_diffusers(json.loads(str(golden[f"{case}/config"])))
  return bind(config, tensors, guidance=json.loads(str(golden[f"{case}/guidance"])), **options)


def relative_error(found, wanted):
  return np.abs(np.asarray(found, np.float32) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_diffusers_on_golden_data(golden, case):
  found = golden_model(golden, case)(*(golden[f"{case}/{name}"] for name in INPUTS))
  assert relative_error(found, golden[f"{case}/velocity"]) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (GOLDEN / "make_flux.py").read_text()


def test_bfloat16_model_returns_float32_near_the_float32_one(golden):
  run = golden_model(golden, "dev_like", dtype=jnp.bfloat16)
  found = run(*(golden[f"dev_like/{name}"] for name in INPUTS))
  assert found.dtype == jnp.float32
  # 2^-8 a rounding, through some forty independent ones: 2^-8 sqrt(40) = 0.025. Measured: 0.013.
  assert relative_error(found, golden["dev_like/velocity"]) < 0.03


def draw_inputs(config, height, width, tokens=7, batch=3):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  sigma = rng.uniform(size=batch).astype(np.float32)
  text = draw(batch, tokens, config.joint_attention_dim)
  pooled = draw(batch, config.pooled_projection_dim)
  return draw(batch, height, width, config.in_channels // 4), sigma, text, pooled


def jitted(rank, **options):
  """(velocity, (loss, velocity) with gradient, weights) of SMALL, as functions of weights and inputs."""
  graphdef, *shapes = split(SMALL, rank=rank, guidance=3.5, **options)
  trainable, frozen = (random_like(tree, seed) for seed, tree in enumerate(shapes))

  def velocity(trainable, x, sigma, text, pooled):
    params = {"frozen": frozen, "trainable": trainable}
    return models.velocity_fn(graphdef, params, x, sigma, types.Condition(text, pooled))

  def loss(trainable, *inputs):
    value = velocity(trainable, *inputs)
    return jnp.mean(value**2), value

  return jax.jit(velocity), jax.jit(jax.value_and_grad(loss, has_aux=True)), trainable


@pytest.mark.parametrize("rank, remat", [(0, "none"), (4, "none"), (4, "full")])
def test_forward_inside_value_and_grad_is_bit_identical_to_forward_alone(rank, remat):
  """The first update must see a log-ratio of exactly 0."""
  velocity, gradient, weights = jitted(rank, remat=remat)
  inputs = draw_inputs(SMALL, 8, 12, batch=8)
  (_, inside), _ = gradient(weights, *inputs)
  np.testing.assert_array_equal(velocity(weights, *inputs), inside)


@functools.cache
def weight_gradient(remat):
  _, gradient, weights = jitted(0, remat=remat)
  return gradient(weights, *draw_inputs(SMALL, 4, 6))[1]


@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_rematerialisation_leaves_the_gradient_alone(remat):
  wanted = weight_gradient("none")
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * scale)
  jax.tree.map(close, weight_gradient(remat), wanted)


def test_every_weight_has_a_gradient():
  for path, leaf in jax.tree.leaves_with_path(weight_gradient("none")):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_unpacking_undoes_packing():
  x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  np.testing.assert_array_equal(flux.unpack_latents(flux.pack_latents(x), 4, 6), x)


def test_a_token_holds_a_square_of_pixels_channel_by_channel():
  row, column, channel = np.meshgrid(range(4), range(6), range(3), indexing="ij")
  x = (100 * channel + 10 * row + column)[None]
  second = flux.pack_latents(jnp.asarray(x))[0, 1]  # rows 0 and 1, columns 2 and 3
  assert second.tolist() == [2, 3, 12, 13, 102, 103, 112, 113, 202, 203, 212, 213]


@pytest.fixture(scope="module")
def turned():
  """One random head of a query and of a key on every token, turned; [L + h w, D] each."""
  cos, sin = flux.rotary_tables((4, 6, 6), 3, 4, 5)
  q, k = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
  spread = lambda a: jnp.broadcast_to(a, (1, len(cos), 1, 16))
  return q, k, *(rotary.rotate(spread(a), cos, sin)[0, :, 0] for a in (q, k))


def test_text_is_not_turned(turned):
  q, _, turned_q, _ = turned
  np.testing.assert_array_equal(turned_q[:3], np.broadcast_to(q, (3, 16)))


def test_turned_products_depend_on_the_distance_of_tokens_alone(turned):
  _, _, q, k = turned
  q, k = q[3:].reshape(4, 5, 16), k[3:].reshape(4, 5, 16)
  products = [q[i, j] @ k[i + 1, j + 2] for i in range(3) for j in range(3)]
  np.testing.assert_allclose(products, products[0], rtol=1e-5)
  assert abs(q[0, 0] @ k[1, 1] - products[0]) > 1e-2


def test_gradient_of_rotation_is_that_of_the_plain_formula():
  cos, sin = flux.rotary_tables((2, 2, 4), 2, 2, 3)
  x, dy = jax.random.normal(jax.random.key(0), (2, 3, len(cos), 2, 8))

  def plain(x):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)[:, None, 1::2]
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

  found, pull = jax.vjp(lambda x: rotary.rotate(x, cos, sin), x)
  wanted, plain_pull = jax.vjp(plain, x)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(pull(dy)[0], plain_pull(dy)[0], rtol=1e-5, atol=1e-6)


def make_model(guidance_embeds, guidance):
  """guidance of a call -> velocity of a very small model with that guidance of its own."""
  config = flux.FluxConfig(
    in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=6,
    num_attention_heads=1, joint_attention_dim=3, pooled_projection_dim=3,
    guidance_embeds=guidance_embeds, axes_dims_rope=(2, 2, 2),
  )  # fmt: skip
  graphdef, shapes, _ = split(config, guidance=guidance)
  weights = random_like(shapes, 0)

  @jax.jit
  def velocity(guidance=None):
    return nnx.merge(graphdef, weights)(*draw_inputs(config, 2, 4, batch=2), guidance)

  return velocity


def test_guidance_of_a_call_takes_the_place_of_the_models_own():
  bound, other = make_model(True, 3.5), make_model(True, 1.0)
  wanted = bound()
  np.testing.assert_array_equal(other(3.5), wanted)
  np.testing.assert_array_equal(other(np.asarray([3.5, 1.0]))[0], wanted[0])
  assert np.abs(other() - wanted).max() > 1e-4


def test_a_model_that_is_told_its_guidance_must_be_given_one():
  with pytest.raises(ValueError, match=r"guidance=None.*such as 3\.5"):
    make_model(True, None)()


def test_a_model_without_guidance_embedding_refuses_one():
  with pytest.raises(ValueError, match=r"guidance=3\.5.*guidance_embeds is.*Leave guidance None"):
    make_model(False, 3.5)
  with pytest.raises(ValueError, match=r"guidance=.*Leave guidance None"):
    make_model(False, None)(2.0)


@pytest.mark.parametrize("shape", [(4, 5, 4), (3, 4, 4), (4, 4, 3)])
def test_latent_that_does_not_pack_is_refused(golden, shape):
  inputs = [golden[f"schnell_like/{name}"] for name in INPUTS[1:]]
  rule = r"latent . x . x .: sides must be even, and channels in_channels / 4 = 4"
  with pytest.raises(ValueError, match=rule):
    golden_model(golden, "schnell_like")(np.zeros((2, *shape), np.float32), *inputs)


@pytest.mark.parametrize(
  "field, value, rule",
  [
    ("patch_size", 2, "must be 1"),
    ("in_channels", 62, "must be a multiple of 4"),
    ("num_single_layers", 0, "must be at least 1"),
    ("axes_dims_rope", [2, 4], "three even numbers that add up to attention_head_dim=8"),
    ("axes_dims_rope", [2, 3, 3], "three even numbers"),
    ("axes_dims_rope", [2, 2, 2], "three even numbers"),
    ("dual_attention_layers", [0], "not fields of FluxTransformer2DModel"),
  ],
)
def test_config_of_another_kind_of_model_is_refused(golden, field, value, rule):
  raw = json.loads(str(golden["dev_like/config"])) | {field: value}
  with pytest.raises(ValueError, match=field) as caught:
    flux.FluxConfig.from_diffusers(raw)
  assert rule in str(caught.value)


def test_config_of_the_hub_leaves_defaults_to_the_model():
  raw = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True, "out_channels": None}
  assert flux.FluxConfig.from_diffusers(raw) == flux.FluxConfig(guidance_embeds=True)


def test_weights_survive_the_way_to_diffusers_layout_and_back_bit_for_bit():
  _, abstract, _ = split(SMALL)
  params = random_like(abstract, 0)
  back = from_diffusers(SMALL, to_diffusers(SMALL, params), abstract)
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
  "target, count",
  [("attn.to_q", 2), ("attn.to_out.0", 1), ("attn.add_q_proj", 1), ("ff_context.net.2", 1),
   ("proj_mlp", 1), ("proj_out", 2), ("norm1.linear", 1), ("time_text_embed.guidance_embedder.linear_1", 1)],
)  # fmt: skip
def test_adapters_are_put_beside_layers_of_diffusers_names(target, count):
  _, trainable, _ = split(SMALL, rank=2, targets=(target,))
  # One stack of double blocks, one of single blocks, and layers of their own.
  assert len([path for path in hf.flatten(trainable) if path.endswith("lora_a")]) == count


def diffusers_velocity(model, x, sigma, text, pooled, guidance):
  """As the golden data were made."""
  script = {"__name__": "golden"}
  exec((GOLDEN / "make_flux.py").read_text(), script)
  return script["evaluate"](model, x, sigma, text, pooled, guidance)


@pytest.mark.parity
@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize(
  "layers, singles, size, tokens",
  [(1, 1, (4, 4), 7), (2, 3, (6, 10), 1), (3, 1, (2, 14), 20), (1, 2, (8, 2), 5)],
)
def test_velocity_equals_live_diffusers(layers, singles, size, tokens, guidance):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  torch.manual_seed(layers)
  theirs = diffusers.FluxTransformer2DModel(
    in_channels=12, num_layers=layers, num_single_layers=singles, attention_head_dim=16,
    num_attention_heads=3, joint_attention_dim=20, pooled_projection_dim=24,
    guidance_embeds=guidance is not None, axes_dims_rope=(4, 6, 6),
  ).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  config = flux.FluxConfig.from_diffusers(theirs.config)
  tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
  run = bind(config, tensors, guidance=guidance)
  inputs = draw_inputs(config, *size, tokens=tokens)
  wanted = diffusers_velocity(theirs, *inputs, guidance)
  assert relative_error(run(*inputs), wanted) < TOLERANCE


@pytest.mark.parity
def test_saved_model_in_diffusers_has_the_same_output(tmp_path):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  _, abstract, _ = split(SMALL)
  tensors = to_diffusers(SMALL, random_like(abstract, 3))
  safetensors.numpy.save_file(tensors, tmp_path / hf.WEIGHTS_FILE, metadata={"format": "pt"})
  raw = {"_class_name": "FluxTransformer2DModel", **SMALL.__dict__}
  (tmp_path / hf.CONFIG_FILE).write_text(json.dumps(raw))
  theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).eval()
  inputs = draw_inputs(SMALL, 6, 10)
  found = bind(SMALL, tensors, guidance=3.5)(*inputs)
  assert relative_error(found, diffusers_velocity(theirs, *inputs, 3.5)) < TOLERANCE
