"""The second built-in task: a small model learns to paint the shapes that are asked for, GenEval in small.

Command: python -m tpgrpo_jax.train --config configs/tiny_shapes.py[:METHOD]
METHOD is a name of tpgrpo_jax.config.presets.METHODS (docs/methods.md); tp_grpo unless it is given. The
reward is 0 or 1, so that tp_grpo and tp_grpo_consistent are increments here. diffusion_nft has learned most
(docs/evidence.md).
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("tiny_shapes", method))
