"""ImageReward equals torch's own, in both layouts of its file; what is wrong with a file is said."""

import json

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from tpgrpo_jax import rewards
from tpgrpo_jax.models import blip, clip
from tpgrpo_jax.models.hf import blip as hf_blip
from tpgrpo_jax.models.hf import dina_files, encoder
from tpgrpo_jax.models.hf.table import flatten
from tpgrpo_jax.rewards import image_reward, preprocess

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat on the sign blue dog says of two seven".split()
PROMPTS = ("a red cat", "the blue sign says dog of seven " * 8, "")
SIZES = blip.BLIPConfig(
  clip.CLIPVisionConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
    image_size=32, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6,
  ),
  blip.BERTConfig(
    vocab_size=len(WORDS) + 2, hidden_size=128, intermediate_size=160, num_hidden_layers=2,
    max_position_embeddings=40,
  ),
)  # fmt: skip
HEAD = {"0": (128, 32), "2": (32, 16), "4": (16, 8), "6": (8, 4), "7": (4, 1)}
TOLERANCE = 1e-4  # relative to the largest score
pytestmark = pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")


def write_tokenizer(folder):
  (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
  (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def random_tensors():
  """The tensors of a small ImageReward.pt."""
  _, abstract = encoder.outline(lambda rngs: blip.BLIP(SIZES, rngs=rngs), jnp.float32)
  shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
  foreign = {entry.name: entry.shape for entry in hf_blip.names(SIZES, shapes)}
  for name, (d_in, d_out) in HEAD.items():
    foreign |= {f"mlp.layers.{name}.weight": (d_out, d_in), f"mlp.layers.{name}.bias": (d_out,)}
  rng = np.random.default_rng(0)
  scale = lambda shape: 1.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.2
  draw = lambda shape: rng.standard_normal(shape) * scale(shape)
  return {name: draw(shape).astype(np.float32) for name, shape in foreign.items()}


@pytest.fixture(scope="module")
def tensors():
  return random_tensors()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp("image_reward")
  write_tokenizer(path)
  beside = {
    "blip.text_encoder.embeddings.position_ids": np.arange(40)[None],
    "blip.vision_proj.weight": np.zeros((8, 64), np.float32),
    "blip.text_proj.bias": np.zeros(8, np.float32),
  }  # of the public file
  safetensors.numpy.save_file(tensors | beside, path / "model.safetensors")
  return path


def pictures(height, width):
  rng = np.random.default_rng(height + width)
  coarse = rng.integers(0, 256, (3, 1 + height // 9, 1 + width // 9, 3))
  coarse = coarse.repeat(9, axis=1).repeat(9, axis=2)[:, :height, :width]
  return np.clip(coarse + rng.normal(0, 15, coarse.shape), 0, 255).astype(np.uint8)


def score(folder, images, **options):
  return np.asarray(rewards.DEVICE_REWARDS["image_reward"](path=folder, **options)(
    images, PROMPTS, [{}] * 3
  ))  # fmt: skip


def in_transformers_names(tensors):
  """The same with the names of transformers' BLIP, as another program would write them."""
  renamed = {}
  for name, tensor in tensors.items():
    if name.startswith("blip.visual_encoder."):
      name = name.replace("visual_encoder.", "vision_model.")
      for old, new in (
        ("vision_model.cls_token", "vision_model.embeddings.class_embedding"),
        ("vision_model.pos_embed", "vision_model.embeddings.position_embedding"),
        ("vision_model.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
        ("vision_model.norm.", "vision_model.post_layernorm."),
        ("vision_model.blocks.", "vision_model.encoder.layers."),
        (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
        (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
      ):  # fmt: skip
        name = name.replace(old, new)
    renamed[name] = tensor
  return renamed


def test_score_depends_on_picture_and_prompt_and_on_neither_layout_nor_padding(
  folder, tensors, tmp_path
):
  images = pictures(40, 52)
  found = score(folder, images)
  assert found.shape == (3,) and np.ptp(found) > 0.05
  assert abs(found[0] - score(folder, images[[1, 1, 1]])[0]) > 1e-3
  write_tokenizer(tmp_path)
  others = {f"module.{k}": v for k, v in in_transformers_names(tensors).items()}
  assert "module.blip.vision_model.encoder.layers.1.self_attn.qkv.bias" in others
  safetensors.numpy.save_file(
    others | {"module.blip.itm_head.weight": np.zeros((2, 128), np.float32)},
    tmp_path / "model.safetensors",
  )
  np.testing.assert_array_equal(score(tmp_path, images), found)


def test_missing_tensors_and_pickles_are_named(folder, tensors, tmp_path):
  write_tokenizer(tmp_path)
  make = lambda: rewards.make_rewards({"image_reward": {"weight": 1.0, "path": str(tmp_path)}})
  (tmp_path / "ImageReward.pt").write_bytes(b"never opened")
  with pytest.raises(
    ValueError, match="no safetensors in it.*ImageReward.pt(.|\n)*weights_only=True"
  ):
    make()
  for left_out in ("mlp.layers.4.weight", "blip.visual_encoder.pos_embed",
                   "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"):  # fmt: skip
    kept = {name: tensor for name, tensor in tensors.items() if name != left_out}
    safetensors.numpy.save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=left_out.removeprefix("mlp.")):
      make()
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  (tmp_path / "vocab.txt").unlink()
  with pytest.raises(ValueError, match="vocab.txt.*bert-base-uncased"):
    make()


def see(images):
  """Resize(32), CenterCrop(32), ToTensor and Normalize of torchvision, on Pillow; [N, 3, 32, 32]."""
  height, width = images.shape[1:3]
  shorter = min(height, width)
  height, width = int(32 * height / shorter), int(32 * width / shorter)
  top, left = (int(round((side - 32) / 2.0)) for side in (height, width))  # as CenterCrop has it
  seen = []
  for image in images:
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float32) / 255
    seen.append((pixels - np.float32(preprocess.CLIP_MEAN)) / np.float32(preprocess.CLIP_STD))
  return np.stack(seen).transpose(0, 3, 1, 2)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(40, 52), (32, 32), (67, 38), (47, 32)])
def test_image_reward_equals_live_torch(folder, tensors, size):
  """The towers of transformers, the authors' head, and Pillow's resampling with torchvision's crop."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  vision, text = SIZES.vision, SIZES.text
  shared = dict(num_hidden_layers=2, hidden_act="gelu")
  look = transformers.BlipVisionModel(transformers.BlipVisionConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=1, image_size=32, patch_size=16,
    layer_norm_eps=vision.layer_norm_eps, **shared,
  )).eval()  # fmt: skip
  read = transformers.models.blip.modeling_blip_text.BlipTextModel(transformers.BlipTextConfig(
    vocab_size=text.vocab_size, hidden_size=128, encoder_hidden_size=64, intermediate_size=160,
    num_attention_heads=2, max_position_embeddings=40, layer_norm_eps=text.layer_norm_eps, **shared,
  ), add_pooling_layer=False).eval()  # fmt: skip
  named = in_transformers_names(tensors)
  part = lambda prefix: {
    k.removeprefix(prefix): torch.tensor(v) for k, v in named.items() if k.startswith(prefix)
  }
  look.load_state_dict(part("blip.vision_model."))
  read.load_state_dict(part("blip.text_encoder."), strict=True)
  modules = [
    torch.nn.Linear(*HEAD[name]) if name in HEAD else torch.nn.Dropout() for name in "01234567"
  ]
  head = torch.nn.Sequential(*modules).eval()
  head.load_state_dict(part("mlp.layers."))
  images = pictures(*size)
  tokenizer = transformers.BertTokenizer.from_pretrained(folder)
  words = tokenizer(
    list(PROMPTS), padding="max_length", truncation=True, max_length=35, return_tensors="pt"
  )
  with torch.no_grad():
    tokens = look(torch.tensor(see(images))).last_hidden_state
    states = read(
      words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=tokens,
      encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long),
    ).last_hidden_state  # fmt: skip
    wanted = ((head(states[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072).numpy()
  found = score(folder, images)
  assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()
  assert np.ptp(wanted) > 100 * TOLERANCE
  assert image_reward.LENGTH == words.input_ids.shape[1] == 35


@pytest.mark.parity
def test_conversion_in_the_message_makes_what_is_read(folder, tensors, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  for name, text in (("ImageReward.pt", image_reward.CONVERT), ("rm_head.pt", dina_files.CONVERT)):
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, name)
    exec("\n".join(line.strip() for line in text.splitlines() if line.startswith("  ")))
  for name in ("model.safetensors", "rm_head.safetensors"):
    made = safetensors.numpy.load_file(name)
    assert made.keys() == tensors.keys()
    assert all(np.array_equal(made[key], tensors[key]) for key in tensors)
