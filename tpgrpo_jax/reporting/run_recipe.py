"""A run's own config as a recipe, so that --run takes --config.x=y too: run_recipe.py:RUN_DIR."""

import dataclasses
from typing import Any

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.reporting import history


def get_config(run_dir: str) -> Any:
  """The ConfigDict of a run folder; raises ValueError as `history.load_run_config`.

  How processes meet is a matter of the command that starts them, not of the run.
  """
  config = history.load_run_config(run_dir)
  return config_lib.to_config_dict(
    dataclasses.replace(config, distributed=config_lib.Distributed())
  )
