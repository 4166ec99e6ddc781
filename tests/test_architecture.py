"""Who may import whom, read from the source: only downward."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from tpgrpo_jax.config import names, presets

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tpgrpo_jax"
RANKS = {
    "types": 0, "version": 0, "registry": 0, "caches": 0, "config": 0, "cost": 0,
    "flow": 1, "credit": 1, "objective": 1,
    "models": 2, "data": 2, "runs": 2,
    "rewards": 3, "reporting": 3,
    "training": 4, "serving": 4,
    "forecasting": 5, "command": 5,
    "train": 6, "evaluate": 6, "sample": 6, "pretrain": 6, "export": 6, "aot": 6, "report": 6,
    "serve": 6, "judge": 6, "__main__": 6,
}  # fmt: skip
CONFIG_READERS = {"config", "runs", "reporting", "training", "forecasting"}
HEAVY = (
    "transformers", "tensorflow_datasets", "tensorflow", "torch", "diffusers", "rapidocr",
    "onnxruntime", "rapidfuzz", "skimage", "requests", "wandb", "peft",
    "httpx2", "httpcore2", "uvicorn", "starlette", "python_multipart", "prometheus_client",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize(
  "file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES]
)


def room(file):
  """The package or module right below tpgrpo_jax; '' for its __init__."""
  first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
  return "" if first == "__init__" else first


def imports(nodes):
  """Dotted names that import statements mention: `from a.b import c` gives a.b.c."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: imports are absolute"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(file):
  """Rooms that a file imports anywhere, inside functions too."""
  names = imports(ast.walk(ast.parse(file.read_text())))
  return {name.split(".")[1] for name in names if name.startswith("tpgrpo_jax.")}


def runs_at_import(nodes):
  """Statements outside functions, those in classes, if and try included."""
  for node in nodes:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield from runs_at_import(ast.iter_child_nodes(node))


@every_file
def test_every_module_has_a_rank(file):
  assert room(file) in {"", *RANKS}, "new rooms get their rank in RANKS first"


@every_file
def test_imports_go_downward_only(file):
  own = room(file)
  for other in imported_rooms(file) - {own}:
    same_ground = RANKS[own] == RANKS[other] == 0  # types, registry and those that use them
    assert same_ground or RANKS[other] < RANKS[own], f"{own} must not import {other}"


@every_file
def test_the_maths_the_models_and_the_rewards_do_not_know_the_config(file):
  if "config" in imported_rooms(file):
    assert room(file) in CONFIG_READERS or RANKS[room(file)] >= 5


@every_file
def test_heavy_packages_are_imported_where_they_are_used(file):
  names = imports(runs_at_import(ast.parse(file.read_text()).body))
  assert not {name.split(".")[0] for name in names} & set(HEAVY)


@every_file
def test_files_are_at_most_400_lines(file):
  assert len(file.read_text().splitlines()) <= 400


def functions(file):
  """The functions of a file, those within classes and functions too."""
  nodes = ast.walk(ast.parse(file.read_text()))
  return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of_code(function, source):
  """Lines of a function's body without its docstring, comments and blank lines."""
  body = (
    function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
  )
  if not body:
    return 0
  lines = source[body[0].lineno - 1 : function.end_lineno]
  return sum(1 for line in map(str.strip, lines) if line and not line.startswith("#"))


def test_lines_of_code_leave_out_docstrings_comments_and_blank_lines():
  source = [
    "def f():",
    '  """Text.',
    "",
    "  More.",
    '  """',
    "  # why",
    "  a = (",
    "    1)",
    "",
    "  return a",
  ]
  (function,) = ast.parse("\n".join(source)).body
  assert lines_of_code(function, source) == 3


@pytest.mark.parametrize("name", ["flow", "credit", "objective"])
def test_functions_of_the_method_have_at_most_40_lines_of_code(name):
  for file in (PACKAGE / name).rglob("*.py"):
    source = file.read_text().splitlines()
    long = {f.name: lines_of_code(f, source) for f in functions(file)}
    assert not {name: count for name, count in long.items() if count > 40}, file


def compared_names(tree, names):
  """(line, name) of every comparison with one of the names, alone or in a tuple, list or set."""
  for node in ast.walk(tree):
    if isinstance(node, ast.match_case):
      sides = list(ast.walk(node.pattern))
    elif isinstance(node, ast.Compare):
      sides = [node.left, *node.comparators]
      if "rollout" in {side.attr for side in sides if isinstance(side, ast.Attribute)}:
        continue  # "branch" is a way that states come about, and a credit method besides
    else:
      continue
    parts = [part for side in sides for part in (side, *getattr(side, "elts", []))]
    for part in parts:
      part = part.value if isinstance(part, ast.MatchValue) else part
      if isinstance(part, ast.Constant) and part.value in names:
        yield part.lineno, part.value


@pytest.mark.parametrize(
  "code, found",
  [
    ('method == "tp_grpo"', True),
    ('"tp_grpo" != config.credit.method', True),
    ('method in ("coca", "tp_grpo")', True),
    ('match method:\n  case "tp_grpo": pass', True),
    ('table["tp_grpo"]', False),
    ('sampler.rollout == "branch"', False),
    ('credit.method == "branch"', True),
  ],
)
def test_a_comparison_with_a_name_is_seen(code, found):
  assert bool([*compared_names(ast.parse(code), {"tp_grpo", "branch"})]) == found


def test_no_code_asks_for_a_method_by_name():
  """A method is a composition: its row of METHODS sets fields, and functions are looked up in tables."""
  methods = {*presets.METHODS, *names.CREDIT_METHODS}
  for file in FILES:
    if room(file) != "config":  # whose rules say which choices go together
      found = [*compared_names(ast.parse(file.read_text()), methods)]
      assert not found, f"{file.relative_to(PACKAGE)}: {found}"


def test_recipes_import_only_the_config():
  for file in (ROOT / "configs").glob("*.py"):
    names = set(imports(ast.walk(ast.parse(file.read_text()))))
    assert names <= {"tpgrpo_jax.config", "tpgrpo_jax.config.presets"}, file.name


def test_config_and_its_rules_load_without_jax():
  assert "jax" not in loaded_by("tpgrpo_jax.config, tpgrpo_jax.config.rules")["modules"]


def test_credit_loads_without_flax_transformers_datasets_or_torch():
  modules = loaded_by("tpgrpo_jax.credit")["modules"]
  assert not {"flax", "transformers", "tensorflow_datasets", "tensorflow", "torch"} & set(modules)


def test_credit_loads_in_a_few_seconds():
  # CPU time, not the clock: other tests may be running. jax itself takes about one second.
  assert loaded_by("tpgrpo_jax.credit")["seconds"] < 5


def loaded_by(modules):
  """Top-level modules and CPU seconds of a fresh interpreter that imports them."""
  script = (
    f"import json, sys, time; import {modules}; names = {{m.split('.')[0] for m in sys.modules}};"
    "print(json.dumps({'modules': sorted(names), 'seconds': time.process_time()}))"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)
