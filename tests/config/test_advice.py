"""Warnings: each is given for what is probably not meant, and not for the recipes."""

import pytest

from tpgrpo_jax.config import advice, presets

LENGTH = {"train.epochs": 120, "eval.every": 10}
UNUSUAL = {
  "warmup_of_the_whole_run": ({"optimizer.warmup_updates": 240}, "has 240 updates, so that"),
  "decay_that_is_none": ({"optimizer.decay_to": "start"}, "10 to 100 is usual"),
  "patience_beyond_the_end": ({"eval.patience": 12}, "120 epochs, evaluated every 10, are over"),
  "half_of_vgpo": ({"advantage.normalization": "value"}, "were made for each other"),
}
USUAL = {
  "warmup": {"optimizer.warmup_updates": 239},
  "decay": {"optimizer.decay_to": "start", "optimizer.weight_decay": 30.0},
  "patience": {"eval.patience": 11},
}


def advised(fields):
  recipe = presets.apply(presets.recipe("tiny_text", "tp_grpo"), LENGTH)
  return [*advice.advise(presets.apply(recipe, fields))]


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_probably_not_meant_is_said(case):
  fields, part = UNUSUAL[case]
  (line,) = advised(fields)
  assert part in line


@pytest.mark.parametrize("case", USUAL)
def test_what_is_usual_passes_in_silence(case):
  assert not advised(USUAL[case])


@pytest.mark.parametrize("task", ["tiny_text", "tiny_shapes"])
def test_recipes_of_the_built_in_tasks_are_usual(task):
  for method in presets.METHODS:
    assert not [*advice.advise(presets.recipe(task, method))], method
