"""How much of the devices' matmul peak a phase reaches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from tpgrpo_jax.cost import flops, hardware


class Meter:
  """Counts the operations of each phase's program once, from shapes alone.

  Attributes:
    programs: phase -> what does its work and no work twice.
  """

  def __init__(self, programs: Mapping[str, Callable[..., Any]]):
    self.programs = programs
    self._counted: dict[str, float] = {}
    self._each: dict[str, float] = {}
    self._skipped: dict[str, float] = {}

  def count(self, phase: str, calls: int, *args: Any) -> None:
    """Says that `phase` is `calls` calls with these arguments; only the first time is looked at."""
    if phase not in self._counted:
      self._counted[phase] = calls * flops.count(self.programs[phase], *args).total

  def skip(self, phase: str, number: float, each: Callable[[], float]) -> None:
    """Says that `phase` leaves out so many of its evaluations in this epoch.

    Args:
      phase: as of `count`.
      number: of evaluations.
      each: operations of one; asked once.
    """
    if number and phase not in self._each:
      self._each[phase] = each()
    self._skipped[phase] = number * self._each.get(phase, 0.0)

  def total(self) -> float:
    """Operations of an epoch, as far as phases were counted."""
    return sum(map(self._done, self._counted))

  def _done(self, phase):
    return self._counted[phase] - self._skipped.get(phase, 0.0)

  def row(self, seconds: dict[str, float]) -> dict[str, float]:
    """Metrics of one epoch: time/<phase>_teraflops, a second, all devices, and time/<phase>_utilisation.

    The latter is the share of the devices' bfloat16 peak, where hardware.CHIPS knows them: model FLOPs
    utilisation. Counted are matrix products and convolutions, with those of padded attention blocks on a
    TPU, and without what rematerialisation repeats.

    Args:
      seconds: phase -> time.
    """
    chip = hardware.find_chip(jax.devices()[0])
    result = {}
    for phase in self._counted:
      rate = self._done(phase) / seconds[phase]
      result[f"time/{phase}_teraflops"] = rate / 1e12
      if chip:
        result[f"time/{phase}_utilisation"] = rate / (chip.flops * jax.device_count())
    return result
