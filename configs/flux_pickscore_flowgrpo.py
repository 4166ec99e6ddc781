"""Flow-GRPO, the baseline on FLUX.1-dev: human preference (PickScore).

Command: python -m tpgrpo_jax.train --config configs/flux_pickscore_flowgrpo.py
Needs accelerators, and the prompts of Flow-GRPO (dataset/pickscore of its repository) in datasets/pickscore:
docs/fine_tune_sd35.md. The settings are the papers'; no result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config():
  """Returns the recipe."""
  config = config_lib.to_config_dict(presets.flux_dev())
  config.run.dir = "runs/flux_pickscore_flowgrpo"
  config.prompts.path = "datasets/pickscore"
  config.rewards = {
    "pickscore": {
      "weight": 1.0,
      "path": "yuvalkirstain/PickScore_v1",
      "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }
  }
  config.credit.method = "flow_grpo"
  return config
