"""A recipe becomes frozen dataclasses and nothing else; what does not fit is refused by its full name."""

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit, models, rewards
from tpgrpo_jax.config import bridge, names, presets, rules
from tpgrpo_jax.credit import advantages
from tpgrpo_jax.data import prompts
from tpgrpo_jax.flow import completion, schedule
from tpgrpo_jax.models import mmdit
from tpgrpo_jax.objective import ratio, surrogate
from tpgrpo_jax.training import batches, losses, rollout, state
from tpgrpo_jax.training import method as method_lib

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
TASK_RECIPES = [path for path in RECIPES if "pretrain" not in path.stem]


@pytest.mark.parametrize(
  "key, parts",
  [
    ("sampler.windw", ("sampler.windw: unknown config key", "Did you mean 'window'?")),
    ("trian.epochs", ("trian: unknown config key", "Did you mean 'train'?")),
    ("seed.value", ("seed.value: unknown config key",)),
    ("rewards.orc", ("rewards.orc: labels of rewards are set together", "--config.rewards=")),
  ],
)
def test_unknown_key_of_the_command_line_is_named_with_the_nearest(key, parts):
  with pytest.raises(ValueError) as caught:
    bridge.check_key(config_lib.Config, key)
  for part in parts:
    assert part in str(caught.value)


def test_a_label_that_stands_twice_on_the_command_line_is_refused():
  for text, said in (
    ("{'ocr': 1.0, 'ocr': {'weight': 2.0}}", "rewards: has 'ocr' twice"),
    (" {'ocr': {'weight': 1.0,\n'weight': 2.0}}", "rewards: has 'weight' twice"),
  ):
    with pytest.raises(ValueError, match=said):
      bridge.check_once("rewards", text)
  for text in ("{'ocr': {'weight': 1.0}, 'b': {'weight': 1.0}}", "{", "", "1", "{**{}, 'a': 1}"):
    bridge.check_once("rewards", text)


@pytest.mark.parametrize("key", ["seed", "sampler.window", "rewards", "train.epochs"])
def test_known_key_of_the_command_line_passes(key):
  bridge.check_key(config_lib.Config, key)


def from_recipe(changes):
  """Config of a recipe that sets these dotted fields."""
  tree = config_lib.to_config_dict(config_lib.Config())
  with tree.unlocked():
    for name, value in changes.items():
      group, _, field = name.rpartition(".")
      (tree[group] if group else tree)[field] = value
  return config_lib.from_config_dict(config_lib.Config, tree)


@pytest.mark.parametrize("cls", [config_lib.Config, config_lib.PretrainConfig])
def test_defaults_survive_the_way_through_a_config_dict(cls):
  assert config_lib.from_config_dict(cls, config_lib.to_config_dict(cls())) == cls()


def test_defaults_are_valid():
  rules.validate(config_lib.Config())
  rules.validate_pretrain(config_lib.PretrainConfig())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_says_how_to_run_it(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  if "pretrain" in path.stem:
    config = config_lib.from_config_dict(config_lib.PretrainConfig, recipe.get_config())
    rules.validate_pretrain(config)
  else:
    rules.validate(config_lib.from_config_dict(config_lib.Config, recipe.get_config()))
  assert f"--config configs/{path.name}" in recipe.__doc__


def test_every_task_has_a_recipe_and_every_recipe_a_task():
  assert {path.stem for path in TASK_RECIPES} == set(presets.TASKS)


@pytest.mark.parametrize("path", TASK_RECIPES, ids=lambda path: path.stem)
def test_recipe_of_a_method_is_that_of_the_table(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  recipe = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(recipe)
  found = config_lib.from_config_dict(config_lib.Config, recipe.get_config("flow_dppo"))
  assert found == presets.recipe(path.stem, "flow_dppo")
  assert config_lib.name_run(found).run.dir == f"runs/{path.stem}_flow_dppo"
  assert recipe.get_config() == recipe.get_config("tp_grpo")


@pytest.mark.parametrize(
  "task, method, part",
  [
    ("tiny_text", "tempflw", "method='tempflw': unknown name. Did you mean 'tempflow'? Choices: "),
    ("tiny_txt", "tempflow", "task='tiny_txt': unknown name. Did you mean 'tiny_text'? Choices: "),
  ],
)
def test_unknown_task_or_method_is_refused_with_the_nearest(task, method, part):
  with pytest.raises(ValueError) as caught:
    presets.recipe(task, method)
  assert part in str(caught.value)


def test_every_method_has_a_paper_or_none_and_a_reading_has_a_method():
  methods = {*presets.METHODS, *presets.OF_LATENTS}
  assert set(presets.PAPERS) == methods
  assert set(presets.READINGS) <= methods


def test_recipe_changes_fields_of_any_depth():
  config = from_recipe({"seed": 7, "sampler.window": (1, 4), "credit.method": "increments"})
  assert (config.seed, config.sampler.window, config.credit.method) == (7, (1, 4), "increments")
  assert config.sampler.num_steps == config_lib.Sampler().num_steps


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.Config().train.epochs = 3


def test_labels_of_rewards_are_free():
  given = {"size": {"weight": 0.5, "make": "jpeg_compressibility"}, "mine:make": 1.0}
  assert from_recipe({"rewards": given}).rewards == given


def test_label_of_a_reward_may_hold_dots():
  tree = config_lib.to_config_dict(config_lib.Config())
  tree.rewards["my.own:make"] = 2.0  # as a whole dict, ml_collections would refuse the dot
  config = config_lib.from_config_dict(config_lib.Config, tree)
  assert config.rewards == {"ocr": 1.0, "my.own:make": 2.0}


def test_whole_number_serves_as_a_float():
  value = from_recipe({"sampler.guidance_scale": 3}).sampler.guidance_scale
  assert (value, type(value)) == (3.0, float)


def test_list_serves_as_a_tuple():
  assert from_recipe({"eval.rewards": ["ocr"]}).eval.rewards == ("ocr",)


@pytest.mark.parametrize(
  "field, nearest",
  [
    ("train.group_sise", "'group_size'"),
    ("sampler.num_step", "'num_steps'"),
    ("optimiser", "'optimizer'"),
    ("lora.ranks", "'rank'"),
  ],
)
def test_unknown_key_is_refused_with_the_nearest_one(field, nearest):
  with pytest.raises(ValueError) as caught:
    from_recipe({field: 1})
  assert f"{field}: unknown config key. Did you mean {nearest}?" in str(caught.value)


@pytest.mark.parametrize(
  "field, value, rule",
  [
    ("train.epochs", 1.5, "must be int, is float"),
    ("train.epochs", True, "must be int, is bool"),
    ("sampler.same_latent", 1, "must be bool, is int"),
    ("optimizer.learning_rate", "1e-4", "must be float, is str"),
    ("model.path", None, "must be str, is NoneType"),
    ("sampler.window", 9, "must be a tuple, such as sampler.window=(0, 9)"),
    ("sampler.window", (0, 4, 9), "must have 2 elements, has 3"),
    ("sampler.window", (0, 4.5), "must be int, is float"),
    ("lora.targets", "attn.to_q", "must be a tuple"),
    ("rewards", "ocr", "must be a mapping, such as {'ocr': 1.0}"),
    ("train", 3, "must be a group of fields"),
  ],
)
def test_value_of_the_wrong_type_is_refused_with_field_value_and_rule(field, value, rule):
  tree = config_lib.to_config_dict(config_lib.Config()).to_dict()
  group, _, name = field.rpartition(".")
  (tree[group] if group else tree)[name] = value
  with pytest.raises(ValueError) as caught:
    config_lib.from_config_dict(config_lib.Config, tree)
  message = str(caught.value)
  assert field in message
  assert repr(value) in message or repr(value[1]) in message
  assert rule in message


@pytest.mark.parametrize(
  "names, table",
  [
    (names.MODEL_VARIANTS, models.MODELS),
    (names.SCHEDULES, schedule.SCHEDULES),
    (names.DYNAMICS, method_lib.DYNAMICS),
    (names.SOLVERS, completion.SOLVERS),
    (names.CREDIT_METHODS, credit.CREDIT),
    (names.CREDIT_METHODS, credit.BALANCED),
    (names.REWARD_NAMES, rewards.REWARDS),
    (names.PROMPT_SOURCES, prompts.PROMPT_SOURCES),
    (names.REMAT_POLICIES, {"none", *mmdit.REMAT_POLICIES}),
    (names.ROLLOUTS, rollout.STATES),
    (names.NORMALIZATIONS, advantages.ADVANTAGES),
    (names.OBJECTIVES, losses.OBJECTIVES),
    (names.RATIOS, ratio.RATIOS),
    (names.TRUST_REGIONS, surrogate.TRUST_REGIONS),
    (names.STEP_WEIGHTS, surrogate.STEP_WEIGHTS),
    (names.LEVEL_DRAWS, schedule.LEVEL_DRAWS),
    (names.UPDATES_BY, batches._SHARES),
    (names.LEARNING_RATE_SCHEDULES, state.SCHEDULES),
  ],
)
def test_names_that_the_config_knows_are_those_of_the_table(names, table):
  assert set(names) == set(table)


def train_command(*arguments):
  """The real command, ended by a mistake in its config before jax is imported."""
  return subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.train", *arguments],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def test_typo_on_the_command_line_is_refused_with_the_nearest_field():
  done = train_command("--config=configs/tiny_text.py", "--config.train.epoch=2")
  assert done.returncode != 0
  assert "epoch" in done.stderr
  assert "Did you mean 'epochs'?" in done.stderr


def test_unknown_method_ends_the_command_in_one_line_with_the_nearest_one():
  done = train_command("--config", "configs/tiny_text.py:tempflw", "--config.train.epochs=2")
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(
    "error: method='tempflw': unknown name. Did you mean 'tempflow'? Choices: "
  )


def test_method_for_a_recipe_that_has_none_ends_the_command_in_one_line():
  done = train_command("--config=configs/tiny_text_pretrain.py:tempflow")
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("error: --config: this recipe knows no methods.")


def test_unknown_key_in_a_recipe_ends_the_command_with_the_nearest_one(tmp_path):
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from tpgrpo_jax import config as c\n"
    "def get_config():\n"
    "  r = c.to_config_dict(c.Config())\n"
    "  r.sampler.dynamic = 'sde'\n"
    "  return r\n"
  )
  done = train_command(f"--config={recipe}")
  assert done.returncode != 0
  assert "sampler.dynamic: unknown config key. Did you mean 'dynamics'?" in done.stderr


def test_group_of_one_ends_the_command_with_its_message():
  done = train_command("--config=configs/tiny_text.py", "--config.train.group_size=1")
  assert done.returncode != 0
  assert "train.group_size=1: must be at least 2" in done.stderr
