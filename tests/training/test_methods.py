"""Every method of the table through the whole loop: on any mesh, cut anywhere, on policy at first."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import left_behind
import numpy as np
import pytest
import scripted_rewards
from test_processes import finish, start

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets, rules
from tpgrpo_jax.credit import calibration as adjustment
from tpgrpo_jax.runs import checkpoint
from tpgrpo_jax.training import calibration, loop, losses
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

KINDS = ("tp_grpo", "tempflow", "diffusion_nft")  # a method of each kind of states; on a mesh in CI
# Each has a part that no other one has. The rest: pytest -m exhaustive.
IN_CI = (*KINDS, "densegrpo", "awm", "mixgrpo", "g2rpo", "gcpo", "vgpo")


def tier(name):
  return () if name == "tempflow" else pytest.mark.slow if name in IN_CI else pytest.mark.exhaustive


METHODS = [pytest.param(name, marks=tier(name)) for name in presets.METHODS]
BASE = {
  "sampler.num_steps": 5,
  "sampler.window": (0, 4),
  "sampler.window_range": (),
  "train": config_lib.Train(
    epochs=2, prompts_per_epoch=2, group_size=8, microbatch=4, updates_per_epoch=2
  ),
  "optimizer.learning_rate": 3e-3,
  "optimizer.eps": 1e-3,  # Adam divides by it: rounding of gradients near 0 stays rounding
  "eval": config_lib.Eval(every=1, num_steps=2, prompts=4, batch=4),
  "scoring.retries": 0,
}
# What a row does in hundreds of epochs happens in two.
SOONER = {
  "densegrpo": {"sampler.calibration_rounds": 4},
  "mixgrpo": {
    "sampler.window_every": 1,
    "rewards": {
      "coarse": {"weight": 1.0, "make": "scripted_rewards:make"},
      "contrast": {"weight": 0.5, "make": "scripted_rewards:make_contrast"},
    },
  },
  # A range that no ratio lies on the edge of, where rounding would decide.
  "tempflow": {"loss.clip_range": 3e-5},
  "diffusion_nft": {"loss.old_decay": (0.0, 0.1, 0.5), "optimizer.learning_rate": 1e-3},
  "awm": {"loss.old_decay": (0.0, 0.1, 0.3), "optimizer.learning_rate": 1e-3},
}
OF_THE_PACKING = {"evaluations_per_sample"}
OF_THE_RUN = ("epoch", "kind", "total/", "time/")


class Finished(NamedTuple):
  """A finished run."""

  config: config_lib.Config
  session: session_lib.Session
  state: dict[str, np.ndarray]
  rows: list[dict[str, Any]]


@pytest.fixture(scope="module")
def method_config(config_in):
  """Returns (run folder, method, {"group.field": value}) -> Config."""

  def make(run_dir, name, fields=None):
    from conftest import replace_fields

    base = config_in(run_dir, BASE)
    asked = presets.apply(base, presets.METHODS[name])
    config = replace_fields(asked, SOONER.get(name, {}) | (fields or {}))
    rules.validate(config)
    return config

  return make


def train(config, session):
  """The run of a config by functions that may be compiled already."""
  session = dataclasses.replace(session, config=config)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(session_lib, "open_session", lambda config, *_: session)
    loop.train(config)
  with (
    jax.set_mesh(session.mesh),
    checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept,
  ):
    restored, extra = kept.restore(session_lib.abstract_state(session))
  assert extra["epoch"] == config.train.epochs
  return Finished(config, session, arrays_of(restored), left_behind.rows(config))


def arrays_of(state):
  """The arrays of a state by name."""
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(state)}


@pytest.fixture(scope="module")
def finished_run(method_config, single_mesh, tmp_path_factory):
  """Returns method -> its run of two epochs on one device, which is made once."""
  runs = {}

  def run(name):
    if name not in runs:
      config = method_config(tmp_path_factory.mktemp(name) / "run", name)
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
        session = session_lib.open_session(config)
      runs[name] = train(config, session)
    return runs[name]

  return run


@pytest.fixture(scope="module", params=METHODS)
def method(request):
  return request.param


@pytest.fixture
def finished(method, finished_run):
  return finished_run(method)


def folder_of(run):
  return pathlib.Path(run.config.run.dir)


def train_rows(run):
  return [row for row in run.rows if row["kind"] == "train"]


def test_first_update_of_every_epoch_is_exactly_on_policy(finished):
  has_ratio = finished.config.loss.objective == "policy"
  for row in train_rows(finished):
    assert row.get("ratio/first_update_max_abs_log") == (0.0 if has_ratio else None)


def test_every_epoch_changes_the_weights(finished):
  moved = [
    np.abs(value - finished.state[name.replace(".trainable", ".ema")]).max()
    for name, value in finished.state.items()
    if name.startswith(".trainable")
  ]
  assert max(moved) > 1e-4  # ten times what the meshes may differ by
  for row in train_rows(finished):
    assert row["grad_norm"] > 0 and row["advantage/std"] > 0 and row["reward/std"] > 0


def test_old_policy_is_kept_by_the_objectives_that_have_one(finished):
  has_old = losses.OBJECTIVES[finished.config.loss.objective].keeps_old
  old = {name: value for name, value in finished.state.items() if name.startswith(".old")}
  assert bool(old) == has_old
  for name, value in old.items():
    new = finished.state[name.replace(".old", ".trainable")]
    assert value.shape == new.shape
  assert not old or any(
    (v != finished.state[n.replace(".old", ".trainable")]).any() for n, v in old.items()
  )


def epochs_on_a_mesh(config):
  """(session, trained state, metrics rows) of the run's epochs, without a checkpoint between them."""
  session = session_lib.open_session(config)
  rows = []
  with jax.set_mesh(session.mesh):
    session = calibration.calibrated(session)
    state = session_lib.init_state(session)
    for epoch in range(config.train.epochs):
      sampled = epoch_lib.sample_epoch(session, state, epoch)
      state, row = epoch_lib.update_epoch(session, state, epoch, sampled)
      rows.append({k: v for k, v in row.items() if not k.startswith(OF_THE_RUN)})
  return session, arrays_of(state), rows


@pytest.mark.parametrize(
  "method",
  [
    pytest.param(name, marks=pytest.mark.slow if name in KINDS else pytest.mark.exhaustive)
    for name in presets.METHODS
  ],
)
def test_mesh_of_eight_devices_learns_what_one_does(finished, method, method_config, tmp_path):
  config = method_config(tmp_path / "run", method, {"mesh": config_lib.Mesh(2, 2, 2)})
  session, state, rows = epochs_on_a_mesh(config)
  binding = lambda session: (session.method.members, session.method.copies)
  left_out = OF_THE_PACKING if binding(session) != binding(finished.session) else set()
  for row, wanted in zip(rows, train_rows(finished), strict=True):
    assert row.keys() == {name for name in wanted if not name.startswith(OF_THE_RUN)}
    for name in row.keys() - left_out:
      # Of a log-ratio that is exactly 0 on one mesh, rounding may remain on another.
      np.testing.assert_allclose(row[name], wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
  assert state.keys() == finished.state.keys()
  for name, value in state.items():
    np.testing.assert_allclose(value, finished.state[name], rtol=1e-5, atol=1e-5, err_msg=name)


def cut_after_the_first_epoch(finished, folder):
  """The config of a run whose second epoch was never saved."""
  shutil.copytree(folder_of(finished), folder)
  shutil.rmtree(folder / "checkpoints" / "2")
  run = dataclasses.replace(finished.config.run, dir=str(folder))
  return dataclasses.replace(finished.config, run=run)


def test_run_cut_after_an_epoch_and_resumed_equals_the_uninterrupted_one(finished, tmp_path):
  found = train(cut_after_the_first_epoch(finished, tmp_path / "run"), finished.session)
  assert found.rows == finished.rows
  assert found.state.keys() == finished.state.keys()
  for name, value in found.state.items():
    np.testing.assert_array_equal(value, finished.state[name], err_msg=name)
  levels = [folder_of(run) / calibration.FILE for run in (found, finished)]
  assert levels[0].exists() == bool(finished.config.sampler.calibration)
  if levels[0].exists():
    assert levels[0].read_bytes() == levels[1].read_bytes()


@pytest.fixture
def calibrated(finished_run):
  """A finished run that found its noise levels, and what it wrote of them."""
  run = finished_run("densegrpo")
  return run, json.loads((folder_of(run) / calibration.FILE).read_text())


@pytest.mark.slow
def test_noise_levels_move_as_the_counts_of_increments_say(calibrated):
  run, stored = calibrated
  assert len(stored["rounds"]) == run.config.sampler.calibration_rounds
  samples = run.config.sampler.calibration * run.config.train.microbatch
  levels = [np.array(r["noise_levels"]) for r in stored["rounds"]] + [stored["noise_levels"]]
  np.testing.assert_array_equal(levels[0], [run.config.sampler.noise_level] * 4)
  for before, after, counts in zip(levels, levels[1:], stored["rounds"]):
    increments = np.zeros((4, samples))
    for k, (up, down) in enumerate(zip(counts["positive"], counts["negative"])):
      increments[k, : up + down] = [1] * up + [-1] * down
    np.testing.assert_array_equal(after, adjustment.adjust(before, increments))
  assert (np.array(levels[-1]) != levels[0]).any()


@pytest.mark.slow
def test_rows_hold_the_noise_levels_and_count_what_they_took(calibrated):
  run, stored = calibrated
  spent = stored["evaluations"]
  assert run.rows[0]["total/evaluations"] == spent
  (first, second), samples = train_rows(run), 16
  each = first["evaluations_per_sample"]
  rounds = run.config.sampler.calibration * run.config.sampler.calibration_rounds
  assert spent == each * run.config.train.microbatch * rounds > 0
  assert first["total/evaluations"] == spent + samples * each
  assert second["total/evaluations"] == spent + 2 * samples * each
  for row in (first, second):
    assert [row[f"noise_level/{k}"] for k in range(4)] == stored["noise_levels"]
  assert (
    stored["scored"] == 5 * run.config.train.microbatch * rounds
  )  # four completions and its own
  assert first["total/scored"] == stored["scored"] + 5 * samples
  assert run.rows[0]["total/teraflops"] == stored["flops"] / 1e12
  of_an_epoch = second["total/teraflops"] - first["total/teraflops"]
  rollouts = stored["flops"] / (run.config.train.microbatch * rounds) * samples / 1e12
  assert 0 < rollouts < of_an_epoch < 4 * rollouts  # with the updates


@pytest.mark.slow
def test_noise_levels_are_found_once_and_read_on_resume(calibrated, tmp_path, monkeypatch):
  run, stored = calibrated
  config = cut_after_the_first_epoch(run, tmp_path / "run")
  path = tmp_path / "run" / calibration.FILE
  other = [level + 0.25 for level in stored["noise_levels"]]
  path.write_text(json.dumps(stored | {"noise_levels": other}))
  before = path.stat()
  monkeypatch.setattr(calibration, "find_levels", None)
  found = train(config, run.session)
  after = path.stat()
  assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
  row = train_rows(found)[-1]
  assert [row[f"noise_level/{k}"] for k in range(4)] == other
  assert row["reward/mean"] != train_rows(run)[-1]["reward/mean"]  # they are sampled with


@pytest.mark.slow
def test_noise_levels_that_another_config_left_before_its_first_checkpoint_are_not_used(
  calibrated, method_config, single_mesh, tmp_path, monkeypatch
):
  run, stored = calibrated
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / calibration.FILE).write_text(json.dumps(stored))
  config = method_config(tmp_path / "run", "densegrpo", {"sampler.noise_level": 0.5})
  session = dataclasses.replace(run.session, config=config)
  found = {"config": "of find_levels", "noise_levels": [0.1, 0.2, 0.3, 0.4], "evaluations": 1}
  monkeypatch.setattr(calibration, "find_levels", lambda *unused: found)
  assert calibration.calibrated(session).method.noise_levels == (0.1, 0.2, 0.3, 0.4)
  assert json.loads((tmp_path / "run" / calibration.FILE).read_text()) == found


@pytest.mark.slow
def test_run_killed_while_it_finds_its_noise_levels_finds_the_same_ones(
  calibrated, method_config, tmp_path, monkeypatch
):
  run, stored = calibrated
  config = method_config(tmp_path / "run", "densegrpo", {"train.epochs": 1})
  monkeypatch.setenv(scripted_rewards.VARIABLE, "kill:2")  # the third of four rounds
  (killed,) = start(config, 1)
  killed.communicate(timeout=300)
  assert killed.returncode == -9
  assert not (tmp_path / "run" / calibration.FILE).exists()
  monkeypatch.setenv(scripted_rewards.VARIABLE, "")
  finish(start(config, 1))
  assert json.loads((tmp_path / "run" / calibration.FILE).read_text()) == stored
