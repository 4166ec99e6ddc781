"""Writes t5.npz: what transformers' T5EncoderModel computes, for small random models.

Needs torch and transformers (the "parity" extra): python tests/golden/make_t5.py
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.t5 import modeling_t5

COMMON = dict(vocab_size=40, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
# name -> (config, tokens a prompt)
CASES = {
  "one_block": (dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2), 5),
  "wide_heads": (dict(d_model=12, d_kv=8, d_ff=20, num_layers=3, num_heads=2), 17),
  "few_buckets": (
    dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
         relative_attention_max_distance=20),
    40,
  ),
}  # fmt: skip
LENGTH = 512


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  place = torch.arange(LENGTH)
  buckets = modeling_t5.T5Attention._relative_position_bucket(place[None, :] - place[:, None])
  # They depend on key - query alone: the first row and the first column say it all.
  arrays = {"buckets_after": buckets[0].numpy(), "buckets_before": buckets[:, 0].numpy()}
  for name, (config, tokens) in CASES.items():
    model = transformers.T5EncoderModel(transformers.T5Config(**COMMON, **config)).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
        # Values that float16 holds exactly, so that the file is half as large.
        parameter.copy_((torch.randn_like(parameter) * scale).half().float())
    ids = rng.integers(0, COMMON["vocab_size"], size=(2, tokens))
    with torch.no_grad():
      found = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    arrays |= {f"{name}/ids": ids, f"{name}/last_hidden_state": found}
    arrays[f"{name}/config"] = json.dumps(model.config.to_diff_dict())
    for key, tensor in model.state_dict().items():
      if key != "encoder.embed_tokens.weight":  # the same as shared.weight
        arrays[f"{name}/weights/{key}"] = tensor.numpy().astype(np.float16)
  script = pathlib.Path(__file__)
  versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("t5.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
