"""Pretrains the built-in model: python -m tpgrpo_jax.pretrain --config configs/tiny_text_pretrain.py"""

from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import rules

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file.", lock_config=True)


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  command.refuse_arguments(argv)
  config = config_lib.from_config_dict(config_lib.PretrainConfig, _CONFIG.value)
  rules.validate_pretrain(config)
  command.open_output("--config.output", config.output, only=("config.json", "*.safetensors"))
  from tpgrpo_jax.training import pretraining  # after validation: a bad config fails at once

  print(f"model written to {pretraining.pretrain(config)}")


if __name__ == "__main__":
  command.run(main, recipe=config_lib.PretrainConfig)
