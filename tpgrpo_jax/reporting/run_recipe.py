"""A run's own config as a recipe, so that --run takes --config.x=y too: run_recipe.py:RUN_DIR."""

from typing import Any

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.reporting import history


def get_config(run_dir: str) -> Any:
  """The ConfigDict of a run folder; raises ValueError as `history.load_run_config`."""
  return config_lib.to_config_dict(history.load_run_config(run_dir))
