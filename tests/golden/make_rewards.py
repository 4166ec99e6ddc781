"""Writes rewards.npz: the scores that the references' own code gives to pictures, with small random
weights; all files of those models; and the names and shapes of open_clip's ViT-H-14, the model of HPSv2.

CLIPScore, PickScore and the aesthetic score: transformers' CLIPModel, CLIPImageProcessor (on Pillow) and
CLIPTokenizer. HPSv2: open_clip's CLIP and torchvision's resize, called as HPSv2's copy of open_clip calls
them. Needs torch, transformers, torchvision and open_clip: python tests/golden/make_rewards.py
"""

import json
import pathlib
import tempfile

from make_prompt_embedding import CLIP_LENGTH, END, clip_tokenizer, randomise, store_as_the_hub
import numpy as np
import open_clip
import torch
import torchvision
import transformers

PROMPTS = ("a red cat", 'the blue sign says "dog on 7th"')
SIZES = ((48, 48), (37, 61), (71, 40), (20, 25))  # height, width
SIZE, PATCH, EMBEDDING = 28, 7, 12
HEAD = (EMBEDDING, 16, 8, 6, 4, 1)
MEAN, STD = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD


def clip_model(vocab_size, hidden_act, eos_token_id):
  sizes = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
               projection_dim=EMBEDDING, hidden_act=hidden_act)  # fmt: skip
  config = transformers.CLIPConfig(
    text_config=sizes | dict(
      vocab_size=vocab_size, hidden_size=16, max_position_embeddings=CLIP_LENGTH,
      bos_token_id=vocab_size - 2, pad_token_id=1, eos_token_id=eos_token_id,
    ),
    vision_config=sizes | dict(hidden_size=24, image_size=SIZE, patch_size=PATCH),
    projection_dim=EMBEDDING,
  )  # fmt: skip
  return spread(randomise(transformers.CLIPModel(config)))


def spread(model):
  """Scales logits as a trained model does, so that exp(logit_scale) counts."""
  with torch.no_grad():
    model.logit_scale.fill_(float(np.float16(np.log(100.0))))
  return model


def clip_embeddings(model, tokenizer, images, prompts):
  """(image [N, E], text [N, E]), not normalised."""
  process = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
  )
  pixels = process(list(images), return_tensors="pt")["pixel_values"]
  inputs = tokenizer(
    list(prompts), padding=True, truncation=True, max_length=CLIP_LENGTH, return_tensors="pt"
  )
  with torch.no_grad():
    found = model(pixel_values=pixels, **inputs, return_loss=False)
    image = model.visual_projection(model.vision_model(pixels).pooler_output)
  return found, image


def head_model():
  names, layers = (0, 2, 4, 6, 7), {}
  for i, name in enumerate(names):
    layers[f"layers.{name}.weight"] = torch.randn(HEAD[i + 1], HEAD[i]) * HEAD[i] ** -0.5
    layers[f"layers.{name}.bias"] = torch.randn(HEAD[i + 1]) * 0.1  # so that the picture counts
  return {name: tensor.half().float() for name, tensor in layers.items()}


def hps_config(vocab_size):
  return {
    "embed_dim": EMBEDDING,
    "vision_cfg": {
      "image_size": SIZE, "layers": 2, "width": 24, "head_width": 8, "patch_size": PATCH,
    },
    "text_cfg": {
      "context_length": CLIP_LENGTH, "vocab_size": vocab_size, "width": 16, "heads": 2, "layers": 2,
    },
  }  # fmt: skip


def true_shapes(name):
  """{tensor: shape} of a model of open_clip, of which nothing is allocated."""
  with torch.device("meta"):
    model = open_clip.model.CLIP(**open_clip.get_model_config(name))
  return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def hps_pixels(image):
  """HPSv2's preprocess_val: ToTensor, the longer side resized, black margins, normalised."""
  resize = torchvision.transforms.functional.resize
  x = torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255
  scale = SIZE / max(x.shape[1:])
  height, width = (round(side * scale) for side in x.shape[1:])
  x = resize(x, [height, width], torchvision.transforms.InterpolationMode.BICUBIC, antialias=True)
  top, left = (SIZE - height) // 2, (SIZE - width) // 2
  x = torch.nn.functional.pad(x, (left, SIZE - width - left, top, SIZE - height - top))
  return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def hps_scores(model, tokenizer, images, prompts):
  ids = torch.zeros(len(prompts), CLIP_LENGTH, dtype=torch.long)  # open_clip fills up with 0
  for row, prompt in zip(ids, prompts):
    tokens = tokenizer(prompt, truncation=True, max_length=CLIP_LENGTH)["input_ids"]
    row[: len(tokens)] = torch.tensor(tokens)
  with torch.no_grad():
    image, text, _ = model(torch.stack([hps_pixels(image) for image in images]), ids)
  return torch.diagonal(image @ text.T).numpy()


def draw(rng, height, width, count):
  """Pictures with both smooth areas and edges, in full range."""
  coarse = rng.integers(0, 256, (count, 1 + height // 7, 1 + width // 7, 3))
  fine = coarse.repeat(7, axis=1).repeat(7, axis=2)[:, :height, :width]
  ramp = np.linspace(-40, 40, width)[:, None]
  return np.clip(fine + ramp, 0, 255).astype(np.uint8)


def files_of(case, folder):
  """Every file of a folder but the weights, as bytes."""
  found = {f.name: f for f in sorted(pathlib.Path(folder).iterdir()) if f.suffix != ".safetensors"}
  return {f"{case}/files/{k}": np.frombuffer(f.read_bytes(), np.uint8) for k, f in found.items()}


def weights_of(case, tensors):
  return {f"{case}/weights/{k}": v.numpy().astype(np.float16) for k, v in tensors.items()}


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  tokenizer, size = clip_tokenizer(END)
  head = head_model()
  models = {
    "clip_l": clip_model(size, "quick_gelu", 2),
    "clip_h": clip_model(size, "gelu", size - 1),
    "hps": spread(randomise(open_clip.model.CLIP(**hps_config(size)))),
  }
  # This seed's cosines are negative, which CLIPScore takes for 0.
  models["clip_l"].text_projection.weight.data.neg_()
  arrays = {
    "prompts": json.dumps(PROMPTS),
    "ViT-H-14/config": json.dumps(open_clip.get_model_config("ViT-H-14")),
    "ViT-H-14/shapes": json.dumps(true_shapes("ViT-H-14")),
  }
  for case, model in models.items():
    with tempfile.TemporaryDirectory() as folder:
      tokenizer.save_pretrained(folder)
      store_as_the_hub(pathlib.Path(folder))
      if case == "hps":
        raw = {"model_cfg": hps_config(size)}
        pathlib.Path(folder, "open_clip_config.json").write_text(json.dumps(raw))
      else:
        model.config.save_pretrained(folder)
      arrays |= files_of(case, folder) | weights_of(case, model.state_dict())
  arrays |= weights_of("head", head)
  for height, width in SIZES:
    images, name = draw(rng, height, width, len(PROMPTS)), f"{height}x{width}"
    arrays[f"images/{name}"] = images
    for case in ("clip_l", "clip_h"):
      found, image = clip_embeddings(models[case], tokenizer, images, PROMPTS)
      arrays[f"{case}/logits/{name}"] = torch.diagonal(found.logits_per_image).numpy()
      arrays[f"{case}/cosine/{name}"] = (found.text_embeds * found.image_embeds).sum(-1).numpy()
      if case == "clip_l":
        x = image / image.norm(dim=-1, keepdim=True)
        for layer in (0, 2, 4, 6, 7):
          x = torch.nn.functional.linear(
            x, head[f"layers.{layer}.weight"], head[f"layers.{layer}.bias"]
          )
        arrays[f"head/score/{name}"] = x[:, 0].numpy()
    arrays[f"hps/score/{name}"] = hps_scores(models["hps"], tokenizer, images, PROMPTS)
  script = pathlib.Path(__file__)
  versions = f"transformers {transformers.__version__}, open_clip {open_clip.__version__}"
  np.savez_compressed(
    script.with_name("rewards.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
