"""What a user meets first: commands, recipes by name, help, the package's own papers."""

import dataclasses
import errno
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

from tpgrpo_jax import __main__ as front
from tpgrpo_jax import command, version
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import describe, presets

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import make_config_page  # noqa: E402

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_command_prints_the_packages_version(capsys):
  with pytest.raises(SystemExit) as ended:
    command.run(lambda argv: pytest.fail("it ran"), argv=["any", "--version"])
  assert ended.value.code == 0
  assert capsys.readouterr().out == f"tpgrpo_jax {importlib.metadata.version('tpgrpo_jax')}\n"


def test_a_full_disk_ends_a_command_without_a_traceback(capsys):
  def main(argv):
    raise OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")

  with pytest.raises(SystemExit) as ended:
    command.run(main, argv=["any"])
  assert ended.value.code == 1
  said = capsys.readouterr().err
  assert said.startswith(
    "error: out/model.safetensors: cannot be written: No space left on device."
  )


def test_a_source_tree_says_its_own_version_installed_or_not(monkeypatch):
  monkeypatch.setattr(version.importlib.metadata, "version", lambda name: pytest.fail("asked"))
  assert version.installed() == VERSION


def test_changelog_and_citation_have_the_version():
  assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["version"] == VERSION and citation["license"] == "Apache-2.0"


def test_what_contributing_names_is_there():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  for path in re.findall(
    r"`((?:config|credit|objective|rewards|models|training)/[\w/]*(?:\.py)?)`", text
  ):
    assert (ROOT / "tpgrpo_jax" / path).exists(), path
  for path in re.findall(r"`python ([\w/]+\.py)`", text) + re.findall(r"\]\(([^)]+)\)", text):
    assert (ROOT / path).is_file(), path


def test_issue_templates_have_a_name_and_what_they_are_about():
  templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
  assert len(templates) >= 2
  for path in templates:
    front = yaml.safe_load(path.read_text().split("---")[1])
    assert front["name"] and front["about"]


def test_one_command_names_all_and_says_what_each_does(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["tpgrpo"])
  front.main()
  shown = capsys.readouterr().out
  for name in front.COMMANDS:
    assert re.search(rf"^  {name} +\w+", shown, re.MULTILINE)
  assert "tiny_text" in shown
  ran = []
  monkeypatch.setattr(front.runpy, "run_module", lambda name, **_: ran.append((name, sys.argv)))
  monkeypatch.setattr(sys, "argv", ["tpgrpo", "train", "--config=tiny_text"])
  front.main()
  assert ran == [("tpgrpo_jax.train", ["tpgrpo train", "--config=tiny_text"])]


def test_an_unknown_command_is_refused_with_the_nearest_one(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["tpgrpo", "trian"])
  with pytest.raises(SystemExit) as ended:
    front.main()
  assert ended.value.code == 1 and "Did you mean 'train'?" in capsys.readouterr().err


def test_every_module_with_a_command_is_dispatched():
  commands = {
    p.stem for p in (ROOT / "tpgrpo_jax").glob("*.py") if "command.run(main" in p.read_text()
  }
  assert commands == set(front.COMMANDS)


@pytest.mark.parametrize(
  "style", [["--config=tiny_text:tempflow"], ["--config", "tiny_text:tempflow"]]
)
def test_recipes_are_found_by_name_in_any_folder(tmp_path, monkeypatch, style):
  monkeypatch.chdir(tmp_path)
  found = command._with_recipes_found(["train", *style])[-1].removeprefix("--config=")
  assert found == f"{ROOT / 'configs' / 'tiny_text.py'}:tempflow"
  (tmp_path / "tiny_text").write_text("")  # a file goes first
  assert command._with_recipes_found(["train", *style])[-1].endswith(
    style[-1].removeprefix("--config=")
  )


def test_an_unknown_recipe_is_refused_with_the_nearest_one():
  with pytest.raises(ValueError, match="no such file, nor a recipe.*Did you mean 'tiny_text'"):
    command._with_recipes_found(["train", "--config=tiny_txt:tempflow"])


def test_seeds_and_methods_have_run_folders_of_their_own():
  folders = set()
  for method in ("tp_grpo", "tempflow"):
    recipe = config_lib.to_config_dict(presets.recipe("tiny_text", method))
    for seed in range(3):
      recipe.seed = seed  # the command line sets it after the recipe
      config = config_lib.name_run(config_lib.from_config_dict(config_lib.Config, recipe))
      folders.add(config.run.dir)
      assert method in config.run.dir and config.run.dir.endswith(
        f"_seed{seed}" if seed else method
      )
  assert len(folders) == 6
  mine = dataclasses.replace(config_lib.Config(seed=3), run=config_lib.Run("runs/mine"))
  assert config_lib.name_run(mine).run.dir == "runs/mine"


def test_every_field_says_what_it_is():
  fields = [f for group in describe.groups(config_lib.Config) for f in group.fields]
  assert len(fields) > 100 and len({f.name for f in fields}) == len(fields)
  assert not [f.name for f in fields if not f.text]


def test_page_of_the_config_is_that_of_the_code():
  assert make_config_page.PAGE.read_text() == make_config_page.make(), (
    "If that is meant, run: python docs/make_config_page.py"
  )


def test_help_shows_every_field_with_its_text_and_default():
  text = describe.render(config_lib.Config)
  for group in describe.groups(config_lib.Config):
    for field in group.fields:
      assert f"--config.{field.name}={field.default}  (" in text
      assert field.text.split()[0] in text
  assert "--config.sampler.window=(0, 9)" in text


@pytest.mark.slow
def test_the_wheel_has_recipes_weights_and_the_command_and_runs_in_another_folder(tmp_path):
  build = [
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "-q",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
  ]
  subprocess.run(
    ["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={tmp_path}/source/"], check=True
  )
  subprocess.run([*build, "-w", tmp_path, tmp_path / "source"], check=True)
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(tmp_path / "site")
  for recipe in (ROOT / "configs").glob("*.py"):
    assert f"tpgrpo_jax/recipes/{recipe.name}" in names
  assert any("assets/tiny_text" in name for name in names)
  (tmp_path / "empty").mkdir()
  environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu"}
  arguments = ["aot", "--config=tiny_text:tempflow", "--nocompile"]
  done = subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax", *arguments],
    cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0 and "an epoch:" in done.stdout, done.stderr


def test_a_missing_extra_is_installed_by_its_packages_names(monkeypatch):
  asked = [
    "jax>=1",
    "rapidocr>=3; extra == 'ocr'",
    'httpx2>=2; extra == "remote"',
    'tpgrpo_jax[remote]; extra == "serve"',
    "uvicorn>=1; extra == 'serve'",
  ]
  monkeypatch.setattr(version.importlib.metadata, "requires", lambda name: asked)
  assert version.install("ocr") == "pip install 'rapidocr>=3'"
  assert version.install("serve") == "pip install 'httpx2>=2' 'uvicorn>=1'"


LINES = """
import runpy, sys, time
import jax

jax.devices()
began = time.process_time()
from tpgrpo_jax.training import progress


def say(text):
  print(f"{time.process_time() - began:.3f}", text, flush=True)
  if "parameters" in text:
    sys.exit()


progress.say = say
sys.argv = ["train", "--config=tiny_text", "--config.run.dir=run"]
runpy.run_module("tpgrpo_jax.train", run_name="__main__", alter_sys=True)
"""


def test_the_first_lines_stand_there_before_anything_is_opened(tmp_path):
  """In seconds of this process's own work after `import jax`; a busy machine makes it wait, not work."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, "-c", LINES], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  found = re.search(
    r"^([\d.]+) tpgrpo_jax \S+, jax \S+: 1 x cpu, mesh data 1 x fsdp 1 x tensor 1\n"
    r"run: 120 epochs of 8 prompts x 16 samples\n"
    r"([\d.]+) trains 2,343,744 parameters .* 1,280 evaluations .* 512 scored images and 2 updates$",
    done.stdout, re.MULTILINE,
  )  # fmt: skip
  assert found, done.stdout
  # Measured: 0.14 and 2.1. Whatever loads weights, rewards or prompts first comes to 8.
  assert float(found[1]) < 1 and float(found[2]) < 5
