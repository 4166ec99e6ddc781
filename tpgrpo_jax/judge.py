"""Tries a judge on one picture: python -m tpgrpo_jax.judge --options JSON --picture FILE --prompt TEXT

Shows what it is asked, what it answers, and the score that is read; nothing is trained.
"""

import json

from absl import flags

from tpgrpo_jax import command

_OPTIONS = flags.DEFINE_string(
  "options",
  "",
  """JSON, those of the reward: '{"url": ..., "model": ..., "template": "yes_no"}'.""",
)
_PICTURE = flags.DEFINE_string("picture", "", "PNG or JPEG.")
_PROMPT = flags.DEFINE_string("prompt", "", "What the picture should show.")
_DRY_RUN = flags.DEFINE_bool("dry-run", True, "One picture, and nothing is trained; always so.")
_METADATA = flags.DEFINE_string("metadata", "{}", "JSON, for templates with {metadata}.")


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  command.refuse_arguments(argv)
  if not _DRY_RUN.value:
    raise ValueError("--dry-run=false: this command does nothing else. Leave it out.")
  from tpgrpo_jax import rewards
  from tpgrpo_jax.serving import dry_run

  options = dry_run.read_object("--options", _OPTIONS.value)
  metadata = dry_run.read_object("--metadata", _METADATA.value)
  picture = dry_run.read_picture(_PICTURE.value)
  if not _PROMPT.value:
    raise ValueError("--prompt: is empty. Say what the picture should show.")
  judge = dry_run.open_judge(options, rewards.HOST_REWARDS["judge"])
  verdict = judge(picture, _PROMPT.value, metadata)
  print(f"asked:\n{verdict.question}\n\nanswered:\n{verdict.answer}\n\nscore: {verdict.score:g}")
  if verdict.axes:
    print(json.dumps(verdict.axes))


if __name__ == "__main__":
  command.run(main)
