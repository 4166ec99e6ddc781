"""The rewards: `make(**options) -> fn(images, prompts, metadata) -> (scores float32 [N], info)`."""

from collections.abc import Mapping
from typing import Any

from tpgrpo_jax.rewards import combine, jpeg, ocr
from tpgrpo_jax.rewards.combine import CombinedRewardFn, RewardError, RewardMaker

# NumPy in, NumPy out, and may block; a user's own "package.module:make" is one of these.
HOST_REWARDS: dict[str, RewardMaker] = {
    "ocr": ocr.make,
    "jpeg_compressibility": jpeg.make_compressibility,
    "jpeg_incompressibility": jpeg.make_incompressibility,
}

# Pure JAX functions of the images, which can be jitted together with the decoder.
DEVICE_REWARDS: dict[str, RewardMaker] = {}

REWARDS = HOST_REWARDS | DEVICE_REWARDS


def make_rewards(rewards: Mapping[str, Any]) -> CombinedRewardFn:
  """Makes the function of images, prompts and metadata that the config's `rewards` asks for.

  Args:
    rewards: as of `combine.make_weighted_sum`.

  Raises:
    ValueError: as `combine.make_weighted_sum`.
  """
  return combine.make_weighted_sum(rewards, REWARDS)


__all__ = [
    "DEVICE_REWARDS",
    "HOST_REWARDS",
    "REWARDS",
    "CombinedRewardFn",
    "RewardError",
    "make_rewards",
]
