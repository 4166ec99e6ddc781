"""Writes pipeline.npz: two complete small random pipelines of diffusers, SD3 and FLUX.1-dev, file by file,
and the images that they paint from given initial latents.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_pipeline.py
"""

import json
import pathlib
import tempfile

import diffusers
from make_prompt_embedding import WIDTH, flux_pipeline, randomise, sd3_pipeline
import numpy as np
import torch

HEIGHT, WIDTH_PIXELS = 48, 80
NUM_STEPS = 4
PROMPTS = ('the blue sign says "dog"', "a red cat")
GUIDANCE = {"sd3": (1.0, 4.5), "flux": (3.5, 1.5)}
LENGTHS = {"sd3": 20, "flux": 24}
CHANNELS = 4


def make_vae():
  return randomise(diffusers.AutoencoderKL(
    block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    sample_size=64,
  ))  # fmt: skip


def make_pipeline(family, folder):
  """The pipeline, saved to the folder."""
  torch.manual_seed(0)
  if family == "sd3":
    transformer = diffusers.SD3Transformer2DModel(
      sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3,
      attention_head_dim=16, num_attention_heads=2, caption_projection_dim=32, qk_norm="rms_norm",
      joint_attention_dim=WIDTH, pooled_projection_dim=16, pos_embed_max_size=8,
      dual_attention_layers=(0,),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return sd3_pipeline(
      folder, transformer=randomise(transformer), vae=make_vae(), scheduler=scheduler
    )
  transformer = diffusers.FluxTransformer2DModel(
    in_channels=4 * CHANNELS, num_layers=2, num_single_layers=2, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=8, guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
  )  # fmt: skip
  scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
  )
  return flux_pipeline(
    folder, transformer=randomise(transformer), vae=make_vae(), scheduler=scheduler
  )


def paint(pipe, family, latents, guidance):
  """Images [N, H, W, 3] in [0, 1] from initial latents [N, h, w, c]."""
  x = torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2)))
  if family == "flux":
    x = pipe._pack_latents(x, len(x), CHANNELS, *x.shape[2:])
  return pipe(
    prompt=list(PROMPTS), latents=x, height=HEIGHT, width=WIDTH_PIXELS, output_type="np",
    num_inference_steps=NUM_STEPS, guidance_scale=guidance, max_sequence_length=LENGTHS[family],
  ).images  # fmt: skip


def draw_latents():
  shape = (len(PROMPTS), HEIGHT // 8, WIDTH_PIXELS // 8, CHANNELS)
  return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def main():
  arrays = {"prompts": json.dumps(PROMPTS), "latents": draw_latents()}
  for family, scales in GUIDANCE.items():
    with tempfile.TemporaryDirectory() as folder:
      pipe = make_pipeline(family, folder)
      pipe.set_progress_bar_config(disable=True)
      for path in sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file()):
        data = np.frombuffer(path.read_bytes(), np.uint8)
        arrays[f"{family}/files/{path.relative_to(folder)}"] = data
      for scale in scales:
        images = paint(pipe, family, arrays["latents"], scale)
        print(family, scale, images.mean(), images.std(), images.min(), images.max())
        arrays[f"{family}/images/{scale}"] = images
  script = pathlib.Path(__file__)
  versions = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
  np.savez_compressed(
    script.with_name("pipeline.npz"), script=script.read_text(), versions=versions, **arrays
  )


if __name__ == "__main__":
  main()
