"""SD3.5-Medium: human preference by DiNa-LRM, a reward of latents, so that training decodes no picture.

Command: python -m tpgrpo_jax.train --config configs/sd35m_dina.py[:METHOD]
METHOD may also be latent_increments, which scores the noisy states themselves. Needs accelerators, the
reward's weights in weights/dina_lrm (docs/rewards.md), and the prompts of Flow-GRPO (dataset/pickscore of its
repository) in datasets/pickscore: docs/fine_tune.md. No result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("sd35m_dina", method))
