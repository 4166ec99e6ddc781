"""How much memory the devices have needed, where they say it (GPUs and TPUs do, CPUs do not)."""

from collections.abc import Sequence
from typing import Any

import jax

from tpgrpo_jax.cost.hardware import GIB


def peak_row(phase: str, devices: Sequence[Any] | None = None) -> dict[str, float]:
  """memory/<phase>_peak_gib and memory/limit_gib, of the fullest device of this process; {} if unknown.

  The peak is that of the process so far: nothing takes it back. So it is a phase's own where it is larger
  than that of the phase before.

  Args:
    phase: which has just ended.
    devices: to be asked; by default those of this process.
  """
  told = [device.memory_stats() for device in devices or jax.local_devices()]
  known = [stats for stats in told if stats and "peak_bytes_in_use" in stats]
  if not known:
    return {}
  fullest = max(known, key=lambda stats: stats["peak_bytes_in_use"])
  row = {f"memory/{phase}_peak_gib": fullest["peak_bytes_in_use"] / GIB}
  if limit := fullest.get("bytes_limit"):
    row["memory/limit_gib"] = limit / GIB
  return row
