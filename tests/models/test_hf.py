"""Weights survive the way to diffusers' layout and back, and a file that does not fit is explained."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import models
from tpgrpo_jax.models import hf, lora, mmdit

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


def test_another_architecture_is_refused_by_name(folder):
  raw = json.loads((folder / hf.CONFIG_FILE).read_text())
  raw["_class_name"] = "FluxTransformer2DModel"
  (folder / hf.CONFIG_FILE).write_text(json.dumps(raw))
  with pytest.raises(ValueError, match="FluxTransformer2DModel.*reads SD3Transformer2DModel"):
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


def test_shipped_weights_fit_the_variants_own_sizes():
  variant = models.MODELS["tiny"]
  assert hf.load_config(variant.folder) == variant.config
