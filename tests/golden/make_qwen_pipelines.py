"""Writes qwen_pipelines.npz: two complete small random pipelines of diffusers that read Qwen3, those of
FLUX.2-klein and Z-Image, file by file, what they make of prompts, and the images that they paint from given
initial latents.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_qwen_pipelines.py
"""

import json
import pathlib
import tempfile

import diffusers
from make_pipeline import NUM_STEPS
from make_pipeline import make_vae as make_kl_vae
from make_prompt_embedding import WORDS, randomise
import numpy as np
import tokenizers
import torch
import transformers

SIZES = {"": (48, 80), "small/": (32, 48)}
# Of 33 and 11 tokens with the chat around them: Z-Image pads them to 64 and to 32.
PROMPTS = ('the blue sign says "dog" on 7th, quartz', "a red cat")
GUIDANCE = {"flux2": (1.0, 4.0), "z_image": (1.0, 5.0)}
LENGTHS = {"flux2": 48, "z_image": 96}
CHANNELS = 4
QWEN_WIDTH = 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# What Qwen3's own template makes of one user's turn.
TEMPLATE = (
  "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
  "{{- '<|im_end|>\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
  "{%- if enable_thinking is defined and enable_thinking is false %}"
  "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def qwen_tokenizer():
  """A byte-pair tokenizer of all bytes and a few words, with a chat template."""
  vocab, merges = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), []
  for word in ("user", "assistant", *(f"Ġ{word}" for word in WORDS)):
    left = word[0]
    for right in word[1:]:
      if (left, right) not in merges:
        merges.append((left, right))
        vocab.append(left + right)
      left += right
  ids = {token: i for i, token in enumerate([*vocab, *SPECIAL])}
  tokenizer = transformers.Qwen2Tokenizer(
    vocab=ids, merges=merges, model_max_length=512, chat_template=TEMPLATE,
    extra_special_tokens=list(SPECIAL[1:]),
  )  # fmt: skip
  return tokenizer, len(ids)


def qwen_encoder(kind, vocab_size, layers):
  return randomise(kind(transformers.Qwen3Config(
      vocab_size=vocab_size, hidden_size=QWEN_WIDTH, intermediate_size=24, num_hidden_layers=layers,
      num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
      rope_parameters={"rope_type": "default", "rope_theta": 1e6},
  )))  # fmt: skip


def make_flux2_vae():
  vae = randomise(diffusers.AutoencoderKLFlux2(
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
    sample_size=64,
  ))  # fmt: skip
  vae.bn.running_mean.copy_(torch.randn(4 * CHANNELS))
  vae.bn.running_var.copy_(torch.rand(4 * CHANNELS) + 0.5)
  return vae


def make_flux2(folder):
  tokenizer, size = qwen_tokenizer()
  transformer = diffusers.Flux2Transformer2DModel(
    in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=3 * QWEN_WIDTH, axes_dims_rope=(4, 4, 4, 4),
    guidance_embeds=False,
  )  # fmt: skip
  pipe = diffusers.Flux2KleinPipeline(
    transformer=randomise(transformer), vae=make_flux2_vae(), tokenizer=tokenizer,
    text_encoder=qwen_encoder(transformers.Qwen3ForCausalLM, size, 28),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
  )  # fmt: skip
  pipe.save_pretrained(folder)
  return pipe


def make_z_image(folder):
  tokenizer, size = qwen_tokenizer()
  transformer = randomise(diffusers.ZImageTransformer2DModel(
    in_channels=CHANNELS, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
    cap_feat_dim=QWEN_WIDTH, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
  ))  # fmt: skip
  with torch.no_grad():  # 300,000 weights, of three values, so that the file is small
    for layer in (transformer.t_embedder.mlp[0], transformer.t_embedder.mlp[2]):
      layer.weight.copy_(layer.weight.sign() * (layer.weight.abs() > 0.03) / 32)
  pipe = diffusers.ZImagePipeline(
    transformer=transformer, vae=make_kl_vae(), tokenizer=tokenizer,
    text_encoder=qwen_encoder(transformers.Qwen3Model, size, 3),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
  )  # fmt: skip
  pipe.save_pretrained(folder)
  return pipe


MAKE = {"flux2": make_flux2, "z_image": make_z_image}


def make_pipeline(family, folder):
  """The pipeline, saved to the folder."""
  torch.manual_seed(0)
  pipe = MAKE[family](folder)
  pipe.set_progress_bar_config(disable=True)
  return pipe


def paint(pipe, family, latents, scale, *, size=SIZES[""]):
  """Images [N, H, W, 3] in [0, 1] from initial latents [N, h, w, c]; Z-Image counts guidance from 0."""
  x = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))
  with torch.no_grad():
    return pipe(
      prompt=list(PROMPTS), latents=x, height=size[0], width=size[1], output_type="np",
      num_inference_steps=NUM_STEPS, guidance_scale=scale - (family == "z_image"),
      max_sequence_length=LENGTHS[family],
    ).images  # fmt: skip


def encode(pipe, family, prompts):
  """(text, length) of the prompts; of FLUX.2 all tokens count."""
  length = LENGTHS[family]
  with torch.no_grad():
    if family == "flux2":
      text, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
      return text.numpy(), np.full(len(prompts), length)
    rows, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
  padded = [np.pad(row.numpy(), ((0, length - len(row)), (0, 0))) for row in rows]
  return np.stack(padded), np.asarray([len(row) for row in rows])


def draw_latents(family, size):
  """[2, h, w, c]: FLUX.2's are packed."""
  pixels, channels = (16, 4 * CHANNELS) if family == "flux2" else (8, CHANNELS)
  shape = (len(PROMPTS), size[0] // pixels, size[1] // pixels, channels)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def main():
  arrays = {"prompts": json.dumps(PROMPTS)}
  for family, scales in GUIDANCE.items():
    with tempfile.TemporaryDirectory() as folder:
      pipe = make_pipeline(family, folder)
      for path in sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file()):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        arrays[f"{family}/files/{path.relative_to(folder)}"] = data
      text, length = encode(pipe, family, (*PROMPTS, ""))
      print(family, "tokens", length)
      arrays |= {f"{family}/text": text, f"{family}/length": length}
      for place, size in SIZES.items():
        latents = arrays[f"{family}/{place}latents"] = draw_latents(family, size)
        for scale in scales:
          images = paint(pipe, family, latents, scale, size=size)
          print(family, place, scale, images.mean(), images.std(), images.min(), images.max())
          arrays[f"{family}/{place}images/{scale}"] = images.astype(np.float16)
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("qwen_pipelines.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
