"""What a config says of a reward: its weight, its name, and its options."""

from collections.abc import Mapping
import math
import numbers
from typing import Any

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)  # a weight beyond makes every total infinite


def parse(label: str, spec: Any) -> tuple[float, str, dict[str, Any]]:
  """(weight, name, options) of one entry."""
  field, name, options = f"rewards.{label}", label, {}
  weight = spec
  if isinstance(spec, Mapping):
    options = dict(spec)
    name = options.pop("make", label)
    if "weight" not in options:
      raise ValueError(f"{field}={spec!r}: has no weight. Add 'weight': 1.0.")
    weight, field = options.pop("weight"), f"{field}.weight"
  is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
  if not is_number or not math.isfinite(weight) or abs(float(weight)) > _LARGEST:
    raise ValueError(f"{field}={weight!r}: must be a finite number. Use 1.0 if it is the only one.")
  if not isinstance(name, str):
    raise ValueError(f"rewards.{label}.make={name!r}: must be a name. Without it the label is.")
  return float(weight), name, options
