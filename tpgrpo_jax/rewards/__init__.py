"""The rewards: `make(**options) -> fn(images, prompts, metadata) -> (scores float32 [N], info)`."""

from collections.abc import Mapping
from typing import Any

from tpgrpo_jax.rewards import combine, jpeg, ocr
from tpgrpo_jax.rewards.combine import CombinedRewardFn, RewardError, RewardMaker

# A user's own "package.module:make" is one of these: NumPy in, NumPy out, and may block.
REWARDS: dict[str, RewardMaker] = {
    "ocr": ocr.make,
    "jpeg_compressibility": jpeg.make_compressibility,
    "jpeg_incompressibility": jpeg.make_incompressibility,
}


def make_rewards(rewards: Mapping[str, Any]) -> CombinedRewardFn:
  """Makes the function of images, prompts and metadata that the config's `rewards` asks for.

  Args:
    rewards: as of `combine.make_weighted_sum`.

  Raises:
    ValueError: as `combine.make_weighted_sum`.
  """
  return combine.make_weighted_sum(rewards, REWARDS)


__all__ = [
    "REWARDS",
    "CombinedRewardFn",
    "RewardError",
    "make_rewards",
]
