"""Device rewards equal transformers and open_clip, live, on pictures of full size."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import stored_models

from tpgrpo_jax import rewards
from tpgrpo_jax.models import clip
from tpgrpo_jax.models.hf import tokenizer as hf_tokenizer
from tpgrpo_jax.rewards import hps, towers

pytestmark = pytest.mark.parity

SIZES = ((512, 512), (480, 640), (640, 480), (224, 224))
PROMPTS = ("a red cat", 'the blue sign says "dog on 7th"', "")
TOLERANCE = 1e-4  # relative to the largest score
SIZE = 56


@pytest.fixture(scope="module")
def modules():
  return pytest.importorskip("torch"), pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  stored_models.write_folder(stored_models.load(), "clip_h", folder)
  return folder


def pictures(height, width):
  """Smooth areas, edges and noise; uint8 [3, H, W, 3]."""
  rng = np.random.default_rng(height + width)
  coarse = rng.integers(0, 256, (3, 1 + height // 40, 1 + width // 40, 3))
  coarse = coarse.repeat(40, axis=1).repeat(40, axis=2)[:, :height, :width]
  ramp = np.linspace(-60, 60, width)[:, None]
  return np.clip(coarse + ramp + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)


def make_model(modules, tokenizer_folder, folder, hidden_act):
  """A random CLIPModel as the hub stores it, and its processor."""
  torch, transformers = modules
  tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer_folder)
  sizes = dict(num_hidden_layers=3, num_attention_heads=4, hidden_act=hidden_act, projection_dim=24)
  config = transformers.CLIPConfig(
    text_config=sizes | dict(
      vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, max_position_embeddings=13,
    ),
    vision_config=sizes | dict(
      hidden_size=48, intermediate_size=96, image_size=SIZE, patch_size=14,
    ),
    projection_dim=24,
  )  # fmt: skip
  config.text_config.eos_token_id = 2
  torch.manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
    model.logit_scale.fill_(4.6)
    model.text_projection.weight.neg_()  # this seed's cosines are negative, which CLIPScore takes for 0
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  process = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
  )
  return model, tokenizer, process


def outputs_of(modules, model, tokenizer, process, images):
  torch, _ = modules
  pixels = process(list(images), return_tensors="pt")["pixel_values"]
  options = dict(padding=True, truncation=True, max_length=13, return_tensors="pt")
  with torch.no_grad():
    return model(pixel_values=pixels, **tokenizer(list(PROMPTS), **options))


def assert_near(found, wanted):
  assert found.dtype == np.float32 and isinstance(found, jax.Array)
  assert np.abs(np.asarray(found) - wanted).max() < TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("size", SIZES)
def test_clipscore_and_pickscore_equal_live_transformers(
  modules, tokenizer_folder, tmp_path, size, hidden_act
):
  parts, images = make_model(modules, tokenizer_folder, tmp_path, hidden_act), pictures(*size)
  wanted = outputs_of(modules, *parts, images)
  cosine = (wanted.text_embeds * wanted.image_embeds).sum(-1).numpy()
  assert (cosine > 0).any()
  score = lambda name: rewards.DEVICE_REWARDS[name](path=tmp_path)(images, PROMPTS, [{}] * 3)
  assert_near(score("pickscore"), wanted.logits_per_image.diagonal().numpy())
  assert_near(score("clipscore"), 2.5 * np.maximum(cosine, 0))


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_score_equals_live_torch(modules, tokenizer_folder, tmp_path, size):
  torch, _ = modules
  parts, images = make_model(modules, tokenizer_folder, tmp_path, "quick_gelu"), pictures(*size)
  nn = torch.nn
  layers = nn.Sequential(
    nn.Linear(24, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 8),
    nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1),
  ).eval()  # fmt: skip
  with torch.no_grad():
    wanted = layers(outputs_of(modules, *parts, images).image_embeds)[:, 0].numpy()
  head = {f"layers.{name}": tensor.numpy() for name, tensor in layers.state_dict().items()}
  safetensors.numpy.save_file(head, tmp_path / "head.safetensors")
  fn = rewards.DEVICE_REWARDS["aesthetic"](path=tmp_path, head=tmp_path / "head.safetensors")
  assert_near(fn(images, PROMPTS, [{}] * 3), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_equals_live_open_clip(tokenizer_folder, tmp_path, size):
  torch, theirs = pytest.importorskip("torch"), pytest.importorskip("open_clip")
  transforms = pytest.importorskip("torchvision").transforms
  bicubic, resize = transforms.InterpolationMode.BICUBIC, transforms.functional.resize
  tokenizer = hf_tokenizer.load_tokenizer("clip", tokenizer_folder)
  raw = {
    "embed_dim": 24,
    "vision_cfg": dict(image_size=SIZE, layers=3, width=48, head_width=12, patch_size=14),
    "text_cfg": dict(context_length=13, vocab_size=len(tokenizer), width=32, heads=4, layers=3),
  }
  torch.manual_seed(0)
  model = theirs.model.CLIP(**raw).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": raw}))
  height, width = (round(side * SIZE / max(size)) for side in size)
  x = torch.from_numpy(pictures(*size).transpose(0, 3, 1, 2) / np.float32(255))
  x = resize(x, [height, width], bicubic, antialias=True)
  top, left = (SIZE - height) // 2, (SIZE - width) // 2
  x = torch.nn.functional.pad(x, (left, SIZE - width - left, top, SIZE - height - top))
  channel = lambda values: torch.tensor(values)[:, None, None]
  x = (x - channel(theirs.OPENAI_DATASET_MEAN)) / channel(theirs.OPENAI_DATASET_STD)
  options = dict(padding="max_length", max_length=13, truncation=True, return_tensors="pt")
  with torch.no_grad():
    image, text, _ = model(x, tokenizer(list(PROMPTS), **options)["input_ids"])
  fn = rewards.DEVICE_REWARDS["hpsv2"](path=tmp_path, tokenizer=tokenizer_folder)
  assert_near(fn(pictures(*size), PROMPTS, [{}] * 3), (image * text).sum(-1).numpy())


@pytest.mark.filterwarnings("ignore:1 of 1 prompts have more")
@pytest.mark.parametrize(
  "prompt",
  [
    "  A   Red\tCat\n",
    "schÃ¶n, itâ€™s",  # UTF-8 that was read as Latin
    "“curly” quotes — and dashes…",
    "&lt;b&gt;bold&amp;amp;&lt;/b&gt;",
    "it's 12,345 cats!!! (8k, f/1.4)",
    "日本語 и кириллица 🐱",
    "ＦＵＬＬ ｗｉｄｔｈ",
    "",
    "a very long prompt that goes on and on, " * 20,
  ],
)
def test_prompts_have_the_ids_of_open_clips_tokenizer(tmp_path, prompt):
  """With the true vocabulary, which open_clip brings along."""
  theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
  vocab = {token: i for token, i in theirs.encoder.items() if i < theirs.sot_token_id}
  vocab |= {"<|startoftext|>": theirs.sot_token_id, "<|endoftext|>": theirs.eot_token_id}
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  merges = [" ".join(pair) for pair in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)]
  (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
  config = clip.CLIPTextConfig()
  tokenize = towers.load_tokenize("hpsv2", tmp_path, "", config, hint="", clean=hps._load_clean())
  wanted = theirs([prompt]).numpy()[0]
  length = wanted.argmax() + 1  # what lies behind the end is filled up differently, and not seen
  np.testing.assert_array_equal(tokenize([prompt])[0, :length], wanted[:length])
