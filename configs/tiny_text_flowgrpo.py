"""Flow-GRPO, the baseline on the built-in task: the rest as in tiny_text_tpgrpo.py.

Command: python -m tpgrpo_jax.train --config configs/tiny_text_flowgrpo.py
Time: 4 to 6 minutes on one core that did other work too.
Measured: held-out OCR of 256 words from .562 to .726, .735, .755 (seeds 0, 1, 2).
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config():
  """Returns the recipe."""
  config = config_lib.to_config_dict(presets.tiny_text())
  config.run.dir = "runs/tiny_text_flowgrpo"
  config.credit.method = "flow_grpo"
  return config
