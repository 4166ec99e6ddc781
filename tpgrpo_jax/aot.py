"""What a run would take: python -m tpgrpo_jax.aot --config configs/sd35m_ocr.py --topology v5e:4x4"""

import json
from typing import Any

from absl import flags
from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import rules

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  "local",
  "A TPU slice in chips (v5e:4x4), GPUs (h100:8, with --nocompile), cpu:N, or local: the devices at hand.",
)
_SLICES = flags.DEFINE_integer("slices", 1, "How many such TPU slices.", lower_bound=1)
_MARGIN = flags.DEFINE_float(
  "margin", 0.1, "Share of a device's memory that must stay free.", lower_bound=0, upper_bound=0.9
)
_CHOOSE = flags.DEFINE_bool("choose", True, "Choose mesh and microbatch too, and compile them.")
_COMPILE = flags.DEFINE_bool(
  "compile", True, "--nocompile counts what shapes alone tell, in seconds."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON line last.")


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  command.refuse_arguments(argv)
  config = config_lib.from_config_dict(config_lib.Config, _CONFIG.value)
  rules.validate(config)
  from tpgrpo_jax.cost import hardware
  from tpgrpo_jax.forecasting import choice, forecast

  topology = _TOPOLOGY.value
  devices = hardware.open_topology(topology, _SLICES.value)
  if topology.partition(":")[0] in hardware.GPUS and _COMPILE.value:
    raise ValueError(
      f"--topology={topology!r}: programs for a GPU are compiled where it is. Add --nocompile, or on that "
      "machine take --topology=local."
    )
  chip = hardware.find_chip(devices[0], topology)
  options: dict[str, Any] = dict(chip=chip, margin=_MARGIN.value, compiles=_COMPILE.value)
  name = devices[0].device_kind if topology == "local" else topology
  print(f"{name}: {len(devices)} devices", flush=True)
  given = forecast.forecast(config, devices, **options)
  print(forecast.render(given), flush=True)
  chosen = None
  if _CHOOSE.value and _COMPILE.value:
    chosen = choice.confirm(config, devices, given, **options)
    print(choice.render_choice(given, chosen))
  if _JSON.value:
    row = {"topology": topology, "slices": _SLICES.value, "devices": len(devices)}
    row |= {"given": forecast.to_json(given), "chosen": chosen and forecast.to_json(chosen)}
    print(json.dumps(row))


if __name__ == "__main__":
  command.run(main)
