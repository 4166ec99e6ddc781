"""What is wrong with the files, the options or the input of a device reward is said before anything runs."""

import json
import pathlib
import re
import sys
import warnings

import numpy as np
import pytest
import safetensors.numpy
import stored_models

from tpgrpo_jax import rewards
from tpgrpo_jax.rewards import aesthetic, hps

CASES = {"clipscore": "clip_l", "pickscore": "clip_h", "hpsv2": "hps", "aesthetic": "clip_l"}
NAMES = tuple(CASES)
TEXT_NAMES = ("clipscore", "pickscore", "hpsv2")
CONFIGS = {name: "config.json" for name in NAMES} | {"hpsv2": "open_clip_config.json"}
CONVERSIONS = {
  name: 'CLIPModel.from_pretrained("FOLDER").save_pretrained("FOLDER")' for name in NAMES
} | {"hpsv2": 'torch.load("HPS_v2.1_compressed.pt", map_location="cpu", weights_only=True)'}
IMAGES = np.zeros((2, 30, 30, 3), np.uint8)
PROMPTS = ["a red cat", "a dog"]


@pytest.fixture(scope="module")
def golden():
  return stored_models.load()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder_of(golden, tmp_path):
  """name -> (folder, options) of a whole stored model, to be broken."""

  def write(name):
    if name == "hpsv2":
      pytest.importorskip("ftfy")
    folder = stored_models.write_folder(golden, CASES[name], tmp_path / name)
    options = {"path": str(folder)}
    if name == "aesthetic":
      options["head"] = str(stored_models.write_head(golden, tmp_path))
    return folder, options

  return write


def message_of(name, options, error=ValueError):
  with pytest.raises(error) as caught:
    rewards.make_rewards({name: {"weight": 1.0, **options}})
  return str(caught.value)


def rewrite(path, change):
  raw = json.loads(path.read_text())
  change(raw)
  path.write_text(json.dumps(raw))


@pytest.mark.parametrize("name", NAMES)
def test_reward_without_a_path_says_which_options_it_needs(name):
  assert f"rewards.{name}: needs the options path" in message_of(name, {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "path, rule",
  [
    ("/no/such/folder", "path='/no/such/folder': no such folder. Give a folder, or a hub id"),
    ("", "path='': must be a folder, or a hub id"),
    ("no-such-owner/no-such-model", "path='no-such-owner/no-such-model': no such folder, and it could not"),
  ],
)  # fmt: skip
def test_path_that_is_nowhere_is_named(folder_of, name, path, rule):
  _, options = folder_of(name)
  assert f"rewards.{name}: {rule}" in message_of(name, options | {"path": path})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pt", "pth", "bin"])
def test_pickle_is_refused_with_the_lines_that_convert_it(folder_of, name, kind):
  folder, options = folder_of(name)
  file = folder / f"weights.{kind}"
  file.write_bytes(b"never opened")
  message = message_of(name, options | {"path": str(file)})
  assert f"path={str(file)!r}: is a pickle" in message and "not read" in message
  assert CONVERSIONS[name] in message


@pytest.mark.parametrize("name", NAMES)
def test_other_file_in_the_place_of_a_folder_is_refused(folder_of, name):
  folder, options = folder_of(name)
  file = folder / "model.safetensors"
  message = message_of(name, options | {"path": str(file)})
  assert f"path={str(file)!r}: is a file, must be a folder." in message


@pytest.mark.parametrize("name", NAMES)
def test_folder_with_a_pickle_alone_says_how_to_convert_it(folder_of, name):
  folder, options = folder_of(name)
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  message = message_of(name, options)
  assert "pytorch_model.bin" in message and str(folder) in message and "convert" in message.lower()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_truncated_weights_are_refused_with_the_file_named(folder_of, name, size):
  folder, options = folder_of(name)
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:size])
  message = message_of(name, options)
  assert f"{file}: not a readable safetensors file" in message and "Fetch it again" in message


@pytest.mark.parametrize("name", NAMES)
def test_shard_that_is_not_there_is_named(folder_of, name):
  folder, options = folder_of(name)
  (folder / "model.safetensors").rename(folder / "model-1.safetensors")
  index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  assert "no model-2.safetensors in it" in message_of(name, options)


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "aesthetic"])
def test_folder_without_a_config_is_refused(folder_of, name):
  folder, options = folder_of(name)
  (folder / "config.json").unlink()
  assert "no config.json in it. Point it at a complete folder" in message_of(name, options)


def test_hpsv2_without_a_config_must_be_a_vit_h_14(folder_of):
  folder, options = folder_of("hpsv2")
  (folder / "open_clip_config.json").unlink()
  message = message_of("hpsv2", options)
  assert (
    "does not fit ViT-H-14, which is expected where there is no open_clip_config.json" in message
  )
  assert "transformer.resblocks.0.ln_2.bias is (16,), must be (1024,)" in message  # one of many


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "aesthetic"])
@pytest.mark.parametrize("kind", ["siglip", "t5"])
def test_model_of_another_kind_is_refused(folder_of, name, kind):
  folder, options = folder_of(name)
  (folder / "config.json").write_text(json.dumps({"model_type": kind}))
  message = message_of(name, options)
  assert f"model_type={kind!r}: must be 'clip'. Give such a model's folder." in message


@pytest.mark.parametrize(
  "change, rule",
  [
    (lambda raw: raw["vision_cfg"].update(timm_model_name="x"), "vision_cfg has timm_model_name: must be"),
    (lambda raw: raw["vision_cfg"].update(layers=[3, 4]), "the layers of a ResNet"),
    (lambda raw: raw.update(multimodal_cfg={}), "model_cfg has multimodal_cfg: must be"),
    (lambda raw: raw["text_cfg"].update(hf_model_name="x"), "text_cfg has hf_model_name: must be"),
    (lambda raw: raw.pop("embed_dim"), "its model_cfg has no 'embed_dim'"),
  ],
)  # fmt: skip
def test_open_clip_model_of_another_kind_is_refused(folder_of, change, rule):
  folder, options = folder_of("hpsv2")
  rewrite(folder / "open_clip_config.json", lambda raw: change(raw["model_cfg"]))
  assert rule in message_of("hpsv2", options)


@pytest.mark.parametrize("name", NAMES)
def test_one_error_lists_missing_unused_and_misshapen_tensors(folder_of, golden, name):
  folder, options = folder_of(name)
  tensors = stored_models.weights(golden, CASES[name])
  visual = "visual.ln_post" if name == "hpsv2" else "vision_model.post_layernorm"
  del tensors[f"{visual}.weight"]
  tensors[f"{visual}.bias"] = np.zeros(5, np.float32)
  # Of a whole CLIPModel, the aesthetic score does not look at the text tower.
  tensors["visual_new" if name == "aesthetic" else "new"] = np.zeros(5, np.float32)
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  message = message_of(name, options)
  assert f"does not fit its {CONFIGS[name]}" in message
  assert f"missing: {visual}.weight (24,)" in message and "not used:" in message
  assert f"misshapen: {visual}.bias is (5,), must be (24,)" in message


@pytest.mark.parametrize("name", TEXT_NAMES)
@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_folder_without_a_tokenizer_says_which_one_it_needs(folder_of, name, missing):
  folder, options = folder_of(name)
  (folder / missing).unlink()
  message = message_of(name, options)
  assert "holds no tokenizer" in message and "set tokenizer to their folder or hub id" in message
  assert re.search(r"(openai|laion)/[\w-]+", message)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_tokenizer_may_lie_elsewhere(folder_of, golden, tmp_path, name):
  folder, options = folder_of(name)
  whole = rewards.make_rewards({name: {"weight": 1.0, **options}})(IMAGES, PROMPTS, [{}] * 2)()
  other = tmp_path / "tokenizer"
  other.mkdir()
  for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / file).rename(other / file)
  options = options | {"tokenizer": str(other)}
  found = rewards.make_rewards({name: {"weight": 1.0, **options}})(IMAGES, PROMPTS, [{}] * 2)()
  np.testing.assert_array_equal(found[0], whole[0])


def test_tokenizer_of_another_model_is_refused(folder_of):
  folder, options = folder_of("pickscore")
  rewrite(folder / "vocab.json", lambda raw: raw.update({"cat</w>": 9999}))
  reward = rewards.make_rewards({"pickscore": {"weight": 1.0, **options}})
  with pytest.raises(ValueError, match=r"gives id 9999, but the model at path has vocab_size=\d+"):
    reward(IMAGES, PROMPTS, [{}] * 2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "options, rule",
  [
    ({"dtype": "float16"}, "dtype='float16': unknown name. Did you mean 'bfloat16'"),
    ({"batch": 0}, "batch=0: must be an integer >= 1"),
    ({"batch": -1}, "batch=-1: must be an integer >= 1"),
    ({"batch": True}, "batch=True: must be an integer >= 1"),
  ],
)
def test_option_out_of_its_range_is_refused(folder_of, name, options, rule):
  assert f"rewards.{name}: {rule}" in message_of(name, folder_of(name)[1] | options)


@pytest.mark.parametrize("name", NAMES)
def test_misspelled_option_names_the_nearest(folder_of, name):
  message = message_of(name, folder_of(name)[1] | {"dtyp": "bfloat16"})
  assert f"rewards.{name}.dtyp: unknown option of this reward. Did you mean 'dtype'" in message
  assert "placement" not in message  # it is not the user's


def test_missing_package_is_an_error_that_says_what_to_install(golden, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "ftfy", None)  # makes the import fail
  folder = stored_models.write_folder(golden, "hps", tmp_path)
  message = message_of("hpsv2", {"path": str(folder)}, ImportError)
  assert "ftfy, which is not installed" in message and "pip install 'ftfy>=6.1'" in message


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("file", ["sac+logos+ava1-l14-linearMSE.pth", "none.safetensors"])
def test_head_that_is_no_safetensors_file_says_how_to_convert_it(folder_of, file, exists):
  folder, options = folder_of("aesthetic")
  head = folder / file
  if exists and head.suffix == ".safetensors":
    head.write_bytes(b"truncated")
    rule, fix = "not a readable safetensors file", "Fetch it again"
  else:
    if exists:
      head.write_bytes(b"never opened")
    rule = "not a safetensors file" if exists else "no such file"
    fix = 'torch.load("sac+logos+ava1-l14-linearMSE.pth", map_location="cpu", weights_only=True)'
  message = message_of("aesthetic", options | {"head": str(head)})
  assert str(head) in message and rule in message and fix in message


@pytest.mark.parametrize("wrapper", ["", "module.aesthetics_predictor."])
def test_aesthetic_score_of_one_file_with_tower_and_head_is_that_of_two(
  folder_of, golden, tmp_path, wrapper
):
  folder, options = folder_of("aesthetic")
  wanted = rewards.DEVICE_REWARDS["aesthetic"](**options)(IMAGES + 90, PROMPTS, [{}] * 2)
  tower = {
    name: tensor for name, tensor in stored_models.weights(golden, "clip_l").items()
    if name.startswith(("vision_model.", "visual_projection."))
  }  # fmt: skip
  tower["vision_model.embeddings.position_ids"] = np.arange(3)[None]
  whole = {f"{wrapper}{k}": v for k, v in (tower | stored_models.weights(golden, "head")).items()}
  one = tmp_path / "one"
  one.mkdir()
  (one / "config.json").write_text((folder / "config.json").read_text())
  safetensors.numpy.save_file(whole, one / "model.safetensors")
  found = rewards.DEVICE_REWARDS["aesthetic"](path=one)(IMAGES + 90, PROMPTS, [{}] * 2)
  np.testing.assert_array_equal(found, wanted)
  (one / "config.json").unlink()  # then it is taken for CLIP-L/14, and this one is not
  assert "does not fit its config.json, or without one CLIP-L/14" in message_of(
    "aesthetic", {"path": str(one)}
  )


def test_tower_without_a_head_says_where_one_comes_from(folder_of):
  folder, _ = folder_of("aesthetic")
  message = message_of("aesthetic", {"path": str(folder)})
  assert "no layers" in message and "sac+logos+ava1-l14-linearMSE" in message


def test_head_of_another_shape_is_refused(folder_of, golden):
  folder, options = folder_of("aesthetic")
  for change, rule in (
    (lambda t: t.pop("layers.7.weight"), "must hold matrices layers.0.weight"),
    (lambda t: t.update({"layers.7.weight": np.zeros((2, 4), np.float32)}), "does not fit LAION's head"),
    (lambda t: t.pop("layers.2.bias"), "missing: layers.2.bias (8,)"),
    (lambda t: t.update({"layers.8.bias": np.zeros(1, np.float32)}), "not used: layers.8.bias (1,)"),
  ):  # fmt: skip
    tensors = stored_models.weights(golden, "head")
    change(tensors)
    safetensors.numpy.save_file(tensors, options["head"])
    assert rule in message_of("aesthetic", options)


def test_head_of_another_embedding_is_refused(folder_of, golden):
  _, options = folder_of("aesthetic")
  tensors = stored_models.weights(golden, "head")
  tensors["layers.0.weight"] = np.zeros((16, 10), np.float32)
  safetensors.numpy.save_file(tensors, options["head"])
  message = message_of("aesthetic", options)
  assert "reads embeddings of 10 numbers, but the model at path gives 12" in message


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
  "images, rule",
  [
    (IMAGES.astype(np.float32), "images float32 (2, 30, 30, 3): must be uint8"),
    (IMAGES[..., :1], "images uint8 (2, 30, 30, 1): must be uint8 [N, H, W, 3]"),
    (IMAGES[:, :0], "(2, 0, 30, 3): must be"),
    (IMAGES[:1], "1 images, 2 prompts: must be equally many"),
  ],
)
def test_images_that_are_none_are_refused(folder_of, name, images, rule):
  fn = rewards.DEVICE_REWARDS[name](**folder_of(name)[1])
  with pytest.raises(ValueError, match=re.escape(rule)):
    fn(images, PROMPTS, [{}] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch_has_no_scores(folder_of, name):
  scores = rewards.DEVICE_REWARDS[name](**folder_of(name)[1])(IMAGES[:0], [], [])
  assert scores.shape == (0,) and scores.dtype == np.float32


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_prompt_that_is_cut_is_said_once(folder_of, name):
  fn = rewards.DEVICE_REWARDS[name](**folder_of(name)[1])
  prompts = ["a cat on the house " * 9, "a dog"]
  with pytest.warns(UserWarning, match=f"1 of 2 prompts have more than the 13 tokens that {name}"):
    fn(IMAGES, prompts, [{}] * 2)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    fn(IMAGES, prompts, [{}] * 2)


def test_hpsv2_reads_transformers_layout_too(golden, tmp_path):
  """CLIP-H as transformers names it, with its config, is another way to store the same model."""
  pytest.importorskip("ftfy")
  folder = stored_models.write_folder(golden, "clip_h", tmp_path)
  scores = hps.make(path=folder)(IMAGES, PROMPTS, [{}] * 2)
  assert np.isfinite(np.asarray(scores)).all()


@pytest.mark.slow
def test_conversions_in_the_messages_make_what_is_read(golden, tmp_path, monkeypatch):
  """The lines of Python that users are told to run, run on pickles of the stored models."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("ftfy")
  monkeypatch.chdir(tmp_path)
  tensors = lambda case: {
    k: torch.from_numpy(v) for k, v in stored_models.weights(golden, case).items()
  }
  torch.save({"state_dict": tensors("hps")}, "HPS_v2.1_compressed.pt")
  torch.save(tensors("head"), "sac+logos+ava1-l14-linearMSE.pth")
  for text in (hps.CONVERT, aesthetic.CONVERT):
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith("  ")))
  folder = stored_models.write_folder(golden, "hps", tmp_path / "wanted")
  made = safetensors.numpy.load_file("model.safetensors")
  wanted = safetensors.numpy.load_file(folder / "model.safetensors")
  assert made.keys() == wanted.keys()
  assert all(np.array_equal(made[key], wanted[key]) for key in wanted)
  head = aesthetic.load_head(pathlib.Path("aesthetic_head.safetensors"))
  assert head["layers"]["0"]["kernel"].shape == (12, 16)
