"""Writes flux.npz: what diffusers' FluxTransformer2DModel computes, for small random models.

Latents are packed and unpacked, and image ids made, by FluxPipeline's own functions. Needs torch and
diffusers (the "parity" extra): python tests/golden/make_flux.py
"""

import json
import pathlib

import diffusers
import numpy as np
import torch

COMMON = dict(
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  axes_dims_rope=(2, 4, 2),
)
# name -> (config, height and width of the latent, text tokens, guidance scale)
CASES = {
  "dev_like": (
    dict(in_channels=16, num_layers=2, num_single_layers=2, guidance_embeds=True), (6, 10), 5, 3.5,
  ),
  "schnell_like": (
    dict(in_channels=16, num_layers=1, num_single_layers=2, guidance_embeds=False), (8, 4), 7, None,
  ),
  "one_token": (
    dict(in_channels=4, num_layers=1, num_single_layers=1, guidance_embeds=True), (2, 2), 1, 1.0,
  ),
  "more_channels_out": (
    dict(in_channels=12, out_channels=24, num_layers=1, num_single_layers=1, guidance_embeds=False,
         attention_head_dim=12, axes_dims_rope=(4, 2, 6)),
    (4, 14), 3, None,
  ),
}  # fmt: skip
BATCH = 2


def evaluate(model, x, sigma, text, pooled, guidance):
  """Velocity [B, h, w, c] of NumPy latents; guidance is a number or None."""
  pipeline = diffusers.FluxPipeline
  b, height, width, c = x.shape
  latents = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    velocity = model(
      hidden_states=pipeline._pack_latents(latents, b, c, height, width),
      encoder_hidden_states=torch.from_numpy(text),
      pooled_projections=torch.from_numpy(pooled),
      timestep=torch.from_numpy(sigma),
      img_ids=pipeline._prepare_latent_image_ids(b, height // 2, width // 2, "cpu", torch.float32),
      txt_ids=torch.zeros(text.shape[1], 3),
      guidance=None if guidance is None else torch.full([b], guidance),
    ).sample
  velocity = pipeline._unpack_latents(velocity, 8 * height, 8 * width, 8)
  return velocity.numpy().transpose(0, 2, 3, 1)


def randomize(model):
  """Normal weights in steps of 1/32: float16 holds them exactly, and they compress well."""
  with torch.no_grad():
    for parameter in model.parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
      parameter.copy_((torch.randn_like(parameter) * scale * 32).round() / 32)


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  arrays = {}
  for name, (config, (height, width), tokens, guidance) in CASES.items():
    config = COMMON | config
    model = diffusers.FluxTransformer2DModel(**config).eval()
    randomize(model)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    inputs = dict(
      x=draw(BATCH, height, width, config["in_channels"] // 4),
      sigma=rng.uniform(size=BATCH).astype(np.float32),
      text=draw(BATCH, tokens, config["joint_attention_dim"]),
      pooled=draw(BATCH, config["pooled_projection_dim"]),
    )
    inputs["velocity"] = evaluate(model, **inputs, guidance=guidance)
    arrays |= {f"{name}/{key}": value for key, value in inputs.items()}
    arrays[f"{name}/config"] = json.dumps(config)
    arrays[f"{name}/guidance"] = json.dumps(guidance)
    for key, tensor in model.state_dict().items():
      arrays[f"{name}/weights/{key}"] = tensor.numpy().astype(np.float16)
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("flux.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
