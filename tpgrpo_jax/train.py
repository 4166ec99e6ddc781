"""Trains: python -m tpgrpo_jax.train --config configs/tiny_text.py [--config.train.epochs=2]"""

import sys

from absl import flags
from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import rules

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe file.", lock_config=True)
_CHECK = flags.DEFINE_bool(
  "check",
  False,
  "Open every file and reward, score one picture, say what the run would take, and start nothing.",
)


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  command.refuse_arguments(argv)
  config = config_lib.name_run(config_lib.from_config_dict(config_lib.Config, _CONFIG.value))
  rules.validate(config)
  from tpgrpo_jax.runs import distributed, preemption, processes
  from tpgrpo_jax.training import announcement, progress

  distributed.set_up(config)
  if not _CHECK.value:  # which says it itself
    progress.say(announcement.start(config))
  from tpgrpo_jax.training import loop

  if _CHECK.value:
    from tpgrpo_jax.forecasting import checking

    for line in checking.check(config):
      if processes.is_first():
        print(line, flush=True)
    return
  try:
    loop.train(config, announced=True)
  except preemption.Preempted as ended:
    saved = f"saved up to epoch {ended.epoch}. The same command goes on."
    if not ended.epoch:
      saved = "no epoch has finished, so nothing is saved. The same command begins anew."
    print(f"{config.run.dir}: ends, as asked; {saved}", file=sys.stderr)
    preemption.leave(ended.signal)


if __name__ == "__main__":
  command.run(main)
