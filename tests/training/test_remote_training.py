"""Training on a server's scores: the run is the local one, and a server that fails spoils nothing."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import left_behind
import pytest

from tpgrpo_jax import rewards
from tpgrpo_jax.config import presets
from tpgrpo_jax.runs import checkpoint
from tpgrpo_jax.training import loop
from tpgrpo_jax.training import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("rewards", "serving")]
import scripted_server  # noqa: E402
import served  # noqa: E402

# Requests of a run: one of the first evaluation; in each epoch two, and one of its evaluation.
SECOND_EPOCH = 1 + 3 + 1


@pytest.fixture(scope="module")
def server():
  with scripted_server.Server().running() as running:
    yield running


def fields_for(server, **options):
  spec = {"weight": 1.0, "make": "remote", "url": server.url, "timeout": 1.0, **options}
  return {
    "train.epochs": 2,
    "rewards": {"coarse": spec},
    "scoring.backoff": 0.05,
    "scoring.retries": 4,
  }


@pytest.fixture(scope="module")
def uninterrupted(config_in, single_mesh, tmp_path_factory, server):
  """The config of a run whose server never failed."""
  config = config_in(tmp_path_factory.mktemp("uninterrupted") / "run", fields_for(server))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    loop.train(config)
  return config


def rarely(*names):
  return [pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault", ["killed", *rarely("hang", "truncated", "502", "slow", "busy", "reordered")]
)
def test_a_run_waits_for_a_server_that_comes_back(
  fault, uninterrupted, make_config, one_device, server, caplog
):
  server.script = [""] * SECOND_EPOCH + [fault]
  config = make_config(fields_for(server))
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)
  said = [r.getMessage() for r in caplog.records if r.name.startswith("tpgrpo_jax.rewards")]
  # What happens while a process dies and is started has two kinds of failures: cut, and nobody there.
  assert len(said) <= {"slow": 0, "busy": 0, "reordered": 0, "killed": 2}.get(fault, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nan", *rarely("short", "html", "401", "413", "truncated")])
def test_a_run_stops_with_its_finished_epochs_where_scores_are_none_and_goes_on(
  fault, uninterrupted, make_config, one_device, server
):
  server.script = [""] * SECOND_EPOCH + [fault] * 5
  config = make_config(fields_for(server) | {"checkpoint.every": 10})
  with pytest.raises(rewards.RewardError, match="again"):
    loop.train(config)
  assert [row["epoch"] for row in left_behind.rows(config) if row["kind"] == "train"] == [1]
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.steps() == [1]
  server.script = []
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


# OCR behind `serve`

UNKNOWN = {"total/teraflops_with_rewards"}  # A server does not say what its reward takes.

SIZES = {
  "train.epochs": 2, "train.prompts_per_epoch": 2, "train.group_size": 4, "train.microbatch": 8,
  "train.updates_per_epoch": 1, "eval.prompts": 24, "eval.batch": 24, "eval.every": 1,
  "log.tensorboard": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def ocr_server():
  with served.serve("--rewards=ocr") as (_, url):
    yield url


def recipe(folder, url="", **options):
  """The built-in task, small, with OCR here or behind the address."""
  fields = SIZES | {"run.dir": str(folder)}
  config = presets.apply(presets.recipe("tiny_text", "flow_grpo"), fields)
  if url:
    spec = {"weight": 1.0, "make": "remote", "url": url, "reward": "ocr", **options}
    config = dataclasses.replace(config, rewards={"ocr": spec})
  return config


@pytest.fixture(scope="module")
def local(single_mesh, tmp_path_factory):
  config = recipe(tmp_path_factory.mktemp("local") / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    loop.train(config)
  return config


@pytest.mark.slow
@pytest.mark.parametrize("connections", [4, *rarely(1, 2)])
def test_ocr_behind_serve_trains_the_very_run_that_ocr_here_trains(
  connections, local, ocr_server, one_device, tmp_path
):
  config = recipe(tmp_path / "run", ocr_server, connections=connections, batch=7)
  loop.train(config)
  left_behind.assert_same_run(config, local, without=UNKNOWN)
  rows = left_behind.rows(config)
  assert 0 < rows[0]["reward/ocr/mean"] < 1 and 0 < rows[0]["reward/ocr/exact"] < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 4])
def test_ocr_behind_serve_is_the_same_to_several_processes(processes, ocr_server, tmp_path):
  found = {}
  for name in ("local", "served"):
    folder = tmp_path / name
    fields = SIZES | {"run.dir": str(folder), "train.microbatch": 8}
    if name == "served":
      spec = {"weight": 1.0, "make": "remote", "url": ocr_server, "reward": "ocr", "batch": 7}
      fields["rewards"] = json.dumps({"ocr": spec})
    arguments = [f"--config.{key}={value}" for key, value in fields.items()]
    environment = {"PYTHON": sys.executable, "PROCESSES": str(processes), "DEVICES": str(processes)}
    done = subprocess.run(
      ["bash", ROOT / "launch" / "local.sh", "configs/tiny_text.py:flow_grpo", *arguments],
      env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=900,
      check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found[name] = left_behind.rows(recipe(folder), without=UNKNOWN)
  assert found["served"] == found["local"]
  kinds = [row["kind"] for row in found["local"]]
  assert kinds == ["eval", "train", "eval", "train", "eval", "judge"]
