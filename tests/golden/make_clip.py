"""Writes clip.npz: what transformers' CLIP towers compute, for small random models.

Needs torch and transformers (the "parity" extra): python tests/golden/make_clip.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers

TEXT = dict(vocab_size=40, bos_token_id=0, pad_token_id=1, projection_dim=12, intermediate_size=24)
VISION = dict(projection_dim=12, intermediate_size=24)
# name -> (class, config, tokens a prompt)
TEXTS = {
  "clip_l_like": (
    transformers.CLIPTextModelWithProjection,
    dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=9,
         hidden_act="quick_gelu", eos_token_id=2),
    9,
  ),
  "clip_g_like": (
    transformers.CLIPTextModelWithProjection,
    dict(hidden_size=20, num_hidden_layers=2, num_attention_heads=5, max_position_embeddings=8,
         hidden_act="gelu", eos_token_id=38),
    6,
  ),
  "flux_like": (
    transformers.CLIPTextModel,
    dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=7,
         hidden_act="quick_gelu", eos_token_id=39),
    7,
  ),
}  # fmt: skip
VISIONS = {
  "vision_l_like": dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=12,
                        patch_size=4, hidden_act="quick_gelu"),
  "vision_h_like": dict(hidden_size=20, num_hidden_layers=1, num_attention_heads=5, image_size=9,
                        patch_size=3, hidden_act="gelu"),
}  # fmt: skip


def randomise(model):
  """Random weights that float16 holds exactly, so that the file is half as large."""
  with torch.no_grad():
    for parameter in model.parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
      parameter.copy_((torch.randn_like(parameter) * scale).half().float())
  return model.eval()


def draw_ids(rng, tokens, config):
  """Two prompts of different lengths: start, words, end, and the end repeated as padding."""
  end = config["eos_token_id"] if config["eos_token_id"] != 2 else TEXT["vocab_size"] - 1
  ids = rng.integers(3, end, size=(2, tokens))
  ids[:, 0] = TEXT["bos_token_id"]
  ids[0, tokens // 2 :], ids[1, -1] = end, end
  return ids


def text_case(rng, kind, config, tokens):
  config = TEXT | config
  model = randomise(kind(transformers.CLIPTextConfig(**config)))
  ids = draw_ids(rng, tokens, config)
  tower = getattr(model, "text_model", model)
  with torch.no_grad():
    found = tower(torch.from_numpy(ids), output_hidden_states=True)
    arrays = {
      "ids": ids, "last_hidden_state": found.last_hidden_state.numpy(),
      "penultimate": found.hidden_states[-2].numpy(), "pooled": found.pooler_output.numpy(),
    }  # fmt: skip
    if tower is not model:
      arrays["projected"] = model(torch.from_numpy(ids)).text_embeds.numpy()
  return model, arrays


def vision_case(rng, config):
  model = randomise(transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(**VISION, **config)
  ))  # fmt: skip
  size = config["image_size"]
  pixels = rng.standard_normal((2, size, size, 3)).astype(np.float32)
  inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    found, pooled = model(inputs), model.vision_model(inputs).pooler_output
  return model, {
    "pixels": pixels, "last_hidden_state": found.last_hidden_state.numpy(),
    "pooled": pooled.numpy(), "projected": found.image_embeds.numpy(),
  }  # fmt: skip


def clip_case(rng):
  """Both towers together, and the score of two images against two prompts."""
  text, vision = TEXTS["clip_g_like"][1], VISIONS["vision_l_like"]
  config = transformers.CLIPConfig(
    text_config=TEXT | text | {"projection_dim": 11},
    vision_config=VISION | vision | {"projection_dim": 11},
    projection_dim=11,
  )
  model = randomise(transformers.CLIPModel(config))
  ids, size = draw_ids(rng, 8, text), vision["image_size"]
  pixels = rng.standard_normal((2, size, size, 3)).astype(np.float32)
  with torch.no_grad():
    found = model(torch.from_numpy(ids), torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  return model, {
    "ids": ids, "pixels": pixels, "logits_per_image": found.logits_per_image.numpy(),
    "text_embeds": found.text_embeds.numpy(), "image_embeds": found.image_embeds.numpy(),
  }  # fmt: skip


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  cases = {name: text_case(rng, *case) for name, case in TEXTS.items()}
  cases |= {name: vision_case(rng, config) for name, config in VISIONS.items()}
  cases["clip"] = clip_case(rng)
  arrays = {}
  for name, (model, values) in cases.items():
    arrays |= {f"{name}/{key}": value for key, value in values.items()}
    arrays[f"{name}/config"] = json.dumps(model.config.to_diff_dict())
    for key, tensor in model.state_dict().items():
      arrays[f"{name}/weights/{key}"] = tensor.numpy().astype(np.float16)
  script = pathlib.Path(__file__)
  versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("clip.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
