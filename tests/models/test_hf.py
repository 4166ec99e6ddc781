"""Weights survive the way to diffusers' layout and back, and a file that does not fit is explained."""

import json
import pathlib
import shutil

import huggingface_hub
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import models
from tpgrpo_jax.models import hf, lora, mmdit, tiny
from tpgrpo_jax.models.hf import files

CONFIG = mmdit.MMDiTConfig(
  sample_size=8,
  patch_size=2,
  in_channels=3,
  num_layers=3,
  attention_head_dim=4,
  num_attention_heads=2,
  joint_attention_dim=6,
  caption_projection_dim=8,
  pooled_projection_dim=5,
  out_channels=3,
  pos_embed_max_size=4,
  dual_attention_layers=(0,),
  qk_norm="rms_norm",
)


@pytest.fixture(scope="module")
def abstract():
  create = models.build_transformer(CONFIG)
  split = lambda key: lora.split_trainable(create(key), rank=0)[1:]
  return lora.merge_trees(*jax.eval_shape(split, jax.random.key(0)))


@pytest.fixture(scope="module")
def params(abstract):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract)


@pytest.fixture
def folder(params, tmp_path):
  hf.save_transformer(tmp_path, CONFIG, params)
  return tmp_path


def edit(folder, change):
  """Rewrites the weights after `change` has been made to the dict of tensors."""
  tensors = safetensors.numpy.load_file(folder / hf.WEIGHTS_FILE)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / hf.WEIGHTS_FILE)


def error_of_loading(folder, abstract):
  with pytest.raises(ValueError) as caught:
    hf.load_transformer(folder, abstract)
  return str(caught.value)


def test_round_trip_is_bit_exact(folder, params, abstract):
  loaded = hf.load_transformer(folder, abstract)
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_config_round_trip_keeps_every_size(folder):
  assert hf.load_config(folder) == CONFIG


def test_every_foreign_tensor_has_one_place(abstract):
  shapes = {k: v.shape for k, v in hf.flatten(abstract).items()}
  names = [entry.name for entry in hf.names(CONFIG, shapes)]
  assert len(names) == len(set(names))


def test_blocks_of_several_stacks_are_numbered_through(abstract):
  shapes = {k: v.shape for k, v in hf.flatten(abstract).items()}
  entries = hf.names(CONFIG, shapes)
  assert {e.name.split(".")[1] for e in entries if e.name.startswith("transformer_blocks")} == {
    "0", "1", "2",
  }  # fmt: skip


def test_one_error_lists_missing_unused_and_misshapen_tensors(folder, abstract):
  def change(tensors):
    del tensors["transformer_blocks.1.attn.to_q.weight"]
    tensors["transformer_blocks.7.attn.to_q.weight"] = np.zeros((8, 8), np.float32)
    tensors["proj_out.bias"] = np.zeros(5, np.float32)

  edit(folder, change)
  message = error_of_loading(folder, abstract)
  assert "missing: transformer_blocks.1.attn.to_q.weight (8, 8)" in message
  assert "not used: transformer_blocks.7.attn.to_q.weight (8, 8)" in message
  assert "misshapen: proj_out.bias is (5,), must be (12,)" in message
  assert hf.WEIGHTS_FILE in message


def test_integers_are_no_weights(folder, abstract):
  edit(folder, lambda tensors: tensors.update({"proj_out.bias": np.ones(12, np.int8)}))
  message = error_of_loading(folder, abstract)
  assert "proj_out.bias is stored as int8: weights must be floating-point numbers" in message
  assert hf.WEIGHTS_FILE in message and "model.quantize" in message


@pytest.mark.parametrize("value", [None, 5, ["a.safetensors"]])
def test_an_index_that_names_no_file_is_refused(folder, abstract, value):
  (folder / hf.WEIGHTS_FILE).unlink()
  path = folder / f"{hf.WEIGHTS_FILE}.index.json"
  path.write_text(json.dumps({"weight_map": {"proj_out.bias": value}}))
  message = error_of_loading(folder, abstract)
  assert f"{path}: weight_map: proj_out.bias={value!r}: must be the name of a file." in message


@pytest.mark.parametrize(
  "change",
  [
    {"_class_name": None},
    {"_class_name": 5},
    {"architectures": "T5EncoderModel"},
    {"architectures": 5},
  ],
)
def test_a_class_that_is_no_name_is_refused(tmp_path, change):
  (tmp_path / hf.CONFIG_FILE).write_text(json.dumps(change))
  ((field, value),) = change.items()
  with pytest.raises(ValueError, match="class by name. Fetch") as caught:
    hf.load_config(tmp_path)
  assert f"{hf.CONFIG_FILE}: {field}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
  "change, rule",
  [
    ({"text_config": 5}, "text_config=5: must be an object"),
    ({"vision_config": {"hidden_size": None}}, "hidden_size=None: must be int"),
    (
      {"text_config": {"layer_norm_eps": 0.0}},
      "layer_norm_eps=0.0: must be a finite number above 0",
    ),
  ],
)
def test_parts_of_a_model_are_checked_as_the_whole(tmp_path, change, rule):
  whole = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "text_config": {},
    "vision_config": {},
  }
  (tmp_path / hf.CONFIG_FILE).write_text(json.dumps(whole | change))
  with pytest.raises(ValueError) as caught:
    hf.load_config(tmp_path)
  assert rule in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_architecture_is_refused_by_name(folder):
  raw = json.loads((folder / hf.CONFIG_FILE).read_text())
  raw["_class_name"] = "UNet2DConditionModel"
  (folder / hf.CONFIG_FILE).write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="UNet2DConditionModel.*reads SD3Transformer2DModel"):
    hf.load_config(folder)


def test_truncated_weights_are_refused_with_the_file_named(folder, abstract):
  path = folder / hf.WEIGHTS_FILE
  path.write_bytes(path.read_bytes()[:-100])
  message = error_of_loading(folder, abstract)
  assert str(path) in message
  assert "not a readable safetensors file" in message


@pytest.mark.parametrize("missing", [hf.CONFIG_FILE, hf.WEIGHTS_FILE])
def test_folder_without_a_file_is_refused(folder, abstract, missing):
  (folder / missing).unlink()
  message = error_of_loading(folder, abstract)
  assert f"model.path={str(folder)!r}" in message
  assert missing in message


def test_config_of_other_sizes_than_the_weights_is_refused(folder, abstract, tmp_path_factory):
  other = tmp_path_factory.mktemp("other")
  shutil.copy(folder / hf.WEIGHTS_FILE, other)
  raw = json.loads((folder / hf.CONFIG_FILE).read_text()) | {"patch_size": 4}
  (other / hf.CONFIG_FILE).write_text(json.dumps(raw))
  config = hf.load_config(other)
  split = lambda key: lora.split_trainable(models.build_transformer(config)(key), rank=0)[1:]
  wanted = lora.merge_trees(*jax.eval_shape(split, jax.random.key(0)))
  assert "misshapen: pos_embed.proj.weight" in error_of_loading(other, wanted)


@pytest.mark.parametrize("model", tiny.BUILT_IN.values(), ids=tiny.BUILT_IN)
def test_shipped_weights_fit_the_variants_own_sizes(model):
  assert hf.load_config(model.folder) == model.config


def save_in_shards(folder, params, count=4):
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  hf.save_transformer(folder, CONFIG, params, max_shard_bytes=size // count)
  return sorted(path.name for path in folder.glob("*.safetensors"))


def assert_same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_shards_are_written_and_read_back_bit_for_bit(folder, params, abstract):
  shards = save_in_shards(folder, params)
  index = json.loads((folder / f"{hf.WEIGHTS_FILE}.index.json").read_text())
  assert len(shards) >= 4 and hf.WEIGHTS_FILE not in shards  # the single file is gone
  assert set(index["weight_map"].values()) == set(shards)
  assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert_same(hf.load_params(folder, abstract), params)


def test_files_are_readable_by_safetensors_itself(folder):
  tensors = safetensors.numpy.load_file(folder / hf.WEIGHTS_FILE)
  with safetensors.safe_open(folder / hf.WEIGHTS_FILE, framework="numpy") as handle:
    assert handle.metadata() == {"format": "pt"}
  assert tensors["pos_embed.proj.weight"].shape == (8, 3, 2, 2)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_arrive_in_the_wanted_dtype(folder, params, abstract, dtype):
  half = jax.tree.map(lambda x: x.astype(dtype), params)
  hf.save_transformer(folder, CONFIG, half)
  same = hf.load_params(folder, abstract, dtype=dtype)
  assert {leaf.dtype for leaf in jax.tree.leaves(same)} == {np.dtype(dtype)}
  assert_same(same, half)
  assert_same(hf.load_params(folder, abstract), jax.tree.map(lambda x: x.astype(np.float32), half))


def division(path, leaf):
  """Kernels along both dimensions, the position table along one, a bias of several blocks too."""
  name, count = path[-1].key, leaf.ndim
  spec = [None] * count
  if name == "kernel":
    spec[-2:] = ["a", "b"]
  elif name == "pos_embed":
    spec[0] = "a"
  elif name == "bias" and count == 2:
    spec[-1] = "b"
  return [a if a and n % 2 == 0 else None for a, n in zip(spec, leaf.shape)]


@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16])
def test_arrays_arrive_divided_as_asked_and_whole_in_sum(folder, params, abstract, dtype):
  kinds = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=kinds)
  shardings = jax.tree_util.tree_map_with_path(
    lambda p, x: NamedSharding(mesh, P(*division(p, x))), abstract
  )
  save_in_shards(folder, params)
  loaded = hf.load_params(folder, abstract, shardings=shardings, dtype=dtype)
  assert_same(loaded, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params))
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), loaded, shardings
  )
  kernel = loaded["blocks_0"]["ff"]["linear_1"]["kernel"]
  assert {s.data.shape for s in kernel.addressable_shards} == {(1, 4, 16)}


def test_one_part_of_a_tensor_is_read_for_each_part_of_the_mesh(folder, abstract, monkeypatch):
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("x",), axis_types=kinds)
  rows = lambda p, x: P("x") if p[-2].key == "context_embedder" and x.ndim == 1 else P()
  shardings = jax.tree_util.tree_map_with_path(
    lambda p, x: NamedSharding(mesh, rows(p, x)), abstract
  )
  sizes = {}
  read = files.Reader.read

  def spy(self, name, index=None):
    value = read(self, name, index)
    sizes.setdefault(name, []).append(value.size)
    return value

  monkeypatch.setattr(files.Reader, "read", spy)
  hf.load_params(folder, abstract, shardings=shardings)
  assert sizes["context_embedder.bias"] == [1] * 8  # a part for each device
  assert sizes["context_embedder.weight"] == [48]  # once for all devices


def test_reopening_a_file_within_changes_nothing(folder, params, abstract, monkeypatch):
  monkeypatch.setattr(files, "_REMAP_BYTES", 64)
  assert_same(hf.load_params(folder, abstract), params)


@pytest.mark.parametrize(
  "name",
  ["model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.bf16.safetensors"],
)
def test_usual_file_names_are_found(folder, params, abstract, name):
  (folder / hf.WEIGHTS_FILE).rename(folder / name)
  assert_same(hf.load_params(folder, abstract), params)


@pytest.mark.parametrize(
  "name", ["{}.index.fp16.json", "diffusion_pytorch_model.fp16.safetensors.index.json"]
)
def test_usual_names_of_a_variants_index_are_found(folder, params, abstract, name):
  save_in_shards(folder, params)
  index = folder / f"{hf.WEIGHTS_FILE}.index.json"
  index.rename(folder / name.format(hf.WEIGHTS_FILE))
  assert_same(hf.load_params(folder, abstract), params)


def test_a_file_may_be_named(folder, params, abstract):
  (folder / hf.WEIGHTS_FILE).rename(folder / "step_7.safetensors")
  assert_same(hf.load_params(folder, abstract, file="step_7.safetensors"), params)


def test_part_of_a_pipeline_is_found_by_its_subfolder(params, abstract, tmp_path):
  hf.save_transformer(tmp_path / "transformer", CONFIG, params)
  assert hf.load_config(tmp_path, subfolder="transformer") == CONFIG
  assert_same(hf.load_params(tmp_path, abstract, subfolder="transformer"), params)
  alone = tmp_path / "transformer"
  assert_same(hf.load_params(alone, abstract, subfolder="transformer"), params)


def test_index_of_absent_shards_names_them(folder, params, abstract):
  shards = save_in_shards(folder, params)
  (folder / shards[1]).unlink()
  message = error_of_loading(folder, abstract)
  assert f"no {shards[1]} in it, which {hf.WEIGHTS_FILE}.index.json names" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}'])
def test_broken_index_is_refused_with_its_path(folder, params, abstract, text):
  save_in_shards(folder, params)
  (folder / f"{hf.WEIGHTS_FILE}.index.json").write_text(text)
  assert f"{hf.WEIGHTS_FILE}.index.json" in error_of_loading(folder, abstract)


def test_one_truncated_shard_is_named(folder, params, abstract):
  shards = save_in_shards(folder, params)
  path = folder / shards[-1]
  path.write_bytes(path.read_bytes()[:-10])
  message = error_of_loading(folder, abstract)
  assert f"{path}: not a readable safetensors file" in message


def test_problems_of_all_shards_are_one_error(folder, params, abstract):
  shards = save_in_shards(folder, params)
  for shard in (shards[0], shards[-1]):
    tensors = safetensors.numpy.load_file(folder / shard)
    name = min(tensors)
    tensors[f"{name}.extra"] = tensors.pop(name)
    safetensors.numpy.save_file(tensors, folder / shard)
  message = error_of_loading(folder, abstract)
  assert message.count("missing: ") == 2 and message.count("not used: ") == 2
  assert shards[0] in message


def test_pickles_are_not_opened(folder, abstract):
  (folder / hf.WEIGHTS_FILE).rename(folder / "diffusion_pytorch_model.bin")
  message = error_of_loading(folder, abstract)
  assert "diffusion_pytorch_model.bin" in message and "convert to safetensors" in message


def test_broken_config_is_refused_with_its_path(folder):
  (folder / hf.CONFIG_FILE).write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    hf.load_config(folder)


def test_model_id_is_fetched_from_the_hub_without_pickles(folder, params, tmp_path, monkeypatch):
  repository = tmp_path / "cache"
  asked = []

  def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
    asked.append((repo_id, allow_patterns, ignore_patterns))
    if "*.json" in allow_patterns:
      (repository / "transformer").mkdir(parents=True)
      shutil.copy(folder / hf.CONFIG_FILE, repository / "transformer")
    elif not any("fp16" in pattern for pattern in ignore_patterns):
      name = "diffusion_pytorch_model.fp16.safetensors"
      shutil.copy(folder / hf.WEIGHTS_FILE, repository / "transformer" / name)
    return str(repository)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  found = hf.resolve("some/model", subfolder="transformer")
  assert found == repository / "transformer"
  assert hf.load_config(found) == CONFIG
  assert {repo for repo, _, _ in asked} == {"some/model"}
  assert [allow for _, allow, _ in asked] == [
    ["*.json", "*.txt", "*.model"],
    ["transformer/*.safetensors"],
    ["transformer/*.safetensors"],  # again, as there was no copy in full precision
  ]


def test_model_id_that_cannot_be_fetched_is_explained(monkeypatch):
  def snapshot_download(*unused, **options):
    raise ConnectionError("Network is unreachable")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  with pytest.raises(ValueError) as caught:
    hf.load_config("some/model")
  for part in (
    "model.path='some/model'",
    "no such folder",
    "Network is unreachable",
    "hf download",
  ):
    assert part in str(caught.value)


def test_a_folder_is_never_asked_of_the_hub(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail())
  monkeypatch.chdir(tmp_path)
  pathlib.Path("runs/model").mkdir(parents=True)
  with pytest.raises(ValueError, match="no config.json in it"):
    hf.load_config("runs/model")


@pytest.mark.parity
def test_sharded_folder_is_read_by_diffusers_and_its_own_by_us(folder, params, abstract, tmp_path):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  save_in_shards(folder, params)
  theirs = diffusers.SD3Transformer2DModel.from_pretrained(folder)
  for variant in (None, "bf16"):
    target = tmp_path / f"saved_{variant}"
    theirs.to(torch.bfloat16 if variant else torch.float32).save_pretrained(
      target, max_shard_size="4KB", variant=variant
    )
    assert len(list(target.glob("*.safetensors"))) > 2
    wanted = params
    if variant:
      wanted = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert_same(hf.load_params(target, abstract), wanted)


@pytest.mark.parametrize(
  "change, rule",
  [
    ({"patch_size": None}, "patch_size=None: must be int"),
    ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
    ({"attention_head_dim": "8"}, "attention_head_dim='8': must be int"),
    ({"dual_attention_layers": None}, "dual_attention_layers=None: must be a list of int"),
    ({"caption_projection_dim": 7}, "caption_projection_dim=7: must equal"),
  ],
)
def test_sizes_that_are_none_are_named_with_their_file(folder, tmp_path, change, rule):
  content = json.loads((folder / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(content | change))
  with pytest.raises(ValueError) as caught:
    hf.load_config(tmp_path)
  assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and rule in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(hf.ARCHITECTURES) - {"SD3Transformer2DModel"}))
def test_every_line_of_the_table_reads_its_own_class_of_config(name, tmp_path):
  of_diffusers = not name.startswith(("CLIP", "T5", "Qwen3"))
  written: dict = {"_class_name": name} if of_diffusers else {"architectures": [name]}
  if name == "AutoencoderKL":
    written["norm_num_groups"] = 32
  elif name == "T5EncoderModel":
    written |= {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
  elif not of_diffusers:
    kind = name.removeprefix("CLIP").split("Model")[0].lower()
    written["model_type"] = f"clip_{kind}_model" if kind else "clip"
    written |= {} if kind else {"text_config": {}, "vision_config": {}}
  (tmp_path / hf.CONFIG_FILE).write_text(json.dumps(written))
  config = hf.load_config(tmp_path)
  assert type(config) is hf.ARCHITECTURES[name].config
  assert hf.ARCHITECTURES[hf.class_name(config)].config is type(config)
