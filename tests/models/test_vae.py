"""The autoencoder computes what diffusers' AutoencoderKL computes, with the same weights."""

import json
import math
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.models import hf, vae
from tpgrpo_jax.models.hf import vae as hf_vae
from tpgrpo_jax.training import mesh as mesh_lib

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = ("sd3_like", "quant_convs", "no_attention", "sides_left_over")
# Float32 sums of up to 200 terms, in another order than torch's, through up to 16 convolutions.
TOLERANCE = 1e-4
TRUE_SIZES = dict(
  block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
  norm_num_groups=32, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False,
  down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip
TRUE_CONFIGS = {
  "sd3": TRUE_SIZES | dict(scaling_factor=1.5305, shift_factor=0.0609),
  "flux": TRUE_SIZES | dict(scaling_factor=0.3611, shift_factor=0.1159),
}


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "vae.npz")


def abstract_model(config, dtype=jnp.float32):
  """(structure, nested dict of shapes)."""
  abstract = nnx.eval_shape(models.build_autoencoder(config, dtype=dtype), jax.random.key(0))
  graphdef, params = nnx.split(abstract)
  return graphdef, nnx.to_pure_dict(params)


def table(config):
  shapes = {k: v.shape for k, v in hf.flatten(abstract_model(config)[1]).items()}
  return hf_vae.names(config, shapes)


def load(config, tensors, dtype=jnp.float32):
  """(structure, weights) from a dict of diffusers' tensors, which must be exactly those wanted."""
  entries = table(config)
  assert {e.name: e.shape for e in entries} == {k: v.shape for k, v in tensors.items()}
  loaded = {e.path: jnp.asarray(e.from_foreign(tensors[e.name])) for e in entries}
  graphdef, abstract = abstract_model(config, dtype)
  name = lambda path: ".".join(str(key.key) for key in path)
  return graphdef, jax.tree_util.tree_map_with_path(lambda p, _: loaded[name(p)], abstract)


def golden_model(golden, case, dtype=jnp.float32):
  config = vae.VAEConfig.from_diffusers(json.loads(str(golden[f"{case}/config"])))
  shapes = json.loads(str(golden[f"{case}/shapes"]))
  flat = golden[f"{case}/weights"].astype(np.float32)
  parts = np.split(flat, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
  tensors = {name: p.reshape(shape) for (name, shape), p in zip(shapes.items(), parts)}
  return load(config, tensors, dtype)


def relative_error(found, wanted):
  return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


def unit(pixels):
  return np.clip(pixels * 0.5 + 0.5, 0.0, 1.0)


def jitted(function, graphdef):
  return jax.jit(lambda *args: function(graphdef, *args))


@pytest.mark.parametrize("case", CASES)
def test_decoded_images_equal_diffusers_on_golden_data(golden, case):
  graphdef, params = golden_model(golden, case)
  found = jitted(vae.decode, graphdef)(params, golden[f"{case}/latents"])
  wanted = unit(golden[f"{case}/decoded"])
  assert found.dtype == jnp.float32
  assert relative_error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_encoded_latents_equal_diffusers_on_golden_data(golden, case):
  graphdef, params = golden_model(golden, case)
  found = jitted(vae.encode, graphdef)(params, golden[f"{case}/images"])
  assert relative_error(found, golden[f"{case}/encoded"]) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (GOLDEN / "make_vae.py").read_text()


def test_drawn_latents_are_the_mean_plus_noise_of_the_posteriors_std(golden):
  graphdef, params = golden_model(golden, "sd3_like")
  key = jax.random.key(4)
  images = golden["sd3_like/images"]
  found = jitted(vae.encode, graphdef)(params, images, key)
  mean, std = golden["sd3_like/encoded"], golden["sd3_like/std"]
  wanted = mean + std * np.asarray(jax.random.normal(key, mean.shape))
  assert relative_error(found, wanted) < TOLERANCE


def test_bfloat16_decoder_returns_float32_near_the_float32_one(golden):
  graphdef, params = golden_model(golden, "sd3_like", dtype=jnp.bfloat16)
  found = jitted(vae.decode, graphdef)(params, golden["sd3_like/latents"])
  assert found.dtype == jnp.float32
  error = np.abs(np.asarray(found) - unit(golden["sd3_like/decoded"]))
  # Eight bits of mantissa through some thirty roundings of values of size 1.
  assert error.max() < 0.1
  assert error.mean() < 0.01


def test_attention_does_not_depend_on_how_many_rows_are_computed_at_a_time(monkeypatch):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 5, 8))
  tokens = lambda a: a.reshape(2, 30, 1, 8)
  wanted = jax.nn.dot_product_attention(tokens(q), tokens(k), tokens(v)).reshape(q.shape)
  for queries in (1, 14, 1024):  # 1, 2 and 6 rows
    monkeypatch.setattr(vae, "_QUERIES", queries)
    found = jax.jit(lambda *args: vae._attend(*args))(q, k, v)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_group_norm_of_a_large_offset_keeps_its_digits():
  x = 100.0 + jax.random.normal(jax.random.key(0), (1, 128, 128, 8))
  y = np.asarray(x, np.float64).reshape(1, -1, 2, 4)
  y = (y - y.mean((1, 3), keepdims=True)) / y.std((1, 3), keepdims=True)
  found = vae.GroupNorm(8, 2, rngs=nnx.Rngs(0))(x)
  # An input of 100 has an ulp of 8e-6, and the mean is within a few of them.
  np.testing.assert_allclose(found, y.reshape(x.shape), atol=5e-5)


@pytest.fixture(scope="module")
def batch_of_seven(golden):
  graphdef, params = golden_model(golden, "sd3_like")
  latents = jax.random.normal(jax.random.key(1), (7, 6, 4, 4))
  return graphdef, params, latents, np.asarray(jitted(vae.decode, graphdef)(params, latents))


@pytest.mark.parametrize("images_per_chunk", [1, 3, 4, 7])
def test_decoding_in_chunks_equals_decoding_at_once(batch_of_seven, images_per_chunk):
  graphdef, params, latents, whole = batch_of_seven
  decode = lambda params, x: vae.decode_chunked(
    graphdef, params, x, images_per_chunk=images_per_chunk
  )
  # The same sums; only their order may depend on the batch size.
  np.testing.assert_allclose(jax.jit(decode)(params, latents), whole, rtol=0, atol=1e-5)


def test_less_than_one_image_per_chunk_is_refused(batch_of_seven):
  graphdef, params, latents, _ = batch_of_seven
  with pytest.raises(ValueError, match="images_per_chunk=0: must be at least 1"):
    vae.decode_chunked(graphdef, params, latents, images_per_chunk=0)


@pytest.fixture(scope="module")
def batch_of_24(golden):
  graphdef, params = golden_model(golden, "sd3_like")
  latents = jax.random.normal(jax.random.key(2), (24, 3, 5, 4))
  return graphdef, params, latents, np.asarray(jitted(vae.decode, graphdef)(params, latents))


@pytest.mark.parametrize(
  "shape, images_per_chunk", [((8, 1, 1), 2), ((2, 2, 2), 4), ((1, 4, 2), 100)]
)
def test_decoding_on_a_mesh_equals_that_of_a_single_device(batch_of_24, shape, images_per_chunk):
  graphdef, params, latents, wanted = batch_of_24
  mesh = mesh_lib.make_mesh(config_lib.Mesh(*shape))

  @jax.jit
  def decode(params, latents):
    return vae.decode_chunked(graphdef, params, latents, images_per_chunk=images_per_chunk)

  with jax.set_mesh(mesh):
    placed = jax.device_put(params, mesh_lib.param_shardings(mesh, params))
    found = decode(placed, jax.device_put(latents, mesh_lib.batch_sharding(mesh)))
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
  assert found.sharding.shard_shape(found.shape)[0] == 24 // mesh_lib.batch_shards(mesh)


def test_batch_that_does_not_divide_over_the_mesh_is_refused(batch_of_24):
  graphdef, params, latents, _ = batch_of_24
  with jax.set_mesh(mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))):
    with pytest.raises(ValueError, match="7 latents: must be a multiple of the mesh's 4 shards"):
      vae.decode_chunked(graphdef, params, latents[:7], images_per_chunk=1)


def test_encoding_on_a_mesh_equals_that_of_a_single_device(golden):
  graphdef, params = golden_model(golden, "sd3_like")
  images = jax.random.uniform(jax.random.key(3), (8, 6, 10, 3))
  wanted = jitted(vae.encode, graphdef)(params, images)
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, mesh_lib.param_shardings(mesh, params))
    batch = jax.device_put(images, mesh_lib.batch_sharding(mesh))
    found = jitted(vae.encode, graphdef)(placed, batch)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_survives_the_way_to_diffusers_layout_and_back(golden, case):
  config = vae.VAEConfig.from_diffusers(json.loads(str(golden[f"{case}/config"])))
  entries = table(config)
  stored = {k: tuple(v) for k, v in json.loads(str(golden[f"{case}/shapes"])).items()}
  assert {e.name: e.shape for e in entries} == stored
  assert len({e.path for e in entries}) == len(entries) == len(stored)
  rng = np.random.default_rng(0)
  for entry in entries:
    theirs = rng.standard_normal(entry.shape)
    np.testing.assert_array_equal(entry.to_foreign(entry.from_foreign(theirs)), theirs)


def test_attention_of_old_checkpoints_is_found_under_its_present_name():
  block = "decoder.mid_block.attentions.0"
  assert hf_vae.current_name(f"{block}.query.weight") == f"{block}.to_q.weight"
  assert hf_vae.current_name(f"{block}.proj_attn.bias") == f"{block}.to_out.0.bias"
  assert hf_vae.current_name(f"{block}.group_norm.bias") == f"{block}.group_norm.bias"


@pytest.mark.parametrize("name", TRUE_CONFIGS)
def test_true_configurations_have_the_known_number_of_weights(name):
  config = vae.VAEConfig.from_diffusers(TRUE_CONFIGS[name])
  assert config.downscale == 8
  leaves = jax.tree.leaves(abstract_model(config)[1])
  assert sum(leaf.size for leaf in leaves) == 83_819_683  # of diffusers' model


@pytest.mark.parametrize(
  "field, value, rule",
  [
    ("block_out_channels", (8, 18), "must be one or more multiples of norm_num_groups=4"),
    ("act_fn", "relu", "must be 'silu'"),
    ("latents_mean", [0.1], "must be None"),
    ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], "must be 'UpDecoderBlock2D'"),
    ("down_block_types", ["DownEncoderBlock2D"], "for each of block_out_channels=(8, 16)"),
    ("num_single_layers", 2, "not fields of AutoencoderKL"),
  ],
)
def test_config_of_another_kind_of_model_is_refused(golden, field, value, rule):
  raw = json.loads(str(golden["sd3_like/config"])) | {field: value}
  with pytest.raises(ValueError, match=field) as caught:
    vae.VAEConfig.from_diffusers(raw)
  assert rule in str(caught.value)


def diffusers_model(torch, diffusers, config, seed):
  depth = len(config["block_out_channels"])
  torch.manual_seed(seed)
  model = diffusers.AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * depth,
    up_block_types=("UpDecoderBlock2D",) * depth,
    **config,
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return model


@pytest.mark.parity
@pytest.mark.parametrize("attention, quant", [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize(
  "widths, layers, size",
  [((16, 32), 2, (14, 10)), ((8, 16, 24, 24), 1, (24, 56)), ((32,), 1, (3, 5)),
   ((16, 8, 16), 1, (36, 12))],
)  # fmt: skip
def test_both_ways_equal_live_diffusers(widths, layers, size, quant, attention):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  raw = dict(
    block_out_channels=widths, layers_per_block=layers, latent_channels=4, norm_num_groups=8,
    use_quant_conv=quant, use_post_quant_conv=quant, mid_block_add_attention=attention,
    scaling_factor=1.3, shift_factor=0.2,
  )  # fmt: skip
  theirs = diffusers_model(torch, diffusers, raw, seed=layers)
  config = vae.VAEConfig.from_diffusers(theirs.config)
  graphdef, params = load(config, {k: v.numpy() for k, v in theirs.state_dict().items()})
  images = np.random.default_rng(0).uniform(size=(3, *size, 3)).astype(np.float32)
  with torch.no_grad():
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()) * 2 - 1
    wanted = (theirs.encode(pixels).latent_dist.mean - 0.2) * 1.3
    decoded = theirs.decode(wanted / 1.3 + 0.2).sample.numpy().transpose(0, 2, 3, 1)
  wanted = wanted.numpy().transpose(0, 2, 3, 1)
  assert relative_error(jitted(vae.encode, graphdef)(params, images), wanted) < TOLERANCE
  found = jitted(vae.decode, graphdef)(params, wanted)
  assert np.abs(np.asarray(found) - unit(decoded)).max() < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("name", TRUE_CONFIGS)
def test_every_tensor_of_the_true_models_is_mapped(name):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  with torch.device("meta"):
    theirs = diffusers.AutoencoderKL(**TRUE_CONFIGS[name])
  entries = table(vae.VAEConfig.from_diffusers(theirs.config))
  wanted = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
  assert {e.name: e.shape for e in entries} == wanted
  assert len(entries) == len(wanted)


@pytest.mark.parity
def test_saved_by_our_table_the_model_has_the_same_output_in_diffusers(golden):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  raw = json.loads(str(golden["sd3_like/config"]))
  config = vae.VAEConfig.from_diffusers(raw)
  graphdef, params = nnx.split(models.build_autoencoder(config)(jax.random.key(5)))
  params = nnx.to_pure_dict(params)
  flat = hf.flatten(params)
  state = {e.name: torch.tensor(e.to_foreign(np.asarray(flat[e.path]))) for e in table(config)}
  theirs = diffusers.AutoencoderKL.from_config(raw).eval()
  theirs.load_state_dict(state)
  latents = np.random.default_rng(6).standard_normal((2, 5, 3, 4)).astype(np.float32)
  with torch.no_grad():
    z = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    wanted = theirs.decode(z / config.scaling_factor + config.shift_factor).sample.numpy()
  found = jitted(vae.decode, graphdef)(params, latents)
  assert np.abs(np.asarray(found) - unit(wanted.transpose(0, 2, 3, 1))).max() < TOLERANCE
