"""How much of the devices' matmul peak a phase reaches."""

from typing import Any

import jax

from tpgrpo_jax import flops

# device_kind -> dense bfloat16 FLOP/s of one device. Sources: NVIDIA's and Google Cloud's data sheets.
PEAKS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}


class Meter:
  """Counts the operations of each phase's program once, from shapes alone."""

  def __init__(self):
    self._counted: dict[str, float] = {}

  def count(self, phase: str, calls: int, function: Any, *args: Any) -> None:
    """Says that `phase` is `calls` calls of a program; only the first time is looked at."""
    if phase not in self._counted:
      self._counted[phase] = calls * flops.count(function, *args).total

  def row(self, seconds: dict[str, float]) -> dict[str, float]:
    """Metrics of one epoch: time/<phase>_teraflops, a second, all devices, and time/<phase>_utilisation.

    The latter, the share of the devices' bfloat16 peak, only where PEAKS knows them. Counted are matrix
    products and convolutions that run, those that rematerialisation repeats among them.

    Args:
      seconds: phase -> time.
    """
    peak = PEAKS.get(jax.devices()[0].device_kind)
    result = {}
    for phase, operations in self._counted.items():
      rate = operations / seconds[phase]
      result[f"time/{phase}_teraflops"] = rate / 1e12
      if peak:
        result[f"time/{phase}_utilisation"] = rate / (peak * jax.device_count())
    return result
