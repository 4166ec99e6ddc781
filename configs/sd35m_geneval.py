"""SD3.5-Medium: objects, numbers, colours and places (GenEval).

Start the reward's server first, where torch has a GPU (docs/geneval.md):

  python -m tpgrpo_jax.serve --rewards geneval --options '{"geneval": {"rule": "flow_grpo",
    "detector": "facebook/mask2former-swin-small-coco-instance", "classifier": "openai/clip-vit-large-patch14"}}'

Command: python -m tpgrpo_jax.train --config configs/sd35m_geneval.py[:METHOD]
Needs accelerators, and the metadata of Flow-GRPO (dataset/geneval of its repository) in
datasets/geneval: docs/geneval.md. No result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("sd35m_geneval", method))
