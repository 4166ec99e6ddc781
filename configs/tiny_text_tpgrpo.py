"""TP-GRPO on the built-in task: a small model learns to spell, judged by PP-OCR.

Command: python -m tpgrpo_jax.train --config configs/tiny_text_tpgrpo.py
Time: 4 minutes on two quiet cores; 8 to 10 on one core that did other work too.
Measured: held-out OCR of 256 words from .562 to .766, .776, .772 (seeds 0, 1, 2).
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config():
  """Returns the recipe."""
  config = config_lib.to_config_dict(presets.tiny_text())
  config.run.dir = "runs/tiny_text_tpgrpo"
  config.credit.method = "tp_grpo"
  return config
