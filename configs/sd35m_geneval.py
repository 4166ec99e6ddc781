"""SD3.5-Medium: objects, numbers, colours and places (GenEval).

Command: python -m tpgrpo_jax.train --config configs/sd35m_geneval.py[:METHOD]
Needs accelerators; the reward's server, python -m tpgrpo_jax.serve --rewards geneval with its options, in
another process; and the metadata of Flow-GRPO (dataset/geneval of its repository) in datasets/geneval:
docs/geneval.md. No result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("sd35m_geneval", method))
