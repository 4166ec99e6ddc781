"""Writes vae.npz: what diffusers' AutoencoderKL computes, for small random models.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_vae.py
"""

import json
import pathlib

import diffusers
import numpy as np
import torch

# name -> (config, height and width of the image)
CASES = {
  "sd3_like": (
    dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
         use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305,
         shift_factor=0.0609),
    (12, 20),
  ),
  "quant_convs": (
    dict(block_out_channels=(4, 8, 8), norm_num_groups=2, layers_per_block=2, latent_channels=3,
         scaling_factor=0.18215),
    (20, 12),
  ),
  "no_attention": (
    dict(block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, latent_channels=2,
         mid_block_add_attention=False, use_post_quant_conv=False, scaling_factor=0.5),
    (5, 7),
  ),
  "sides_left_over": (
    dict(block_out_channels=(4, 4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=2,
         use_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
    (15, 18),
  ),
}  # fmt: skip
BATCH = 2


def small_random_model(config):
  depth = len(config["block_out_channels"])
  model = diffusers.AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * depth,
    up_block_types=("UpDecoderBlock2D",) * depth,
    **config,
  ).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      norm = "norm" in name and name.endswith("weight")
      scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
      # Values that float16 holds exactly, so that the file is half as large.
      parameter.copy_((float(norm) + torch.randn_like(parameter) * scale).half().float())
  return model


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  arrays = {}
  channels_last = lambda x: np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1))
  for name, (config, (height, width)) in CASES.items():
    model = small_random_model(config)
    images = rng.uniform(size=(BATCH, height, width, 3)).astype(np.float32)
    scale, shift = config["scaling_factor"], config.get("shift_factor", 0.0)
    with torch.no_grad():
      posterior = model.encode(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()) * 2 - 1)
      moments = posterior.latent_dist
      scaled = (moments.mean - shift) * scale
      latents = rng.standard_normal(scaled.shape).astype(np.float32)
      decoded = model.decode(torch.from_numpy(latents) / scale + shift).sample
    inputs = dict(images=images, latents=latents.transpose(0, 2, 3, 1))
    inputs["encoded"], inputs["std"] = channels_last(scaled), channels_last(moments.std * scale)
    inputs["decoded"] = channels_last(decoded)
    arrays |= {f"{name}/{key}": value for key, value in inputs.items()}
    arrays[f"{name}/config"] = json.dumps(dict(model.config))
    # One flat array, as hundreds of small ones have headers larger than themselves.
    state = {key: tensor.numpy().astype(np.float16) for key, tensor in model.state_dict().items()}
    arrays[f"{name}/shapes"] = json.dumps({key: value.shape for key, value in state.items()})
    arrays[f"{name}/weights"] = np.concatenate([value.ravel() for value in state.values()])
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("vae.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
