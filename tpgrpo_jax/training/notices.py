"""What a run knows of itself and says once, in one line each, beside the metrics that show it."""

from collections.abc import Iterator, Mapping
import sys
from typing import Any

import tqdm

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import processes

DROWNS = 0.95  # share of the advantage's variance


class Notices:
  """Says each thing once in a run; of several processes the first one speaks."""

  def __init__(self, config: config_lib.Config):
    self._config, self._said = config, set()

  def epoch(self, row: Mapping[str, Any]) -> None:
    """Says what is new in the metrics of an epoch."""
    self._say(of_epoch(self._config, row))

  def _say(self, found):
    for name, line in found:
      if name not in self._said and processes.is_first():
        tqdm.tqdm.write(f"note: {line}", file=sys.stderr)
      self._said.add(name)


def of_epoch(config: config_lib.Config, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """(name, line) of each thing that an epoch's metrics tell.

  Args:
    config: of the run.
    row: metric name -> number.
  """
  shares = {
    key.split("/")[1]: value
    for key, value in row.items()
    if key.startswith("reward/") and key.endswith("/share")
  }
  for label, share in shares.items():
    if len(shares) > 1 and share > DROWNS:
      others = ", ".join(repr(other) for other in shares if other != label)
      remedy = (
        f"Lower rewards.{label} or raise the others' weights"
        if config.advantage.per_reward
        else "Set advantage.per_reward=True, which normalises each for itself, or change the weights"
      )
      yield (
        f"share/{label}",
        f"reward {label!r} makes {share:.0%} of the advantage's variance, so {others} hardly counts. "
        f"{remedy}.",
      )
