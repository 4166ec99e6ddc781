"""CLIP's towers compute what transformers' do, with the same weights."""

import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax.models import clip
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf.table import flatten

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TEXTS = {"clip_l_like": True, "clip_g_like": True, "flux_like": False}  # case -> projected
VISIONS = ("vision_l_like", "vision_h_like")
# Float32 sums over widths of 16 to 48, in another order than torch's, through up to three blocks.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "clip.npz")


def write_golden_model(golden, case, folder):
  prefix = f"{case}/weights/"
  keys = [key for key in golden.files if key.startswith(prefix)]
  tensors = {key.removeprefix(prefix): golden[key].astype(np.float32) for key in keys}
  safetensors.numpy.save_file(tensors, folder / encoder.WEIGHTS_FILE)
  (folder / encoder.CONFIG_FILE).write_text(str(golden[f"{case}/config"]))
  return folder


def apply(loaded, *inputs):
  run = jax.jit(lambda weights, *inputs: nnx.merge(loaded.graphdef, weights)(*inputs))
  return run(loaded.weights, *inputs)


def relative_error(found, wanted):
  found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("case", TEXTS)
def test_text_tower_equals_transformers_on_golden_data(golden, case, tmp_path):
  folder = write_golden_model(golden, case, tmp_path)
  output = apply(hf_clip.load_text(folder, projected=TEXTS[case]), golden[f"{case}/ids"])
  assert (output.projected is not None) == TEXTS[case]
  for name, found in output._asdict().items():
    if found is not None:
      assert relative_error(found, golden[f"{case}/{name}"]) < TOLERANCE, name


@pytest.mark.parametrize("case", VISIONS)
def test_image_tower_equals_transformers_on_golden_data(golden, case, tmp_path):
  folder = write_golden_model(golden, case, tmp_path)
  output = apply(hf_clip.load_vision(folder), golden[f"{case}/pixels"])
  for name, found in output._asdict().items():
    assert relative_error(found, golden[f"{case}/{name}"]) < TOLERANCE, name


def test_both_towers_give_the_score_of_transformers(golden, tmp_path):
  loaded = hf_clip.load_clip(write_golden_model(golden, "clip", tmp_path))
  text, vision = apply(loaded, golden["clip/ids"], golden["clip/pixels"])
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  text, vision = unit(np.asarray(text.projected)), unit(np.asarray(vision.projected))
  assert relative_error(text, golden["clip/text_embeds"]) < TOLERANCE
  assert relative_error(vision, golden["clip/image_embeds"]) < TOLERANCE
  scores = np.exp(loaded.weights["logit_scale"]) * vision @ text.T
  assert relative_error(scores, golden["clip/logits_per_image"]) < TOLERANCE


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == (GOLDEN / "make_clip.py").read_text()


@pytest.mark.parametrize("case", [*TEXTS, *VISIONS, "clip"])
def test_tensors_survive_the_way_here_and_back_bit_for_bit(golden, case, tmp_path):
  folder = write_golden_model(golden, case, tmp_path)
  load = {"clip": hf_clip.load_clip} | dict.fromkeys(VISIONS, hf_clip.load_vision)
  options = {"projected": TEXTS[case]} if case in TEXTS else {}
  loaded = load.get(case, hf_clip.load_text)(folder, **options)
  stored = safetensors.numpy.load_file(folder / encoder.WEIGHTS_FILE)
  tree = {path: np.asarray(leaf) for path, leaf in flatten(loaded.weights).items()}
  found = {}
  for entry in hf_clip.names(loaded.config, {path: leaf.shape for path, leaf in tree.items()}):
    value = tree[entry.path] if entry.block is None else tree[entry.path][entry.block]
    found[entry.name] = entry.to_foreign(value)
  for name, old in hf_clip.aliases(stored).items():
    np.testing.assert_array_equal(found.pop(name), stored[old])
  assert not found


def test_text_tower_is_causal(golden, tmp_path):
  case = "clip_l_like"
  loaded = hf_clip.load_text(write_golden_model(golden, case, tmp_path), projected=True)
  ids = np.array(golden[f"{case}/ids"])
  other = ids.copy()
  other[:, 5:] = 3
  a, b = (apply(loaded, x).penultimate for x in (ids, other))
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


@pytest.mark.parametrize(
  "eos_token_id, wanted",
  [(7, [2, 1]), (9, [3, 4]), (2, [3, 4])],  # 2 is the legacy rule: the largest id
)
def test_a_prompt_ends_at_its_first_end_of_text_token(eos_token_id, wanted):
  ids = jnp.asarray([[0, 5, 7, 9, 9], [0, 7, 7, 3, 9]])
  np.testing.assert_array_equal(clip.end_positions(ids, eos_token_id), wanted)


def test_bfloat16_towers_are_near_the_float32_ones(golden, tmp_path):
  case = "clip_l_like"
  folder = write_golden_model(golden, case, tmp_path)
  loaded = hf_clip.load_text(folder, projected=True, dtype=jnp.bfloat16)
  output = apply(loaded, golden[f"{case}/ids"])
  assert output.projected.dtype == jnp.bfloat16
  # Eight bits of mantissa, 2^-9 = 0.2 % a rounding, through some thirty roundings.
  assert relative_error(output.projected, golden[f"{case}/projected"]) < 0.05


def test_divided_over_a_mesh_the_towers_stay_the_same(golden, tmp_path):
  loaded = hf_clip.load_clip(write_golden_model(golden, "clip", tmp_path))
  inputs = [np.tile(golden[f"clip/{k}"], (4, *[1] * n)) for k, n in (("ids", 1), ("pixels", 3))]
  alone = apply(loaded, *inputs)
  kinds = (jax.sharding.AxisType.Auto,) * 3
  with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)):
    divided = apply(loaded, *inputs)
  for a, b in zip(jax.tree.leaves(divided), jax.tree.leaves(alone), strict=True):
    assert relative_error(a, b) < 1e-5


def test_tensors_without_the_prefix_and_with_position_ids_are_read(golden, tmp_path):
  folder = write_golden_model(golden, "clip_l_like", tmp_path)
  names = safetensors.numpy.load_file(folder / encoder.WEIGHTS_FILE)
  names["text_model.embeddings.position_ids"] = np.arange(9)[None]
  assert hf_clip.aliases(names) == {name: name for name in names if "position_ids" not in name}
  assert hf_clip.aliases(["encoder.layers.0.mlp.fc1.bias"]) == {
    "text_model.encoder.layers.0.mlp.fc1.bias": "encoder.layers.0.mlp.fc1.bias"
  }


def test_old_configs_say_the_sizes_in_the_dict_that_holds(golden):
  raw = json.loads(str(golden["clip/config"]))
  old = raw | {"text_config": {"hidden_size": 768}, "text_config_dict": raw["text_config"]}
  assert clip.CLIPConfig.from_transformers(old) == clip.CLIPConfig.from_transformers(raw)


@pytest.mark.parametrize(
  "read, field, value, rule",
  [
    (clip.CLIPTextConfig, "num_attention_heads", 3, "hidden_size=16: must be a multiple of"),
    (clip.CLIPTextConfig, "hidden_act", "geluu", "Did you mean 'gelu'"),
    (clip.CLIPTextConfig, "model_type", "t5", "must be 'clip_text_model'"),
    (clip.CLIPConfig, "model_type", "siglip", "must be 'clip'"),
    (clip.CLIPVisionConfig, "patch_size", 13, "image_size=224: must be a multiple"),
  ],
)
def test_config_of_another_kind_of_model_is_refused(read, field, value, rule):
  with pytest.raises(ValueError, match=field) as caught:
    read.from_transformers({"hidden_size": 16, "num_attention_heads": 4} | {field: value})
  assert rule in str(caught.value)


def test_prompt_of_too_many_tokens_and_image_of_another_size_are_refused(golden, tmp_path):
  loaded = hf_clip.load_clip(write_golden_model(golden, "clip", tmp_path))
  model = nnx.merge(loaded.graphdef, loaded.weights)
  with pytest.raises(ValueError, match="9 tokens a prompt: max_position_embeddings=8"):
    model.embed_text(np.zeros((1, 9), int))
  with pytest.raises(ValueError, match="pixels 8 x 12: this tower reads 12 x 12"):
    model.embed_images(np.zeros((1, 8, 12, 3)))


def test_one_error_lists_missing_unused_and_misshapen_tensors(golden, tmp_path):
  folder = write_golden_model(golden, "clip_l_like", tmp_path)
  tensors = safetensors.numpy.load_file(folder / encoder.WEIGHTS_FILE)
  del tensors["text_projection.weight"]
  tensors["text_model.final_layer_norm.bias"] = np.zeros(3, np.float32)
  tensors["text_model.head"] = np.zeros((2, 2), np.float32)
  safetensors.numpy.save_file(tensors, folder / encoder.WEIGHTS_FILE)
  with pytest.raises(ValueError) as caught:
    hf_clip.load_text(folder, projected=True)
  message = str(caught.value)
  assert "missing: text_projection.weight (12, 16)" in message
  assert "not used: text_model.head (2, 2)" in message
  assert "misshapen: text_model.final_layer_norm.bias is (3,), must be (16,)" in message


def test_truncated_weights_are_refused_with_the_file_named(golden, tmp_path):
  path = write_golden_model(golden, "clip_l_like", tmp_path) / encoder.WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
    hf_clip.load_text(tmp_path, projected=True)
  assert str(path) in str(caught.value)


# The true sizes, as the hub's config.json have them.
TRUE_TEXTS = {
  "clip_l": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                 num_attention_heads=12, projection_dim=768, hidden_act="quick_gelu"),
  "clip_g": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                 num_attention_heads=20, projection_dim=1280, hidden_act="gelu"),
  "clip_h": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, projection_dim=1024, hidden_act="gelu"),
}  # fmt: skip
TRUE_VISIONS = {
  "clip_l": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                 num_attention_heads=16, patch_size=14, projection_dim=768),
  "clip_h": dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                 num_attention_heads=16, patch_size=14, projection_dim=1024, hidden_act="gelu"),
}  # fmt: skip


def tables_of(create, names, config):
  """(shapes of our tensors by path, the table)."""
  _, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
  return shapes, names(config, shapes)


def assert_maps_both_ways(shapes, entries, wanted):
  """Every tensor of the torch model has one entry, and every block of ours is in one."""
  assert {e.name: e.shape for e in entries} == wanted
  assert len(entries) == len(wanted)
  places = {(e.path, e.block) for e in entries}
  stacked = lambda path: ".blocks_" in f".{path}"
  assert places == {
    (path, i) for path, s in shapes.items() for i in (range(s[0]) if stacked(path) else [None])
  }


def meta_shapes(kind, config):
  import torch

  with torch.device("meta"):
    model = kind(config)
  return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parity
@pytest.mark.parametrize("size", TRUE_TEXTS)
@pytest.mark.parametrize("projected", [True, False])
def test_every_tensor_of_the_true_text_towers_is_mapped(size, projected):
  transformers = pytest.importorskip("transformers")
  kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
  theirs = meta_shapes(kind, transformers.CLIPTextConfig(**TRUE_TEXTS[size]))
  config = clip.CLIPTextConfig(**TRUE_TEXTS[size])
  create = lambda rngs: clip.CLIPText(config, projected=projected, rngs=rngs)
  shapes, entries = tables_of(create, hf_clip.names, config)
  wanted = {name: theirs[old] for name, old in hf_clip.aliases(theirs).items()}
  assert len(wanted) == len(theirs)
  assert_maps_both_ways(shapes, entries, wanted)


@pytest.mark.parity
@pytest.mark.parametrize("size", TRUE_VISIONS)
def test_every_tensor_of_the_true_image_towers_is_mapped(size):
  transformers = pytest.importorskip("transformers")
  kind = transformers.CLIPVisionModelWithProjection
  theirs = meta_shapes(kind, transformers.CLIPVisionConfig(**TRUE_VISIONS[size]))
  config = clip.CLIPVisionConfig(**TRUE_VISIONS[size])
  create = lambda rngs: clip.CLIPVision(config, rngs=rngs)
  assert_maps_both_ways(*tables_of(create, hf_clip.names, config), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("size", TRUE_VISIONS)
def test_every_tensor_of_the_true_pairs_of_towers_is_mapped(size):
  transformers = pytest.importorskip("transformers")
  raw = {
    "text_config": TRUE_TEXTS[size],
    "vision_config": TRUE_VISIONS[size],
    "projection_dim": TRUE_TEXTS[size]["projection_dim"],
  }
  theirs = meta_shapes(transformers.CLIPModel, transformers.CLIPConfig(**raw))
  config = clip.CLIPConfig.from_transformers(raw)
  create = lambda rngs: clip.CLIP(config, rngs=rngs)
  assert_maps_both_ways(*tables_of(create, hf_clip.names, config), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [2, 30])
@pytest.mark.parametrize("length", [1, 5, 11])
def test_text_tower_equals_live_transformers(projected, hidden_act, eos_token_id, length, tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.manual_seed(length)
  kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
  theirs = kind(transformers.CLIPTextConfig(
      vocab_size=33, hidden_size=24, intermediate_size=40, num_hidden_layers=2, projection_dim=10,
      num_attention_heads=3, max_position_embeddings=11, bos_token_id=0, eos_token_id=eos_token_id,
      hidden_act=hidden_act,
  )).eval()  # fmt: skip
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path)
  ids = np.random.default_rng(0).integers(0, 33, size=(3, length))
  output = apply(hf_clip.load_text(tmp_path, projected=projected), ids)
  tower = getattr(theirs, "text_model", theirs)
  with torch.no_grad():
    wanted = tower(torch.from_numpy(ids), output_hidden_states=True)
    assert relative_error(output.penultimate, wanted.hidden_states[-2]) < TOLERANCE
    assert relative_error(output.last_hidden_state, wanted.last_hidden_state) < TOLERANCE
    assert relative_error(output.pooled, wanted.pooler_output) < TOLERANCE
    if projected:
      embeds = theirs(torch.from_numpy(ids)).text_embeds
      assert relative_error(output.projected, embeds) < TOLERANCE
