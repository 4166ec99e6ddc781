"""Scores a run or a base model: python -m tpgrpo_jax.evaluate --run RUN_DIR [--rewards ocr]

The base model of a recipe: --config configs/tiny_text.py [--config.model.path=...]. With --run too,
fields that do not change the weights may be set: --config.prompts.path=FOLDER.
"""

import dataclasses

from absl import app, flags
from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax.config import rules

_RUN = flags.DEFINE_string("run", None, "Run folder.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe: its base model.", lock_config=True
)
_WEIGHTS, _STRENGTH = command.define_weights()
_EPOCH = command.define_epoch()
_COMPARE = flags.DEFINE_string(
  "compare",
  None,
  'Also "base" or another run folder, from the same noise: the gain, prompt by prompt.',
)
_REWARDS = flags.DEFINE_list(
  "rewards", None, 'Names, or your own "package.module:make"; by default those of the config.'
)
_SPLIT = flags.DEFINE_enum(
  "split",
  "test",
  ["test", "judge", "train"],
  "Which prompts: held-out ones that training evaluates, further held-out ones that judge it, or its own.",
)
_PROMPTS = flags.DEFINE_integer(
  "prompts", None, "How many; by default eval.prompts.", lower_bound=1
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Solver steps; by default eval.num_steps.")
_SAMPLER = flags.DEFINE_enum(
  "sampler", "ode", ["ode", "stochastic"], "Or with the noise of sampler.dynamics."
)
_SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Of the noise; by default the one that training uses.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
_OUTPUT = flags.DEFINE_string("output", "evaluation", "Folder for evaluation.json and grid.png.")
_OVERWRITE = command.define_overwrite("an earlier evaluation")


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}. Did you mean --run {argv[1]}?")
  from tpgrpo_jax.training import restore

  config = restore.choose_config(_RUN.value, _CONFIG.value)
  rewards = tuple(_REWARDS.value or config.eval.rewards or config.rewards)
  asked = {"rewards": rewards}
  asked |= {} if _NUM_STEPS.value is None else {"num_steps": _NUM_STEPS.value}
  config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **asked))
  rules.validate(config)
  command.open_output(
    "--output", _OUTPUT.value, new=None if _OVERWRITE.value else "evaluation.json"
  )
  from tpgrpo_jax.runs import distributed, processes
  from tpgrpo_jax.training import comparing, evaluation, scoring
  from tpgrpo_jax.training import session as session_lib

  compared = _COMPARE.value or ""
  other_config = comparing.choose_other(config, compared) if compared else None
  distributed.set_up(config)
  reward_fn = session_lib.build_eval_rewards(config, restore.mesh_here(config))
  prompts = scoring.load_split(config, _SPLIT.value, count=_PROMPTS.value)
  reward_fn.check(prompts)  # pyright: ignore[reportFunctionMemberAccess]
  seed = _SEED.value
  if seed is None:
    seed = scoring.noise_seed(config, _SPLIT.value, prompts)
  num_steps, kind = config.eval.num_steps, _SAMPLER.value

  def score(opened):
    evaluation.check_model(reward_fn, opened.model, prompts[0])
    watched = evaluation.Watched(reward_fn)
    images = scoring.sample_images(
      opened, prompts, num_steps=num_steps, seed=seed, kind=kind, look=watched.look
    )
    looked = watched.scores(len(images))
    shown = opened.model.pipeline.show(prompts)
    return opened.name, images, scoring.evaluate_images(images, shown, reward_fn, looked)

  name, images, found = score(
    restore.open_model(
      config,
      _RUN.value,
      prompts=prompts,
      weights=_WEIGHTS.value,
      strength=_STRENGTH.value,
      epoch=_EPOCH.value,
    )
  )
  setting = {"model": name, "split": _SPLIT.value, "prompts": len(prompts), "seed": seed}
  setting |= {"sampler": kind, "num_steps": num_steps}
  setting["guidance_scale"] = config.sampler.guidance_scale
  result, lines = setting | found, []
  if other_config:
    other_name, _, other = score(
      comparing.open_other(other_config, compared, prompts, _WEIGHTS.value)
    )
    gains = comparing.gains(found, other)
    result["compared"] = {
      "model": other_name,
      "rewards": other["rewards"],
      "gain": {label: gain._asdict() for label, gain in gains.items()},
    }
    lines = [comparing.render(other_name, other, gains)]
  if not processes.is_first():
    return
  print(", ".join(f"{k} {v}" for k, v in setting.items()))
  print(scoring.render_table(result), *lines, sep="\n")
  print(f"written to {scoring.save_evaluation(result, images, _OUTPUT.value)}")


if __name__ == "__main__":
  command.run(main)
