"""FLUX.1-Kontext-dev, which edits pictures: human preference (PickScore) for the edited ones.

Command: python -m tpgrpo_jax.train --config configs/flux_kontext_pickscore.py[:METHOD]
Needs accelerators, and your own pictures in datasets/edits: train.jsonl and test.jsonl whose lines are
{"prompt": "make the car red", "image": "pictures/car.jpg"}: docs/fine_tune.md. PickScore reads the prompt
and the new picture; it does not see whether the rest has stayed as it was. No result of ours yet.
"""

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets


def get_config(method="tp_grpo"):
  """Returns the recipe of a method."""
  return config_lib.to_config_dict(presets.recipe("flux_kontext_pickscore", method))
