"""The rewards: `make(**options)` -> a function of images, prompts and metadata.

Those of the host take NumPy arrays, return (scores float32 [N], info), and may block. Those of the
devices are jitted: they take images on the devices and return scores that nobody has waited for yet.
"""

from collections.abc import Mapping
from typing import Any

from tpgrpo_jax import types
from tpgrpo_jax.rewards import (
  aesthetic,
  clip_score,
  combine,
  demonstrations,
  geneval,
  hps,
  jpeg,
  judge,
  ocr,
  remote,
  shapes,
)
from tpgrpo_jax.rewards.combine import (
  CombinedRewardFn,
  DeviceRewardMaker,
  RewardError,
  RewardMaker,
  Scores,
)

# A user's own "package.module:make" is one of these.
HOST_REWARDS: dict[str, RewardMaker] = {
  "ocr": ocr.make,
  "shapes": shapes.make,
  "geneval": geneval.make,
  "jpeg_compressibility": jpeg.make_compressibility,
  "jpeg_incompressibility": jpeg.make_incompressibility,
  "judge": judge.make,
  "remote": remote.make,
  "flow_grpo_server": remote.make_flow_grpo,
  "unirl": remote.make_unirl,
}

DEVICE_REWARDS: dict[str, DeviceRewardMaker] = {
  "clipscore": clip_score.make_clipscore,
  "pickscore": clip_score.make_pickscore,
  "hpsv2": hps.make,
  "aesthetic": aesthetic.make,
  "demonstrations": demonstrations.make,
}

REWARDS = (*HOST_REWARDS, *DEVICE_REWARDS)
"""Every name."""


def make_rewards(
  rewards: Mapping[str, Any], *, placement: types.Placement | None = None, **patience: Any
) -> CombinedRewardFn:
  """Makes the function of images, prompts and metadata that the config's `rewards` asks for.

  Args:
    rewards: as of `combine.make_weighted_sum`.
    placement: likewise.
    patience: timeout, retries and backoff, likewise.

  Returns:
    begin: (images, prompts, metadata) -> finish: () -> Scores; see `combine.make_weighted_sum`.

  Raises:
    ValueError: as `combine.make_weighted_sum`.
  """
  return combine.make_weighted_sum(
    rewards, HOST_REWARDS, DEVICE_REWARDS, placement=placement, **patience
  )


__all__ = [
  "DEVICE_REWARDS",
  "HOST_REWARDS",
  "REWARDS",
  "CombinedRewardFn",
  "RewardError",
  "Scores",
  "make_rewards",
]
