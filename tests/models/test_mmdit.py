"""The MMDiT computes what diffusers' SD3Transformer2DModel computes, with the same weights."""

import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import models, types
from tpgrpo_jax.models import hf, lora, mmdit, tiny

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = ("one_block", "sd35_medium_like", "last_block_dual", "tiny_like", "more_channels_out")
# Float32 sums over widths of 16 to 128, in another order than torch's, through up to four blocks.
TOLERANCE = 1e-4
INPUTS = ("x", "sigma", "text", "pooled")


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "mmdit.npz")


def load(folder, **options):
  """((x, sigma, text, pooled) -> velocity, sizes) of a folder in diffusers' layout."""
  config = hf.load_config(folder)
  create = models.build_transformer(config, **options)
  abstract = nnx.eval_shape(create, jax.random.key(0))
  graphdef, trainable, buffers = lora.split_trainable(abstract, rank=0)
  weights = hf.load_transformer(folder, lora.merge_trees(trainable, buffers))

  @jax.jit
  def velocity(weights, x, sigma, text, pooled):
    params = {"frozen": {}, "trainable": weights}
    return models.velocity_fn(graphdef, params, x, sigma, types.Condition(text, pooled))

  return functools.partial(velocity, weights), config


def write_golden_model(golden, case, folder):
  prefix = f"{case}/weights/"
  keys = [key for key in golden.files if key.startswith(prefix)]
  tensors = {key.removeprefix(prefix): golden[key].astype(np.float32) for key in keys}
  safetensors.numpy.save_file(tensors, folder / hf.WEIGHTS_FILE)
  (folder / hf.CONFIG_FILE).write_text(str(golden[f"{case}/config"]))
  return folder


def relative_error(found, wanted):
  return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_diffusers_on_golden_data(golden, case, tmp_path):
  run, _ = load(write_golden_model(golden, case, tmp_path))
  found = run(*(golden[f"{case}/{name}"] for name in INPUTS))
  assert relative_error(found, golden[f"{case}/velocity"]) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (GOLDEN / "make_mmdit.py").read_text()


@pytest.mark.parametrize("case", CASES)
def test_position_table_is_diffusers_own(golden, case):
  config = json.loads(str(golden[f"{case}/config"]))
  size, patch = config["pos_embed_max_size"], config["patch_size"]
  found = mmdit.sincos_positions(16, size, config["sample_size"] // patch)
  stored = golden[f"{case}/weights/pos_embed.pos_embed"].reshape(found.shape)
  np.testing.assert_allclose(found, stored, atol=1e-6)  # sines of float64 angles, rounded once


@pytest.fixture(scope="module")
def text_gradient(golden, tmp_path_factory):
  """Remat policy -> gradient of the sum of squared velocities with respect to the text."""
  folder = write_golden_model(golden, "one_block", tmp_path_factory.mktemp("one_block"))
  x, sigma, text, pooled = (golden[f"one_block/{name}"] for name in INPUTS)

  def gradient(remat):
    run, _ = load(folder, remat=remat)
    return np.asarray(jax.grad(lambda text: jnp.sum(run(x, sigma, text, pooled) ** 2))(text))

  return gradient


@pytest.fixture(scope="module")
def plain_text_gradient(text_gradient):
  return text_gradient("none")


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_leaves_the_gradient_alone(text_gradient, plain_text_gradient, remat):
  assert relative_error(text_gradient(remat), plain_text_gradient) < 1e-5


def test_bfloat16_model_returns_float32_near_the_float32_one(golden, tmp_path):
  run, _ = load(write_golden_model(golden, "sd35_medium_like", tmp_path), dtype=jnp.bfloat16)
  found = run(*(golden[f"sd35_medium_like/{name}"] for name in INPUTS))
  assert found.dtype == jnp.float32
  # Eight bits of mantissa, through some forty roundings.
  assert relative_error(found, golden["sd35_medium_like/velocity"]) < 0.1


@pytest.mark.parametrize("size", [(8, 13), (14, 8)])
def test_latent_that_does_not_fit_the_patches_is_refused(golden, size, tmp_path):
  run, _ = load(write_golden_model(golden, "one_block", tmp_path))
  with pytest.raises(ValueError, match=r"multiples of patch_size=2 and at most .* = 12"):
    run(np.zeros((1, *size, 4), np.float32), np.ones(1), np.zeros((1, 5, 12)), np.zeros((1, 10)))


@pytest.mark.parametrize(
  "field, value, rule",
  [
    ("caption_projection_dim", 20, "must equal num_attention_heads x attention_head_dim = 16"),
    ("qk_norm", "layer_norm", "must be 'rms_norm' or null"),
    ("num_single_layers", 2, "not fields of SD3Transformer2DModel"),
  ],
)
def test_config_of_another_kind_of_model_is_refused(golden, field, value, rule):
  raw = json.loads(str(golden["one_block/config"])) | {field: value}
  with pytest.raises(ValueError, match=field) as caught:
    mmdit.MMDiTConfig.from_diffusers(raw)
  assert rule in str(caught.value)


def diffusers_velocity(model, x, sigma, text, pooled):
  import torch

  with torch.no_grad():
    velocity = model(
      hidden_states=torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
      encoder_hidden_states=torch.from_numpy(np.asarray(text)),
      pooled_projections=torch.from_numpy(np.asarray(pooled)),
      timestep=torch.from_numpy(1000 * sigma),
    ).sample
  return velocity.numpy().transpose(0, 2, 3, 1)


def random_inputs(config, height, width, tokens=7, batch=3):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  sigma = rng.uniform(size=batch).astype(np.float32)
  text = draw(batch, tokens, config.joint_attention_dim)
  pooled = draw(batch, config.pooled_projection_dim)
  return draw(batch, height, width, config.in_channels), sigma, text, pooled


@pytest.mark.parity
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize(
  "dual, patch, size",
  [((), 2, (6, 10)), ((0,), 4, (16, 16)), ((0, 2), 1, (5, 3)), ((), 8, (24, 48))],
)
def test_velocity_equals_live_diffusers(layers, qk_norm, dual, patch, size, tmp_path):
  torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
  torch.manual_seed(layers)
  theirs = diffusers.SD3Transformer2DModel(
    num_layers=layers, patch_size=patch, in_channels=3, out_channels=3, sample_size=6 * patch,
    pos_embed_max_size=8, qk_norm=qk_norm, dual_attention_layers=tuple(d for d in dual if d < layers),
    attention_head_dim=16, num_attention_heads=3, caption_projection_dim=48,
    joint_attention_dim=20, pooled_projection_dim=24,
  ).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path)
  run, config = load(tmp_path)
  inputs = random_inputs(config, *size)
  assert relative_error(run(*inputs), diffusers_velocity(theirs, *inputs)) < TOLERANCE


SHIPPED = {"tiny": ["CAT3", "XY7", ""], "tiny_shapes": ["a red circle", "two blue crosses", ""]}


@pytest.mark.parity
@pytest.mark.parametrize("variant", SHIPPED)
def test_shipped_model_in_diffusers_has_the_same_output(variant):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  built_in = tiny.BUILT_IN[variant]
  theirs = diffusers.SD3Transformer2DModel.from_pretrained(built_in.folder).eval()
  run, config = load(built_in.folder)
  condition = built_in.encode(config, SHIPPED[variant])
  rng = np.random.default_rng(2)
  x = rng.standard_normal((3, *built_in.latent_shape)).astype(np.float32)
  inputs = (x, np.asarray([1.0, 0.6, 0.05], np.float32), condition.text, condition.pooled)
  assert relative_error(run(*inputs), diffusers_velocity(theirs, *inputs)) < TOLERANCE


@pytest.mark.parity
def test_saved_model_in_diffusers_has_the_same_output(golden, tmp_path):
  pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = mmdit.MMDiTConfig.from_diffusers(json.loads(str(golden["sd35_medium_like/config"])))
  abstract = nnx.eval_shape(models.build_transformer(config), jax.random.key(0))
  _, trainable, buffers = lora.split_trainable(abstract, rank=0)
  rng = np.random.default_rng(3)
  draw = lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
  trainable, buffers = jax.tree.map(draw, (trainable, buffers))
  hf.save_transformer(tmp_path, config, lora.merge_trees(trainable, buffers))
  theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path).eval()
  run, _ = load(tmp_path)
  inputs = random_inputs(config, 6, 10)
  assert relative_error(run(*inputs), diffusers_velocity(theirs, *inputs)) < TOLERANCE
