"""The rewards: `make(**options)` -> a function of images, prompts and metadata.

Those of the host take NumPy arrays, return (scores float32 [N], info), and may block. Those of the
devices are jitted: they take images on the devices and return scores that nobody has waited for yet. Those
of latents are of the devices too; they take latents and the prompts' embeddings, so that nothing is decoded.
"""

from collections.abc import Mapping
from typing import Any

from tpgrpo_jax import types
from tpgrpo_jax.rewards import (
  aesthetic,
  clip_score,
  combine,
  demonstrations,
  dina,
  geneval,
  hps,
  image_reward,
  jpeg,
  judge,
  latents,
  ocr,
  remote,
  shapes,
)
from tpgrpo_jax.rewards.combine import (
  CombinedRewardFn,
  DeviceRewardMaker,
  LatentRewardMaker,
  RewardError,
  RewardMaker,
  Scores,
)
from tpgrpo_jax.rewards.latents import Reads

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
  "image_reward": image_reward.make,
  "aesthetic": aesthetic.make,
  "demonstrations": demonstrations.make,
}

LATENT_REWARDS: dict[str, LatentRewardMaker] = {
  "dina_lrm": dina.make,
}

REWARDS = (*HOST_REWARDS, *DEVICE_REWARDS, *LATENT_REWARDS)
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
    rewards, HOST_REWARDS, DEVICE_REWARDS, LATENT_REWARDS, placement=placement, **patience
  )


def reads(rewards: Mapping[str, Any]) -> Reads:
  """What the rewards of a config look at: pictures, latents, or both."""
  return latents.reads(rewards, LATENT_REWARDS)


__all__ = [
  "DEVICE_REWARDS",
  "HOST_REWARDS",
  "LATENT_REWARDS",
  "REWARDS",
  "CombinedRewardFn",
  "Reads",
  "RewardError",
  "Scores",
  "make_rewards",
  "reads",
]
