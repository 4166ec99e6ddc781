"""Writes mmdit.npz: what diffusers' SD3Transformer2DModel computes, for small random models.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_mmdit.py
"""

import json
import pathlib

import diffusers
import numpy as np
import torch

COMMON = dict(
  attention_head_dim=8,
  num_attention_heads=2,
  caption_projection_dim=16,
  joint_attention_dim=12,
  pooled_projection_dim=10,
)
# name -> (config, height and width of the latent)
CASES = {
  "one_block": (
    dict(num_layers=1, patch_size=2, in_channels=4, out_channels=4, sample_size=8,
         pos_embed_max_size=6, qk_norm=None, dual_attention_layers=()),
    (8, 8),
  ),
  "sd35_medium_like": (
    dict(num_layers=3, patch_size=2, in_channels=4, out_channels=4, sample_size=8,
         pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    (6, 10),
  ),
  "last_block_dual": (
    dict(num_layers=2, patch_size=4, in_channels=2, out_channels=2, sample_size=16,
         pos_embed_max_size=5, qk_norm=None, dual_attention_layers=(1,)),
    (20, 8),
  ),
  "tiny_like": (
    dict(num_layers=2, patch_size=8, in_channels=1, out_channels=1, sample_size=48,
         pos_embed_max_size=6, qk_norm="rms_norm", dual_attention_layers=()),
    (24, 48),
  ),
  "more_channels_out": (
    dict(num_layers=3, patch_size=1, in_channels=3, out_channels=6, sample_size=4,
         pos_embed_max_size=4, qk_norm="rms_norm", dual_attention_layers=(1,)),
    (3, 4),
  ),
}  # fmt: skip
BATCH, TOKENS = 2, 5


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  arrays = {}
  for name, (config, (height, width)) in CASES.items():
    config = COMMON | config
    model = diffusers.SD3Transformer2DModel(**config).eval()
    with torch.no_grad():
      for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        # Values that float16 holds exactly, so that the file is half as large.
        parameter.copy_((parameter * 0 + torch.randn_like(parameter) * scale).half().float())
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x = draw(BATCH, height, width, config["in_channels"])
    sigma = rng.uniform(size=BATCH).astype(np.float32)
    text = draw(BATCH, TOKENS, config["joint_attention_dim"])
    pooled = draw(BATCH, config["pooled_projection_dim"])
    with torch.no_grad():
      velocity = model(
        hidden_states=torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        encoder_hidden_states=torch.from_numpy(text),
        pooled_projections=torch.from_numpy(pooled),
        timestep=torch.from_numpy(1000 * sigma),
      ).sample.numpy()
    inputs = dict(x=x, sigma=sigma, text=text, pooled=pooled)
    inputs["velocity"] = velocity.transpose(0, 2, 3, 1)
    arrays |= {f"{name}/{key}": value for key, value in inputs.items()}
    arrays[f"{name}/config"] = json.dumps(config)
    for key, tensor in model.state_dict().items():
      kind = np.float32 if key == "pos_embed.pos_embed" else np.float16
      arrays[f"{name}/weights/{key}"] = tensor.numpy().astype(kind)
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("mmdit.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
