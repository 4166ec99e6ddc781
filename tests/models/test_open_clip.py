"""open_clip's names of CLIP's towers: every tensor has its place, there and here."""

import json
import pathlib

from flax import nnx
import numpy as np
import pytest

from tpgrpo_jax.models import clip
from tpgrpo_jax.models.hf import open_clip
from tpgrpo_jax.models.hf.table import flatten

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "rewards.npz")
QKV = 3  # entries that share one tensor


def abstract(config):
  """{dotted path: shape} of a clip.CLIP."""
  _, state = nnx.split(nnx.eval_shape(lambda: clip.CLIP(config, rngs=nnx.Rngs(0))))
  return {path: tuple(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}


def assert_maps_both_ways(config, theirs):
  """Every tensor of theirs is in the table with its shape, and every block of ours in one entry."""
  shapes = abstract(config)
  entries = open_clip.names(config, shapes)
  assert {e.name: e.shape for e in entries} == {k: tuple(v) for k, v in theirs.items()}
  shared = sum("in_proj" in name for name in theirs)
  assert len(entries) == len(theirs) + (QKV - 1) * shared
  blocks = lambda path, shape: range(shape[0]) if ".blocks_" in f".{path}" else [None]
  places = [(e.path, e.block) for e in entries]
  assert len(set(places)) == len(places)
  assert set(places) == {(path, i) for path, s in shapes.items() for i in blocks(path, s)}


def test_every_tensor_of_the_true_vit_h_14_is_mapped():
  config = open_clip.read_config(open_clip.VIT_H_14)
  assert_maps_both_ways(config, json.loads(str(GOLDEN["ViT-H-14/shapes"])))
  count = sum(np.prod(shape) for shape in abstract(config).values())
  assert count == pytest.approx(986e6, rel=1e-3)


def test_sizes_without_a_config_are_open_clips():
  assert open_clip.VIT_H_14 == json.loads(str(GOLDEN["ViT-H-14/config"]))


def test_vit_h_14_is_the_model_that_transformers_calls_clip_h():
  """The sizes that laion/CLIP-ViT-H-14-laion2B-s32B-b79K has in transformers' layout."""
  wanted = clip.CLIPConfig.from_transformers({
    "projection_dim": 1024,
    "text_config": dict(
      hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
      projection_dim=1024, hidden_act="gelu", eos_token_id=2,
    ),
    "vision_config": dict(
      hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
      projection_dim=1024, hidden_act="gelu", patch_size=14,
    ),
  })  # fmt: skip
  assert open_clip.read_config(open_clip.VIT_H_14) == wanted


def test_tensors_survive_the_way_here_and_back_bit_for_bit():
  raw = json.loads(GOLDEN["hps/files/open_clip_config.json"].tobytes())
  config = open_clip.read_config(raw["model_cfg"])
  prefix, back = "hps/weights/", {}
  theirs = {k.removeprefix(prefix): GOLDEN[k] for k in GOLDEN.files if k.startswith(prefix)}
  assert_maps_both_ways(config, {name: tensor.shape for name, tensor in theirs.items()})
  for entry in open_clip.names(config, abstract(config)):
    ours = entry.from_foreign(theirs[entry.name])
    # Thirds of one tensor add up to it.
    back[entry.name] = back.get(entry.name, 0) + np.asarray(entry.to_foreign(ours))
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize(
  "names, wanted",
  [
    (["visual.proj", "logit_scale"], True),
    (["visual_projection.weight", "logit_scale"], False),
    ([], False),
  ],
)
def test_layout_is_known_by_its_names(names, wanted):
  assert open_clip.is_open_clip(names) == wanted


@pytest.mark.parametrize(
  "found, wanted",
  [
    (["model.safetensors", "other.safetensors"], ""),
    (["open_clip_model.safetensors", "other.safetensors"], "open_clip_model.safetensors"),
    (["HPS_v2.1_compressed.safetensors"], "HPS_v2.1_compressed.safetensors"),
    ([], ""),
  ],
)
def test_weights_are_found_under_the_names_that_are_used(tmp_path, found, wanted):
  for name in found:
    (tmp_path / name).touch()
  assert open_clip.find_weights(tmp_path) == wanted


def test_several_files_of_unknown_names_are_refused(tmp_path):
  for name in ("a.safetensors", "b.safetensors"):
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match="a.safetensors, b.safetensors: must be one file"):
    open_clip.find_weights(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-L-14", "ViT-L-14-quickgelu", "ViT-B-32"])
def test_every_tensor_of_live_open_clip_is_mapped(name):
  torch, theirs = pytest.importorskip("torch"), pytest.importorskip("open_clip")
  raw = theirs.get_model_config(name)
  with torch.device("meta"):
    state = theirs.model.CLIP(**raw).state_dict()
  assert_maps_both_ways(open_clip.read_config(raw), {k: v.shape for k, v in state.items()})
