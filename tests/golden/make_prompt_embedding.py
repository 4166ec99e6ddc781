"""Writes prompt_embedding.npz: what diffusers' SD3 and FLUX pipelines make of prompts, with small random
text encoders and small tokenizers, and all files of those encoders and tokenizers.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_prompt_embedding.py
"""

import json
import pathlib
import tempfile

import diffusers
import numpy as np
import tokenizers
import torch
import transformers

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("cat", "dog", "red", "blue", "house", "the", "a", "of", "on", "in", "sign", "says")
PROMPTS = (
  "a red cat",
  "",
  'the blue sign says "dog on 7th"',
  "A house; of the, red dog in the blue house on the red house, of a cat",
)
WIDTH = 32  # of T5 and of the transformer's text
CLIP_LENGTH = 13


def clip_tokenizer(pad_token):
  """A byte-pair tokenizer of all bytes and a few words, from the two files that the hub stores."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab, merges = [*alphabet, *(f"{c}</w>" for c in alphabet)], []
  for word in WORDS:
    left = word[0]
    for i, c in enumerate(word[1:], start=2):
      right = f"{c}</w>" if i == len(word) else c
      if f"{left} {right}" not in merges:
        merges.append(f"{left} {right}")
        vocab.append(left + right)
      left += right
  ids = {token: i for i, token in enumerate([*vocab, START, END])}
  with tempfile.TemporaryDirectory() as folder:
    write_vocab(pathlib.Path(folder), ids, merges)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
      folder, model_max_length=CLIP_LENGTH, pad_token=pad_token
    )
  return tokenizer, len(ids)


def write_vocab(folder, ids, merges):
  (folder / "vocab.json").write_text(json.dumps(ids))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


def store_as_the_hub(folder):
  """Puts vocab.json and merges.txt in the place of a CLIP tokenizer's tokenizer.json."""
  path = folder / "tokenizer.json"
  model = json.loads(path.read_text())["model"]
  write_vocab(folder, model["vocab"], [" ".join(pair) for pair in model["merges"]])
  path.unlink()


def t5_tokenizer():
  """A unigram tokenizer of ASCII and a few words."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
  pieces += [(f"▁{word}", -5.0 - i / 10) for i, word in enumerate(WORDS)]
  pieces += [(chr(c), -9.0 - c / 100) for c in range(33, 127)]
  return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512), len(pieces)


def randomise(model):
  """Weights that float16 holds exactly, so that the file is smaller."""
  with torch.no_grad():
    for parameter in model.parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
      parameter.copy_((torch.randn_like(parameter) * scale).half().float())
  return model.eval()


def clip_encoder(kind, vocab_size, hidden_size, projection_dim, hidden_act, eos_token_id):
  return randomise(kind(transformers.CLIPTextConfig(
      vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
      projection_dim=projection_dim, num_hidden_layers=2, num_attention_heads=2,
      max_position_embeddings=CLIP_LENGTH, hidden_act=hidden_act, bos_token_id=0, pad_token_id=1,
      eos_token_id=eos_token_id,
  )))  # fmt: skip


def t5_encoder(vocab_size):
  return randomise(transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=vocab_size, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
      feed_forward_proj="gated-gelu", tie_word_embeddings=False,
  )))  # fmt: skip


def sd3_pipeline(folder, *, transformer=None, vae=None, scheduler=None, with_t5=True):
  """A StableDiffusion3Pipeline with small random text encoders, saved to the folder."""
  kind = transformers.CLIPTextModelWithProjection
  tokenizer, size = clip_tokenizer(END)
  tokenizer_2, _ = clip_tokenizer("!")
  tokenizer_3, t5_size = t5_tokenizer()
  if transformer is None:  # what is asked for where T5 is missing
    transformer = diffusers.SD3Transformer2DModel(
      sample_size=4, patch_size=1, in_channels=1, out_channels=1, num_layers=1, attention_head_dim=4,
      num_attention_heads=1, caption_projection_dim=4, joint_attention_dim=WIDTH,
      pooled_projection_dim=16, pos_embed_max_size=4,
    )  # fmt: skip
  pipe = diffusers.StableDiffusion3Pipeline(
    transformer=transformer, scheduler=scheduler, vae=vae,
    text_encoder=clip_encoder(kind, size, 8, 6, "quick_gelu", 2), tokenizer=tokenizer,
    text_encoder_2=clip_encoder(kind, size, 12, 10, "gelu", size - 1), tokenizer_2=tokenizer_2,
    text_encoder_3=t5_encoder(t5_size) if with_t5 else None,
    tokenizer_3=tokenizer_3 if with_t5 else None,
  )  # fmt: skip
  pipe.save_pretrained(folder)
  for name in ("tokenizer", "tokenizer_2"):
    store_as_the_hub(pathlib.Path(folder, name))
  return pipe


def flux_pipeline(folder, *, transformer=None, vae=None, scheduler=None):
  """A FluxPipeline with small random text encoders, saved to the folder."""
  tokenizer, size = clip_tokenizer(END)
  tokenizer_2, t5_size = t5_tokenizer()
  encoder = clip_encoder(transformers.CLIPTextModel, size, 8, 6, "quick_gelu", 2)
  pipe = diffusers.FluxPipeline(
    transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer,
    text_encoder_2=t5_encoder(t5_size), tokenizer_2=tokenizer_2,
  )  # fmt: skip
  pipe.save_pretrained(folder)
  return pipe


def encode_sd3(pipe, prompts, length):
  """(text, pooled) of the prompts, and of the empty negative prompt."""
  with torch.no_grad():
    text, negative, pooled, negative_pooled = pipe.encode_prompt(
      list(prompts), None, None, max_sequence_length=length
    )
  return [x.numpy() for x in (text, pooled, negative, negative_pooled)]


def encode_flux(pipe, prompts, length):
  """(text, pooled) of the prompts."""
  with torch.no_grad():
    text, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
  return [text.numpy(), pooled.numpy()]


def stored_files(folder):
  """Every file below a folder but the transformer's weights, as bytes."""
  files = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
  names = {str(path.relative_to(folder)): path for path in files}
  return {
    name: np.frombuffer(path.read_bytes(), np.uint8)
    for name, path in names.items()
    if not name.startswith("transformer/") or name.endswith("config.json")
  }


def main():
  torch.manual_seed(0)
  arrays = {"prompts": json.dumps(PROMPTS)}
  with tempfile.TemporaryDirectory() as folder:
    pipe = sd3_pipeline(folder)
    arrays |= {f"sd3/files/{name}": data for name, data in stored_files(folder).items()}
  names = ("text", "pooled", "negative_text", "negative_pooled")
  arrays |= {f"sd3/{name}": x for name, x in zip(names, encode_sd3(pipe, PROMPTS, 20))}
  pipe.text_encoder_3 = None
  arrays["sd3/text_without_t5"] = encode_sd3(pipe, PROMPTS, 20)[0]
  with tempfile.TemporaryDirectory() as folder:
    pipe = flux_pipeline(folder)
    arrays |= {f"flux/files/{name}": data for name, data in stored_files(folder).items()}
  arrays |= {f"flux/{name}": x for name, x in zip(names, encode_flux(pipe, PROMPTS, 24))}
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
  np.savez_compressed(
    script.with_name("prompt_embedding.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
