"""Old log-probs of the rollout or of the update's own program: what each gives, and how a run chooses."""

import dataclasses
import json
import logging
import shutil

from conftest import replace_fields
import jax
import left_behind
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.cost import utilisation
from tpgrpo_jax.training import build, loop, old_scores
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

OFF = 3e-4  # of the log-probs; loss.clip_range is 1e-5
GAP, FIRST = "ratio/rollout_max_abs_log", "ratio/first_update_max_abs_log"
BRANCH = {
  "sampler": config_lib.Sampler(
    rollout="branch", branches=4, num_steps=4, window=(0, 2), dynamics="sde"
  ),
  "credit.method": "branch",
  "advantage.group": "state",
  "completion.steps": 1,
  "loss.ratio": "normalized",
  "loss.trust_region": "dppo",
}
CHUNKED = {
  "sampler": config_lib.Sampler(num_steps=4, window=(0, 3)),
  "credit.method": "flow_grpo",
  "loss.chunks": (1, 2),
}


def shifted(transitions, size):
  """Transitions whose scores are off, as those of a program that rounds otherwise are."""
  signs = lambda a: np.resize([1.0, -1.0, 0.5], a.shape).astype(np.float32)
  velocity = jax.tree.map(lambda v: v * (1 + size * signs(v)), transitions.velocity)  # or None
  log_prob = transitions.log_prob + size * signs(transitions.log_prob)
  return dataclasses.replace(transitions, log_prob=log_prob, velocity=velocity)


def off_session(session, size=OFF):
  """The session, whose rollout's scores are off."""
  sample = session.rollout_fn

  def rollout_fn(*args):
    transitions, images = sample(*args)
    return shifted(transitions, size), images

  # Counted is what runs.
  session.meter.programs["rollout"] = sample
  return dataclasses.replace(session, rollout_fn=rollout_fn)


def asked(session, source):
  """The session with another loss.old_log_prob."""
  loss = dataclasses.replace(session.config.loss, old_log_prob=source)
  config = dataclasses.replace(session.config, loss=loss)
  meter = utilisation.Meter(session.meter.programs)
  source = old_scores.OldScores(config)
  return dataclasses.replace(session, config=config, old_scores=source, meter=meter)


def arrays_of(state):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same(found, wanted):
  for a, b in zip(arrays_of(found), arrays_of(wanted), strict=True):
    np.testing.assert_array_equal(a, b)


def one_epoch(session):
  """(state, metrics row) after an epoch."""
  state = session_lib.init_state(session)
  sampled = epoch_lib.sample_epoch(session, state, 0)
  return epoch_lib.update_epoch(session, state, 0, sampled)


@pytest.fixture(scope="module")
def session(config_in, single_mesh, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda config: single_mesh)
    config = config_in(tmp_path_factory.mktemp("scores") / "run", {"train.shuffle": True})
    yield session_lib.open_session(config)


@pytest.mark.slow
@pytest.mark.exact  # two programs, which at level 0 round otherwise
def test_auto_is_the_rollouts_own_where_the_log_ratio_is_zero(session):
  with jax.set_mesh(session.mesh):
    found, row = one_epoch(asked(session, "auto"))
    wanted, plain = one_epoch(asked(session, "rollout"))
  assert_same(found, wanted)
  assert row[FIRST] == plain[FIRST] == 0.0 and row["ratio/max_abs_log"] > 0
  assert GAP not in row and "time/old_log_prob" not in row


def test_auto_leaves_what_is_off_and_takes_the_updates_own(session, capsys):
  off = off_session(session)
  with jax.set_mesh(session.mesh):
    plain = one_epoch(asked(off, "rollout"))[1]
    auto = asked(off, "auto")
    found, row = one_epoch(auto)
    assert auto.rescoring_step._cache_size() == 1  # all phases are one program
    wanted, own = one_epoch(asked(off, "update"))
    exact, sound = one_epoch(asked(session, "rollout"))
  assert plain[FIRST] == pytest.approx(OFF, rel=0.01) and plain["clip/above"] > 0.2
  assert_same(found, wanted)
  for each in (row, own):
    assert each[FIRST] == 0.0
    assert each[GAP] == pytest.approx(OFF, rel=0.01)
    assert each["time/old_log_prob"] > 0 and each["time/old_log_prob_teraflops"] > 0
    # The second update is off policy by what the first has moved, and by nothing else.
    assert each["ratio/max_abs_log"] == pytest.approx(sound["ratio/max_abs_log"], rel=1e-2)
  for a, b in zip(arrays_of(found), arrays_of(exact), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  assert "differ by 0.0003 in the log-ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
  "fields",
  [pytest.param(BRANCH, id="branch"), pytest.param(CHUNKED, id="chunks")],
)
@pytest.mark.slow
def test_own_scores_serve_every_ratio(config_in, one_device, tmp_path, fields):
  session = session_lib.open_session(config_in(tmp_path / "run", fields))
  with jax.set_mesh(session.mesh):
    exact, sound = one_epoch(asked(session, "rollout"))
    found, row = one_epoch(asked(off_session(session), "auto"))
  assert row[FIRST] == 0.0 < row[GAP] and row["grad_norm"] > 0
  assert row["ratio/max_abs_log"] == pytest.approx(sound["ratio/max_abs_log"], rel=1e-2)
  for a, b in zip(arrays_of(found), arrays_of(exact), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_makes_the_same_choice(session, tmp_path, monkeypatch):
  fields = {"eval.every": 0, "eval.judge_prompts": 0, "train.epochs": 2}

  def train(folder, opened):
    config = replace_fields(session.config, fields | {"run.dir": str(folder)})
    opened = asked(dataclasses.replace(opened, config=config), "auto")
    monkeypatch.setattr(session_lib, "open_session", lambda config, *_: opened)
    loop.train(opened.config)
    return [row for row in left_behind.rows(config) if row["kind"] == "train"]

  off = off_session(session)
  rows = train(tmp_path / "whole", off)
  kept = (tmp_path / "whole" / old_scores.FILE).read_text()
  assert json.loads(kept)["since_epoch"] == 0
  assert all(row[GAP] == pytest.approx(OFF, rel=0.01) and row[FIRST] == 0.0 for row in rows)
  for name, opened in (("off", off), ("exact", session)):
    shutil.copytree(tmp_path / "whole", tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints" / "2")
    found = train(tmp_path / name, opened)
    if name == "off":
      assert found == rows
    else:  # its rollout has become better, but the choice of the run stays
      assert found[1][GAP] == 0.0
    assert (tmp_path / name / old_scores.FILE).read_text() == kept


BFLOAT16 = {
  "sampler": config_lib.Sampler(num_steps=3, window=(0, 2), guidance_scale=4.5),
  "credit.method": "flow_grpo",
  "model.dtype": "bfloat16",
  "model.remat": "full",
  "lora": config_lib.Lora(rank=4, alpha=8.0, targets=("attn.to_q", "attn.to_out.0")),
  "train": config_lib.Train(
    prompts_per_epoch=8, group_size=16, microbatch=128, updates_per_epoch=1
  ),
}


@pytest.mark.slow
def test_bfloat16_rounds_alike_in_rollout_and_update(config_in, one_device, tmp_path, monkeypatch):
  """At this microbatch XLA's own choice of kernels differs between the two."""
  config = config_in(tmp_path / "run", BFLOAT16)
  session = session_lib.open_session(config)
  with jax.set_mesh(session.mesh):
    assert one_epoch(asked(session, "rollout"))[1][FIRST] == 0.0
  monkeypatch.setattr(build, "jit", lambda config, program, **options: jax.jit(program, **options))
  session = session_lib.open_session(config)
  with jax.set_mesh(session.mesh):
    row = one_epoch(asked(session, "auto"))[1]
  assert row[FIRST] == 0.0 and row[GAP] > config.loss.clip_range


@pytest.mark.slow
@pytest.mark.parametrize(
  "source, program", [("update", "rescoring_step"), ("rollout", "train_step")]
)
def test_updates_on_a_mesh_come_from_one_program(config_in, tmp_path, caplog, source, program):
  fields = {"train.microbatch": 8, "model.dtype": "bfloat16", "mesh": config_lib.Mesh(2, 2, 2)}
  session = asked(session_lib.open_session(config_in(tmp_path / "run", fields)), source)
  with jax.set_mesh(session.mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
    _, row = one_epoch(session)
  assert row["grad_norm"] > 0 and (row[FIRST] == 0.0 or source == "rollout")
  compiled = [m for m in caplog.messages if f"XLA compilation of jit({program})" in m]
  assert len(compiled) == 1, compiled
