"""The T5 encoder computes what transformers' does, with the same weights."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax.models import t5
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf import t5 as hf_t5
from tpgrpo_jax.models.hf.table import flatten

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CASES = ("one_block", "wide_heads", "few_buckets")
# Float32 sums over widths of 12 to 24, in another order than torch's, through up to three blocks.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "t5.npz")


def write_golden_model(golden, case, folder):
  prefix = f"{case}/weights/"
  keys = [key for key in golden.files if key.startswith(prefix)]
  tensors = {key.removeprefix(prefix): golden[key].astype(np.float32) for key in keys}
  safetensors.numpy.save_file(tensors, folder / encoder.WEIGHTS_FILE)
  (folder / encoder.CONFIG_FILE).write_text(str(golden[f"{case}/config"]))
  return folder


def apply(loaded, ids):
  run = jax.jit(lambda weights, ids: nnx.merge(loaded.graphdef, weights)(ids))
  return run(loaded.weights, ids)


def relative_error(found, wanted):
  found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("case", CASES)
def test_hidden_state_equals_transformers_on_golden_data(golden, case, tmp_path):
  loaded = hf_t5.load_t5(write_golden_model(golden, case, tmp_path))
  found = apply(loaded, golden[f"{case}/ids"])
  assert relative_error(found, golden[f"{case}/last_hidden_state"]) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (GOLDEN / "make_t5.py").read_text()


def test_tensors_survive_the_way_here_and_back_bit_for_bit(golden, tmp_path):
  folder = write_golden_model(golden, "wide_heads", tmp_path)
  loaded = hf_t5.load_t5(folder)
  stored = safetensors.numpy.load_file(folder / encoder.WEIGHTS_FILE)
  tree = {path: np.asarray(leaf) for path, leaf in flatten(loaded.weights).items()}
  entries = hf_t5.names(loaded.config, {path: leaf.shape for path, leaf in tree.items()})
  for entry in entries:
    value = tree[entry.path] if entry.block is None else tree[entry.path][entry.block]
    np.testing.assert_array_equal(entry.to_foreign(value), stored.pop(entry.name))
  assert not stored


def test_buckets_of_places_are_transformers_own(golden):
  table = t5.relative_buckets(512, buckets=32, max_distance=128)
  np.testing.assert_array_equal(table[0], golden["buckets_after"])
  np.testing.assert_array_equal(table[:, 0], golden["buckets_before"])


def test_bucket_depends_on_the_distance_alone():
  table = t5.relative_buckets(50, buckets=8, max_distance=20)
  np.testing.assert_array_equal(table[1:, 1:], table[:-1, :-1])


def test_bfloat16_encoder_is_near_the_float32_one(golden, tmp_path):
  case = "wide_heads"
  loaded = hf_t5.load_t5(write_golden_model(golden, case, tmp_path), dtype=jnp.bfloat16)
  found = apply(loaded, golden[f"{case}/ids"])
  assert found.dtype == jnp.bfloat16
  # Eight bits of mantissa, 2^-9 = 0.2 % a rounding, through some twenty roundings.
  assert relative_error(found, golden[f"{case}/last_hidden_state"]) < 0.05


def test_residual_stream_of_the_bfloat16_encoder_adds_what_is_small_beside_it(golden, tmp_path):
  """Activations of 1,000 and more are usual in T5; bfloat16 has steps of 4 there."""
  case = "one_block"
  loaded = hf_t5.load_t5(write_golden_model(golden, case, tmp_path), dtype=jnp.bfloat16)
  model = nnx.merge(loaded.graphdef, loaded.weights)
  block = nnx.merge(*jax.tree.map(lambda x: x[0], nnx.split(model.blocks_0)))
  x = jnp.full((1, 3, 16), 1024.0) + jnp.arange(16.0)
  added = block(x, jnp.zeros((2, 3, 3))) - x
  assert added.dtype == jnp.float32
  assert float(jnp.abs(added / 4 - jnp.round(added / 4)).max()) > 1e-3


def test_divided_over_a_mesh_the_encoder_stays_the_same(golden, tmp_path):
  loaded = hf_t5.load_t5(write_golden_model(golden, "few_buckets", tmp_path))
  ids = np.tile(golden["few_buckets/ids"], (4, 1))
  alone = apply(loaded, ids)
  kinds = (jax.sharding.AxisType.Auto,) * 3
  with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)):
    assert relative_error(apply(loaded, ids), alone) < 1e-5


@pytest.mark.parametrize("names", [{"shared"}, {"encoder.embed_tokens"}, None])
def test_token_embedding_is_read_under_either_name_or_both(golden, names, tmp_path):
  folder = write_golden_model(golden, "one_block", tmp_path)
  path = folder / encoder.WEIGHTS_FILE
  tensors = safetensors.numpy.load_file(path)
  table = tensors.pop("shared.weight")
  both = {"shared", "encoder.embed_tokens"}
  tensors |= {f"{name}.weight": table for name in names or both}
  safetensors.numpy.save_file(tensors, path)
  np.testing.assert_array_equal(hf_t5.load_t5(folder).weights["token_embedding"], table)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_shards_of_half_precision_are_read(golden, dtype, tmp_path):
  folder = write_golden_model(golden, "wide_heads", tmp_path)
  tensors = safetensors.numpy.load_file(folder / encoder.WEIGHTS_FILE)
  (folder / encoder.WEIGHTS_FILE).unlink()
  weight_map = {}
  for i, names in enumerate((list(tensors)[:9], list(tensors)[9:])):
    shard = f"model-{i + 1:05}-of-00002.safetensors"
    part = {name: tensors[name].astype(dtype) for name in names}
    safetensors.numpy.save_file(part, folder / shard)
    weight_map |= {name: shard for name in names}
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  loaded = hf_t5.load_t5(folder)
  wanted = tensors["encoder.block.2.layer.1.DenseReluDense.wo.weight"].astype(dtype)
  np.testing.assert_array_equal(
    loaded.weights["blocks_0"]["ff"]["wo"]["kernel"][2], wanted.astype(np.float32).T
  )
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(ValueError, match="no model-00002-of-00002.safetensors in it"):
    hf_t5.load_t5(folder)


@pytest.mark.parametrize(
  "field, value, rule",
  [
    ("feed_forward_proj", "relu", "must be 'gated-gelu'"),
    ("model_type", "clip_text_model", "must be 't5'"),
  ],
)
def test_config_of_another_kind_of_model_is_refused(field, value, rule):
  with pytest.raises(ValueError, match=f"{field}='{value}'") as caught:
    t5.T5Config.from_transformers({"feed_forward_proj": "gated-gelu"} | {field: value})
  assert rule in str(caught.value)


T5_XXL = dict(
  vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
  feed_forward_proj="gated-gelu",
)  # fmt: skip


@pytest.mark.parity
def test_every_tensor_of_t5_xxl_is_mapped_both_ways():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  with torch.device("meta"):
    model = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL, tie_word_embeddings=False))
  theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
  config = t5.T5Config.from_transformers(model.config.to_dict())
  assert config == t5.T5Config(**T5_XXL)
  _, state = nnx.split(nnx.eval_shape(lambda: t5.T5Encoder(config, rngs=nnx.Rngs(0))))
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
  entries = hf_t5.names(config, shapes)
  assert {e.name: e.shape for e in entries} == {
    name: theirs[old] for name, old in hf_t5.aliases(theirs).items()
  }
  assert len(entries) == len(theirs) - 1  # the token embedding has two names
  places = {(e.path, e.block) for e in entries}
  assert places == {
    (path, i)
    for path, shape in shapes.items()
    for i in (range(shape[0]) if path.startswith("blocks_0") else [None])
  }


@pytest.mark.parity
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("length", [1, 30, 200])
def test_hidden_state_equals_live_transformers(num_layers, length, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(length)
  theirs = transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=50, d_model=24, d_kv=8, d_ff=48, num_layers=num_layers, num_heads=4,
      feed_forward_proj="gated-gelu", tie_word_embeddings=False,
  )).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(0, 50, size=(2, length))
  with torch.no_grad():
    wanted = theirs(torch.from_numpy(ids)).last_hidden_state
  assert relative_error(apply(hf_t5.load_t5(tmp_path), ids), wanted) < TOLERANCE


@pytest.mark.parity
def test_bfloat16_is_at_least_as_near_to_float32_as_transformers_own(tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(0)
  theirs = transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=50, d_model=64, d_kv=8, d_ff=128, num_layers=6, num_heads=8,
      feed_forward_proj="gated-gelu", tie_word_embeddings=False,
  )).eval()  # fmt: skip
  theirs.to(torch.bfloat16).save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(0, 50, size=(4, 20))
  with torch.no_grad():
    rounded = theirs(torch.from_numpy(ids)).last_hidden_state.float()
    exact = theirs.float()(torch.from_numpy(ids)).last_hidden_state
  rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - exact.numpy()))))
  ours = rms(apply(hf_t5.load_t5(tmp_path, dtype=jnp.bfloat16), ids))
  assert ours <= 1.1 * rms(rounded)
