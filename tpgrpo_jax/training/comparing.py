"""Two models on the same prompts and the same noise: what one gains over the other, prompt by prompt."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.config import rules
from tpgrpo_jax.training import judging, restore

BASE = "base"


def choose_other(config: config_lib.Config, name: str) -> config_lib.Config:
  """The config of what --compare names: the base model of `config`, or the run in another folder.

  Both are sampled alike, with the sampler of `config`.

  Args:
    config: of the model that is compared.
    name: BASE or a run folder.

  Raises:
    ValueError: no run folder, or one whose model has no such sampler.
  """
  if name == BASE:
    return config
  other = dataclasses.replace(restore.choose_config(name, None), sampler=config.sampler)
  rules.validate(other)
  return other


def open_other(
  config: config_lib.Config, name: str, prompts: Sequence[types.Prompt], weights: str
) -> restore.Opened:
  """Opens what --compare names.

  Args:
    config: of `choose_other`.
    name: BASE or a run folder.
    prompts: as of `restore.open_model`.
    weights: of a run, likewise.
  """
  if name == BASE:
    return restore.open_model(config, prompts=prompts)
  return restore.open_model(config, name, prompts=prompts, weights=weights)


def gains(result: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, judging.Estimate]:
  """label -> mean of the paired differences and its standard error.

  Args:
    result: of `scoring.evaluate_images`.
    other: of the same prompts and noise, of the model that it is compared with.
  """
  scores = lambda each, label: np.asarray([s["scores"][label] for s in each["samples"]])
  return {
    label: judging.estimate(scores(result, label) - scores(other, label))
    for label in result["rewards"]
  }


def render(name: str, other: Mapping[str, Any], found: Mapping[str, judging.Estimate]) -> str:
  """A line for each reward: the other model's score, and the gain over it with its 95 % interval."""
  return "\n".join(
    f"{label}: {other['rewards'][label]['mean']:.4f} of {name}, a gain of {gain.mean:+.4f} ± "
    f"{1.96 * gain.standard_error:.4f} (paired; standard error {gain.standard_error:.4f})"
    for label, gain in found.items()
  )
