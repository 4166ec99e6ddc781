"""Paints prompts: python -m tpgrpo_jax.sample --run RUN_DIR --output samples CAT "A4T" [--samples 4]

The base model of a recipe: --config configs/tiny_text.py instead of --run.
"""

import dataclasses

from absl import flags
from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax.config import rules

_RUN = flags.DEFINE_string("run", None, "Run folder.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe: its base model.", lock_config=True
)
_WEIGHTS, _STRENGTH = command.define_weights()
_EPOCH = command.define_epoch()
_FILE = flags.DEFINE_string("prompts_file", None, "Text file, one prompt a line, beside arguments.")
_IMAGE = flags.DEFINE_string(
  "image", None, "Picture that all prompts edit, for a model that edits (FLUX.1-Kontext)."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Images of each prompt.", lower_bound=1)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Solver steps; by default eval.num_steps.")
_GUIDANCE = flags.DEFINE_float(
  "guidance_scale", None, "By default that of the config.", lower_bound=0.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**32 - 1)
_OUTPUT = flags.DEFINE_string("output", "samples", "Folder for one PNG each, and grid.png.")
_OVERWRITE = command.define_overwrite("the pictures of an earlier command")


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  from tpgrpo_jax.training import restore

  config = restore.choose_config(_RUN.value, _CONFIG.value)
  if _NUM_STEPS.value is not None:
    settings = dataclasses.replace(config.eval, num_steps=_NUM_STEPS.value)
    config = dataclasses.replace(config, eval=settings)
  if _GUIDANCE.value is not None:
    settings = dataclasses.replace(config.sampler, guidance_scale=_GUIDANCE.value)
    config = dataclasses.replace(config, sampler=settings)
  rules.validate(config)
  from tpgrpo_jax.runs import distributed, processes
  from tpgrpo_jax.training import scoring

  command.open_output("--output", _OUTPUT.value, new=None if _OVERWRITE.value else "grid.png")
  texts = argv[1:] + (scoring.load_prompt_lines(_FILE.value) if _FILE.value else [])
  if not texts:
    raise ValueError("no prompts: give them as arguments, or one a line in --prompts_file.")
  texts = [text for text in texts for _ in range(_SAMPLES.value)]
  prompts = scoring.make_prompts(config, texts, _IMAGE.value)
  distributed.set_up(config)
  opened = restore.open_model(
    config,
    _RUN.value,
    prompts=prompts,
    weights=_WEIGHTS.value,
    strength=_STRENGTH.value,
    epoch=_EPOCH.value,
  )
  images = scoring.sample_images(opened, prompts, num_steps=config.eval.num_steps, seed=_SEED.value)
  if not processes.is_first():
    return
  paths = scoring.save_samples(images, texts, _OUTPUT.value, samples=_SAMPLES.value)
  print(f"{len(paths)} images of {opened.name} in {_OUTPUT.value}")


if __name__ == "__main__":
  command.run(main)
