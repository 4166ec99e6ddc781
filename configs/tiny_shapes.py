"""The second built-in task: a small model learns to paint the shapes that are asked for, GenEval in small.

Command: python -m tpgrpo_jax.train --config configs/tiny_shapes.py[:METHOD]
METHOD is a name of tpgrpo_jax.config.presets.METHODS (docs/methods.md); tp_grpo unless it is given. Training
is paid for each part of a prompt that is right. Evaluations report the strict score: 1 where all is right and
no shape is too many, else 0 (docs/rewards.md). docs/evidence.md compares the methods.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("tiny_shapes", method))
