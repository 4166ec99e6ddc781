"""Writes flux_sigmas.npz: the noise levels that diffusers' FluxPipeline samples at.

Needs torch and diffusers (the "parity" extra): python tests/golden/make_flux_sigmas.py
"""

import pathlib

import diffusers
from diffusers.pipelines.flux import pipeline_flux
import numpy as np

# scheduler_config.json of the two models on the hub
SCHEDULERS = {
  "dev": dict(shift=3.0, use_dynamic_shifting=True),
  "schnell": dict(shift=1.0, use_dynamic_shifting=False),
}
COMMON = dict(
  base_image_seq_len=256,
  base_shift=0.5,
  max_image_seq_len=4096,
  max_shift=1.15,
  num_train_timesteps=1000,
)


def make():
  """{"model_T_tokens": [T + 1] sigmas}, with the pipeline's own steps."""
  arrays = {"diffusers_version": diffusers.__version__}
  for name, config in SCHEDULERS.items():
    for num_steps in (1, 4, 6, 10, 28):
      for tokens in (64, 256, 1024, 1536, 4096, 9216):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**COMMON, **config)
        even = np.linspace(1.0, 1 / num_steps, num_steps)
        mu = pipeline_flux.calculate_shift(tokens, 256, 4096, 0.5, 1.15)
        pipeline_flux.retrieve_timesteps(scheduler, num_steps, "cpu", sigmas=even, mu=mu)
        arrays[f"{name}_{num_steps}_{tokens}"] = scheduler.sigmas.numpy()
  return arrays


if __name__ == "__main__":
  script = pathlib.Path(__file__)
  np.savez_compressed(script.with_name("flux_sigmas.npz"), script=script.read_text(), **make())
