"""Flow-GRPO, the baseline on SD3.5-Medium: visual text rendering.

Command: python -m tpgrpo_jax.train --config configs/sd35m_ocr_flowgrpo.py
Needs accelerators, and the prompts of Flow-GRPO (dataset/ocr of its repository) in datasets/ocr:
docs/fine_tune_sd35.md. The settings are the papers'; no result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config():
  """Returns the recipe."""
  config = config_lib.to_config_dict(presets.sd35m())
  config.run.dir = "runs/sd35m_ocr_flowgrpo"
  config.prompts.path = "datasets/ocr"
  config.rewards = {
    "ocr": {"weight": 1.0, "detect": True, "rule": "flow_grpo", "text_score": 0.5}  # as Flow-GRPO
  }
  config.credit.method = "flow_grpo"
  return config
