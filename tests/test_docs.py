"""What the pages say is what the code does: the table of methods, names, links, and snippets that run."""

import ast
import contextlib
import io
import pathlib
import re
import sys

import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.config import bridge, names, presets, rules

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
sys.path.append(str(DOCS))
import make_methods_table  # noqa: E402

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
  return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def test_table_of_methods_is_that_of_the_recipes():
  page = make_methods_table.PAGE.read_text()
  assert make_methods_table.written(page) == page, "run: python docs/make_methods_table.py"


@pytest.mark.parametrize(
  "name, evaluations, images, update",
  [
    ("flow_grpo", "10", "1", "9"),
    ("tp_grpo", "55", "10", "9"),
    ("tp_grpo_fast", "19", "10", "9"),
    ("vgpo", "10", "6", "5"),
    ("tempflow", "45.42", "9.04", "0.38"),  # 45 + 10 / 24, 9 + 1 / 24, 9 / 24
    # 10 / 24 + 9 + 8 + 7 + 6 + 5 + 5 + 4 + 4 + 3 + 3 = 54.42, and 9 idle slots: 7 lanes of 9.
    ("g2rpo", "63.42", "10.04", "0.21"),
    ("gcpo", "10", "1", "9 + 9"),
    ("diffusion_nft", "10", "1", "9 + 18"),
  ],
)
def test_prices_are_those_worked_out_by_hand(name, evaluations, images, update):
  cells = dict(zip(make_methods_table.HEADER, make_methods_table.row(name)))
  assert (cells["evaluations"], cells["images"], cells["update"]) == (evaluations, images, update)


def test_page_of_the_methods_names_every_choice():
  page = make_methods_table.PAGE.read_text()
  tables = (
    names.DYNAMICS, names.SOLVERS, names.ROLLOUTS, names.CREDIT_METHODS, names.NORMALIZATIONS,
    names.RATIOS, names.TRUST_REGIONS, names.STEP_WEIGHTS, names.OBJECTIVES, names.LEVEL_DRAWS,
    credit.CREDIT,
  )  # fmt: skip
  for name in {name for table in tables for name in table}:
    assert re.search(rf"[`=]{name}`", page), name
  groups = (config_lib.Sampler, config_lib.Completion, config_lib.Advantage, config_lib.Loss)
  not_of_methods = {"sampler.shift", "sampler.height", "sampler.width", "sampler.latents"}
  known = {f"{g.__name__.lower()}.{f}" for g in groups for f in g.__dataclass_fields__}
  for name in known - not_of_methods:
    assert name in page, name


@every_page
def test_fields_that_a_page_names_exist(page):
  groups = config_lib.Config.__dataclass_fields__
  text = page.read_text()
  named = re.findall(r"--config\.([a-z_.0-9]+)", text)
  named += [
    name for name in re.findall(r"`([a-z]+\.[a-z_0-9]+)\b[^`(]*`", text)
    if name.partition(".")[0] in groups and not name.endswith((".py", ".json"))
  ]  # fmt: skip
  own = {"train.txt", "train.jsonl", "rewards.jpeg", "config.json"}
  for name in set(named) - own:
    if not name.startswith(("rewards.", "config.")):
      bridge.check_key(config_lib.Config, name)


@every_page
def test_recipes_and_run_folders_that_a_page_names_exist(page):
  text = page.read_text()
  for task, method in re.findall(r"configs/([a-z0-9_]+)\.py(?::([a-z0-9_]+))?", text):
    assert (ROOT / "configs" / f"{task}.py").is_file(), task
    if method:
      rules.validate(presets.recipe(task, method))
  pairs = [(t, m) for t in presets.TASKS for m in presets.METHODS]
  folders = {bridge.name_run(presets.recipe(*pair)).run.dir for pair in pairs}
  for name in re.findall(r"runs/((?:tiny|sd35m|flux)[a-z0-9_]+)", text):
    assert f"runs/{name}" in folders | {"runs/tiny_text_pretrain"}, name


@every_page
def test_links_within_the_repository_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
    if "://" not in target:
      assert (page.parent / target).exists(), target


@every_page
def test_python_of_a_page_is_python(page):
  for block in blocks(page, "python"):
    ast.parse(block)


@pytest.mark.parametrize("name", ["README.md", "docs/how_it_works.md"])
def test_snippets_of_a_page_run_and_print_what_it_says(name):
  page, scope = ROOT / name, {}
  for block in blocks(page, "python"):
    if "images.mean" in block:
      continue  # a reward, whose images come from a run
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(block, scope)
    # What stands behind a print's "# " or below it: shapes, compared letter by letter.
    for shapes in re.findall(r"^# (\(\d.*\))$", block, re.M):
      assert shapes in printed.getvalue()


def test_functions_of_bring_your_own_are_accepted(tmp_path, monkeypatch):
  import jax.numpy as jnp

  from tpgrpo_jax.training import losses, method

  files = dict(re.findall(r"`(my_\w+\.py)`:?\n*[^`]*?```python\n(.*?)```", page_text(), re.S))
  assert {"my_credit.py", "my_loss.py"} <= files.keys()
  for name in ("my_credit.py", "my_loss.py"):
    (tmp_path / name).write_text(files[name])
  monkeypatch.syspath_prepend(tmp_path)
  asked = {
    "credit.method": "my_credit:forward_sum",
    "loss.ratio": "my_loss:ratio",
    "loss.trust_region": "my_loss:trust_region",
  }
  config = presets.apply(presets.recipe("tiny_text", "tp_grpo"), asked)
  rules.validate(config)
  losses.make_policy_loss(config, method=None)
  bound = method.bind_credit(config)
  assert bound.function(jnp.zeros((4, 128))).reward.shape == (3, 128)


def page_text():
  return (DOCS / "bring_your_own.md").read_text()
