"""What every (task, method) pair resolves to, as text that a review can read; all of them are valid."""

import pathlib
import sys
import warnings

import pytest

from tpgrpo_jax.config import presets, rules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
sys.path.append(str(GOLDEN))
import make_configs  # noqa: E402

COMMAND = "If that is meant, run: python tests/golden/make_configs.py"
MADE = make_configs.make()
PAIRS = [(task, method) for task in presets.TASKS for method in make_configs.methods_of(task)]


@pytest.mark.parametrize("name", MADE)
def test_config_is_the_stored_one(name):
  path = make_configs.FOLDER / name
  assert path.is_file(), f"{name} is missing. {COMMAND}"
  assert MADE[name] == path.read_text(), f"{name} has changed. {COMMAND}"


def test_no_file_is_left_of_a_task_or_method_that_is_gone():
  stale = {path.name for path in make_configs.FOLDER.iterdir()} - set(MADE)
  assert not stale, f"nothing resolves to {sorted(stale)}. {COMMAND}"


@pytest.mark.parametrize("task, method", PAIRS, ids=[f"{t}:{m}" for t, m in PAIRS])
def test_every_pair_is_valid_and_meant(task, method):
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # advice would say that a field is probably not meant
    rules.validate(presets.recipe(task, method))
