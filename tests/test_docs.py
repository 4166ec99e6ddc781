"""What the pages say is what the code does: the table of methods, names, links, and snippets that run."""

import ast
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.config import bridge, names, presets, rules

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
sys.path.append(str(DOCS))
import make_methods_table  # noqa: E402
import make_results_tables  # noqa: E402

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
  return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def test_table_of_methods_is_that_of_the_recipes():
  page = make_methods_table.PAGE.read_text()
  assert make_methods_table.written(page) == page, "run: python docs/make_methods_table.py"


def test_tables_of_results_are_those_of_the_kept_runs():
  for page in make_results_tables.PAGES:
    text = page.read_text()
    assert make_results_tables.written(text) == text, "run: python docs/make_results_tables.py"
    assert "<!-- begin " in text


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


def anchors(page):
  """Those that GitHub and the site give to the headings of a page."""
  headings = re.findall(
    r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M
  )
  plain = [re.sub(r"\]\([^)]*\)|[`*\[]", "", heading).lower() for heading in headings]
  return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in plain}


def links(page):
  if page.suffix == ".ipynb":
    cells = json.loads(page.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
  else:
    text = page.read_text()
  return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_and_anchors_within_the_repository_lead_somewhere(page):
  for target in links(page):
    file, _, anchor = target.partition("#")
    found = page.parent / file if file else page
    assert found.exists(), target
    if anchor:
      assert anchor in anchors(found), target


@every_page
def test_rows_of_tables_stand_below_a_head(page):
  lines = ["", *page.read_text().splitlines()]
  for before, line, after in zip(lines, lines[1:], [*lines[2:], ""]):
    if line.startswith("|") and not before.startswith("|"):
      assert re.match(r"\|( :?-+:? \|)+$", after), line
      assert line.count(" | ") == after.count(" | "), line


def code_of(notebook):
  """(source, what it printed) of each cell of code."""
  for cell in json.loads(notebook.read_text())["cells"]:
    if cell["cell_type"] == "code":
      printed = ["".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream"]
      yield "".join(cell["source"]), "".join(printed)


def test_notebook_of_the_reward_maths_prints_what_it_shows():
  scope = {}
  with np.printoptions():  # the notebook sets its own
    for source, shown in code_of(DOCS / "notebooks" / "reward_maths.ipynb"):
      printed = io.StringIO()
      with contextlib.redirect_stdout(printed):
        exec(source, scope)
      assert printed.getvalue() == shown, source


@pytest.mark.slow
def test_notebook_of_a_run_runs(tmp_path, monkeypatch):
  import jax

  from tpgrpo_jax.training import mesh as mesh_lib

  make_mesh = mesh_lib.make_mesh  # a user has one device; these tests have eight
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
  monkeypatch.chdir(tmp_path)
  scope, text = {}, io.StringIO()
  with contextlib.redirect_stdout(text):
    for source, _ in code_of(DOCS / "notebooks" / "a_run.ipynb"):
      exec(source, scope)
  assert "[(0, 'eval'), (1, 'train'), (2, 'train'), (2, 'eval'), (2, 'judge')]" in text.getvalue()
  assert "log-ratio of the first update: 0.0" in text.getvalue()
  assert "data:image/png" in (tmp_path / "report" / "report.html").read_text()
  assert scope["picture"].size[0] > 400


@pytest.mark.slow
def test_site_is_built_without_a_warning(tmp_path):
  needed = ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter")
  if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    pytest.skip(f"{', '.join(missing)}: pip install -e '.[docs]'")
  done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
    cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  credit_page = (tmp_path / "site" / "api" / "credit" / "index.html").read_text()
  assert "tpgrpo_jax.credit.turning_point.balance" in credit_page
  assert (tmp_path / "site" / "notebooks" / "a_run" / "index.html").is_file()


def commands(page):
  """The commands of a page's shell blocks, each a list of words; what "&&" joins is told apart."""
  found = []
  for block in blocks(page, "sh"):
    text = ""
    for line in block.splitlines():
      text += line.removesuffix("\\") + "\n"
      try:
        words = shlex.split(text, comments=True) if not line.endswith("\\") else None
      except ValueError:  # within quotes that the next line closes
        continue
      if words is None:
        continue
      text, command = "", []
      for word in [*words, "&&"]:
        if word != "&&":
          command.append(word)
        elif command:
          found.append(command)
          command = []
  return found


# Commands that no test runs from the page, and why; the words of the command begin so, or hold it.
ELSEWHERE = {
  r"^(python3 -m venv|pip install|\.venv/bin/pip|\. \.venv)": "installs; .ci/run does it",
  r"^\.venv/bin/python -m pytest": "these tests",
  r"^(hf|git|curl|docker|kubectl|xpk) ": "the network",
  r"^(mkdir|cp) .*datasets": "what the line before it fetched",
  r"^(sbatch|export NAME|launch/tpu_pod\.sh) ?": "a cluster; tests/test_launch.py with stand-ins",
  r"launch/local\.sh": "tests/test_launch.py",
  r"sd35m|flux|geneval": "an accelerator, or weights of gigabytes",
  r"--topology": "minutes of compilation; tests/forecasting",
  r"^python benchmarks/": "hours; tests/test_benchmarks.py with small sizes",
  r"runs/first_half": "half an hour; tests/test_export.py goes on from what a run wrote",
  r"tpgrpo_jax\.serve|tpgrpo_jax\.judge|XLA_PYTHON_CLIENT|'make': 'remote'": "a server; tests/serving",
}


def runs_here(command):
  text = " ".join(command)
  return not any(re.search(pattern, text) for pattern in ELSEWHERE)


def test_every_command_is_run_or_has_a_reason():
  texts = [" ".join(command) for page in PAGES for command in commands(page)]
  for pattern in ELSEWHERE:
    assert any(re.search(pattern, text) for text in texts), f"{pattern}: no page has it any more"
  here = {page.name for page in PAGES if any(runs_here(c) for c in commands(page))}
  assert here == {"README.md", "bring_your_own.md", "methods.md"}


@every_page
def test_flags_that_a_page_names_exist(page):
  shared = (ROOT / "tpgrpo_jax" / "command.py").read_text()
  for command in commands(page):
    names = [word.partition("tpgrpo_jax.")[2] for word in command if word.startswith("tpgrpo_jax.")]
    names += command[1:2] if command[0] == "tpgrpo" else []
    if not names:
      continue
    source = shared + (ROOT / "tpgrpo_jax" / f"{names[0]}.py").read_text()
    known = {*re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source), "verbosity"}
    for word in command:
      if asked := re.match(r"--(?:no)?(\w+)", word):
        assert asked[1] in known or word[2:].partition("=")[0] in known or asked[1] == "config", (
          word
        )


def run_of(command):
  """(name of the package's command, its arguments) of a page's command; None of any other."""
  words = [*command]
  while "=" in words[0]:  # PYTHONPATH=. and the like
    words.pop(0)
  if words[0] == "tpgrpo":
    return words[1], words[2:]
  modules = [i for i, word in enumerate(words) if word.startswith("tpgrpo_jax.")]
  return (words[modules[0]].partition(".")[2], words[modules[0] + 1 :]) if modules else None


# Parses commands and looks at what they ask for, each in a process of its own: flags are a process's.
PARSER = """
import importlib, json, os, sys
from absl import flags
from ml_collections import config_flags
from tpgrpo_jax import command
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import rules


def parse(name, arguments):
  sys.argv = [name, *arguments]  # config_flags reads it
  module = importlib.import_module(f"tpgrpo_jax.{name}")

  def look(argv):
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
      config = config_lib.from_config_dict(config_lib.Config, flags.FLAGS.config)
      rules.validate(config_lib.name_run(config))
    if name == "serve":
      from tpgrpo_jax.serving import build

      build.read_specs(module._REWARDS.value, module._OPTIONS.value)
    if name in ("train", "export"):
      command.refuse_arguments(argv)

  command.run(look)


failed = []
for name, arguments in json.load(sys.stdin):
  sys.stderr.flush()
  if not (child := os.fork()):
    try:
      parse(name, arguments)
    except SystemExit as ended:  # an error's message is on stderr
      os._exit(1 if ended.code else 0)
  if os.waitpid(child, 0)[1]:
    failed.append(" ".join([name, *arguments]))
sys.exit("\\n".join(failed) if failed else 0)
"""


def parsed(asked, work):
  """The finished process that has parsed [(name, arguments)] in a folder."""
  return subprocess.run(
    [sys.executable, "-c", PARSER], input=json.dumps(asked), cwd=work, capture_output=True, text=True,
    env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{work}", "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def test_every_command_of_every_page_is_parsed_and_its_config_is_one_that_can_run(work):
  """Those that need an accelerator, weights or a server too; tests below run what can run here."""
  own_files(work)
  asked = [found for page in PAGES for c in commands(page) if (found := run_of(c))]
  assert len(asked) > 30
  done = parsed(asked, work)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "arguments",
  [["--config=tiny_text", "--config.sampler.window=(0, 99)"], ["--config=tiny_text", "--chek"]],
)
def test_a_command_that_could_not_run_would_be_found(work, arguments):
  assert parsed([("train", arguments)], work).returncode == 1


# What makes an epoch of the built-in task a matter of seconds.
SMALL = {
  "train": {
    "train.epochs": 1, "train.prompts_per_epoch": 2, "train.microbatch": 16, "eval.prompts": 4,
    "eval.judge_prompts": 4, "log.images_every": 1, "log.tensorboard": False,
  },
  "evaluate": ["--prompts=4"],
}  # fmt: skip


def run_here(command, work, *more):
  """Runs a command of a page in a folder, as small as it gets."""
  name, arguments = run_of(command)
  small = SMALL.get(name, [])
  if isinstance(small, dict):
    small = [f"--config.{field}={value}" for field, value in small.items()]
  done = subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax", name, *arguments, *small, *more],
    cwd=work,
    env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{work}", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=3600,
  )
  assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
  return done.stdout


@pytest.fixture
def work(tmp_path):
  """A folder that looks like a clone."""
  for name in ("configs", "tpgrpo_jax"):
    (tmp_path / name).symlink_to(ROOT / name)
  return tmp_path


def own_files(work):
  """Writes what a reader of docs/bring_your_own.md has written: prompts and the page's snippets."""
  (work / "my_prompts").mkdir()
  for name in ("train", "test"):
    (work / "my_prompts" / f"{name}.txt").write_text(
      "".join(f"{name[:2]}{i}\n".upper() for i in range(9))
    )
  for block in blocks(DOCS / "bring_your_own.md", "python"):
    for mark, name in (
      ("def make(", "my_rewards"), ("config.rewards = {", "my_recipe"), ("def forward_sum", "my_credit"),
      ("def trust_region", "my_loss"),
    ):  # fmt: skip
      if mark in block:
        (work / f"{name}.py").write_text(block)


@pytest.mark.slow
def test_commands_of_the_readme_run(work):
  for command in filter(runs_here, commands(ROOT / "README.md")):
    run_here(command, work)
  assert (work / "report" / "report.html").is_file()
  assert {"0000_K7T.png", "0001_A4E.png", "0002_CLAY.png"} <= {
    p.name for p in (work / "samples").iterdir()
  }


@pytest.mark.exhaustive
def test_commands_of_the_methods_run(work):
  for number, command in enumerate(filter(runs_here, commands(DOCS / "methods.md"))):
    run_here(command, work, f"--config.run.dir=runs/{number}")


@pytest.mark.slow
def test_training_commands_of_bring_your_own_pass_their_check(work):
  own_files(work)
  for command in filter(runs_here, commands(DOCS / "bring_your_own.md")):
    if run_of(command)[0] == "train" and "--config.lora.path=lora" not in command:
      assert "nothing was started" in run_here(command, work, "--check")


@pytest.mark.exhaustive
def test_commands_of_bring_your_own_run(work):
  own_files(work)
  for command in filter(runs_here, commands(DOCS / "bring_your_own.md")):
    adapters = "my_recipe.py" in command and "--config.lora.path=lora" not in command
    run_here(command, work, *["--config.lora.rank=32"] * adapters)
  assert (work / "lora" / "pytorch_lora_weights.safetensors").is_file()


@every_page
def test_python_of_a_page_is_python(page):
  for block in blocks(page, "python"):
    ast.parse(block)


@pytest.mark.parametrize("name", ["README.md", "docs/how_it_works.md", "docs/api/rewards.md"])
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
