"""Who may import whom, read from the source: only downward."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tpgrpo_jax"
RANKS = {
    "types": 0, "registry": 0, "config": 0, "cost": 0,
    "flow": 1, "credit": 1, "objective": 1,
    "models": 2, "data": 2, "runs": 2,
    "rewards": 3, "reporting": 3,
    "training": 4,
    "forecasting": 5, "command": 5,
    "train": 6, "evaluate": 6, "sample": 6, "pretrain": 6, "export": 6, "aot": 6, "report": 6,
}  # fmt: skip
CONFIG_READERS = {"config", "runs", "reporting", "training", "forecasting"}
HEAVY = (
    "transformers", "tensorflow_datasets", "tensorflow", "torch", "diffusers", "rapidocr",
    "onnxruntime", "rapidfuzz", "requests", "wandb", "peft",
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
