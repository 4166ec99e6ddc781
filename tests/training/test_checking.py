"""A run is tried before it starts: what is wrong is said, its cost is right, and nothing is left behind."""

import dataclasses
import pathlib
import re

import jax
import pytest
import scripted_rewards

from tpgrpo_jax import rewards, version
from tpgrpo_jax.cost import hardware
from tpgrpo_jax.forecasting import checking, forecast, lowering
from tpgrpo_jax.runs import metrics, run_folder
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import loop, old_scores
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

ONE_EPOCH = {"train.epochs": 1, "eval.every": 0, "eval.prompts": 4, "eval.judge_prompts": 3}
pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def trained(config_in, single_mesh, tmp_path_factory):
  """The config of a run of one epoch."""
  config = config_in(tmp_path_factory.mktemp("trained") / "run", ONE_EPOCH)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda *_: single_mesh)
    loop.train(config)
  return config


@pytest.fixture
def one_mesh(single_mesh, monkeypatch):
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda *_: single_mesh)


def checked(config):
  return "\n".join(checking.check(config))


def contents(folder):
  return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def test_a_new_run_is_counted_and_its_rewards_are_asked(make_config, one_mesh, trained, tmp_path):
  fields = {
    "rewards": {
      "coarse": {"weight": 1.0, "make": "scripted_rewards:make"},
      "jpeg_compressibility": 1.0,
    }
  }
  text = checked(make_config(ONE_EPOCH | fields | {"train.epochs": 5}))
  assert not (tmp_path / "run").exists()
  assert (
    f"tpgrpo_jax {version.installed()}, jax {jax.__version__}: " in text and "mesh data" in text
  )
  assert "5 epochs of 4 prompts x 4 samples" in text
  assert re.search(
    r"trains [\d,]+ parameters .* an epoch is 16 samples, \d+ evaluations of the model", text
  )
  # 128 / 255, in thousandths; a plain picture is a small file.
  assert re.search(
    r"gray picture of 48 x 24 for '[A-Z]{3}': coarse=\.502 jpeg_compressibility=", text
  )
  assert "5 epochs, 2 evaluations of 4 held-out prompts and 9 pictures that judge it" in text
  assert "least time: not known" in text and "goes on" not in text
  assert re.search(r"^[\d.e+]+ FLOPs more an epoch, if loss.old_log_prob='auto' finds", text, re.M)


@pytest.mark.parametrize("source", ["rollout", "update"])
def test_an_epoch_has_the_operations_that_the_run_itself_counts(
  make_config, one_mesh, trained, tmp_path, source
):
  """In its own programs, without the slots that its drawn windows leave idle."""
  done = trained
  fields = ONE_EPOCH | {"loss.old_log_prob": source}
  if source == "update":
    done = make_config(fields | {"run.dir": str(tmp_path / "done")})
    loop.train(done)
  text = checked(make_config(fields))
  said = float(re.search(r"an epoch: ([\d.e+]+) FLOPs", text)[1])
  assert "FLOPs more an epoch, if" not in text  # nothing is left to find out
  row = next(r for r in metrics.rows_of(done.run.dir) if r["kind"] == "train")
  assert said == pytest.approx(row["total/teraflops"] * 1e12, rel=5e-3)


def test_what_the_run_has_found_out_of_its_old_log_probs_is_counted(
  make_config, one_mesh, tmp_path
):
  of_an_epoch = lambda text: float(re.search(r"an epoch: ([\d.e+]+) FLOPs", text)[1])
  folder = tmp_path / "run"
  config = make_config(ONE_EPOCH | {"run.dir": str(folder)})
  before = checked(config)
  more = float(re.search(r"([\d.e+]+) FLOPs more an epoch", before)[1])
  source = old_scores.OldScores(config)
  source.change(0, 1.0)
  folder.mkdir()
  source.save(folder)
  after = checked(config)
  assert "FLOPs more" not in after and "old_log_prob" in after
  assert of_an_epoch(after) == pytest.approx(of_an_epoch(before) + more, rel=5e-3)


@pytest.mark.parametrize("by", ["samples", "steps"])
def test_what_is_held_beside_an_update_are_the_batches_of_the_others(
  make_config, one_mesh, single_mesh, tmp_path, by
):
  fields = {"train.updates_by": by, "run.dir": str(tmp_path / "held")}
  config = make_config(ONE_EPOCH | fields | {"credit.method": "flow_grpo"})
  (tmp_path / "held").mkdir()
  session = session_lib.open_session(config)
  with jax.set_mesh(single_mesh):
    sampled = epoch_lib.sample_epoch(session, session_lib.init_state(session), 0)
    batches = epoch_lib._stacked(config, sampled, 0)
    plan = lowering.open_plan(config, single_mesh)
  leaves = lambda batch: jax.tree.leaves((batch.transitions, batch.conditions))
  size = lambda leaves: sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in leaves}.values())
  held = size([leaf for batch in batches for leaf in leaves(batch)]) - size(leaves(batches[0]))
  assert len(batches) == 2 and forecast.held_bytes(plan, "update") == held > 0
  first, second = (batch.transitions.final is batches[0].transitions.final for batch in batches)
  assert first and second == (by == "steps")


def test_a_picture_of_an_evaluation_costs_its_steps(make_config, one_mesh, single_mesh):
  config = make_config(ONE_EPOCH)
  more = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_steps=6))
  few, many = (checking.picture_flops(c, single_mesh) for c in (config, more))
  assert many == pytest.approx(3 * few)  # of two steps; this model's decoder multiplies nothing


def test_a_run_that_goes_on_is_left_as_it_is(trained, one_mesh):
  folder = pathlib.Path(trained.run.dir)
  before = contents(folder)
  longer = dataclasses.replace(trained, train=dataclasses.replace(trained.train, epochs=3))
  text = checked(longer)
  assert "goes on after epoch 1" in text and "2 epochs, 1 evaluations" in text
  assert contents(folder) == before


def test_what_training_would_refuse_is_refused(trained, one_mesh, monkeypatch, tmp_path):
  replaced = lambda group, **fields: dataclasses.replace(
    trained, **{group: dataclasses.replace(getattr(trained, group), **fields)}
  )
  with pytest.raises(ValueError, match="loss.clip_range: the run has"):
    checked(replaced("loss", clip_range=0.5))
  longer = replaced("train", epochs=2)
  with (
    run_folder.hold(trained.run.dir),
    pytest.raises(ValueError, match="process .* is training in it"),
  ):
    checked(longer)
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="is a file; must be a folder"):
    checked(replaced("run", dir=str(tmp_path / "file" / "run")))
  with pytest.raises(ValueError, match=r"rewards|remote|127\.0\.0\.1"):
    checked(dataclasses.replace(
      trained, run=dataclasses.replace(trained.run, dir=str(tmp_path / "run")),
      rewards={"far": {"weight": 1.0, "make": "remote", "url": "http://127.0.0.1:9"}},
    ))  # fmt: skip
  assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_is_named(make_config, one_mesh, monkeypatch):
  monkeypatch.setenv(scripted_rewards.VARIABLE, "nan:0")
  monkeypatch.setattr(
    mesh_lib, "batch_shards", lambda _: 2
  )  # the scripted one spoils the second score
  with pytest.raises(rewards.RewardError, match="reward 'coarse' returned the score nan"):
    checked(make_config(ONE_EPOCH))


def test_on_known_devices_memory_and_least_time_are_said(make_config, one_mesh, monkeypatch):
  chip = hardware.Chip(hbm=2**30, flops=1e9, hbm_bandwidth=1e15, link_bandwidth=1e15)
  monkeypatch.setattr(hardware, "find_chip", lambda *_: chip)
  text = checked(make_config(ONE_EPOCH))
  epoch = float(re.search(r"an epoch: ([\d.e+]+) FLOPs", text)[1])
  run = float(re.search(r"judge it: ([\d.e+]+) FLOPs", text)[1])
  seconds, hours = re.search(r"an epoch ([\d.e+-]+) s, the run ([\d.e+-]+) h", text).groups()
  assert float(seconds) == pytest.approx(epoch / 1e9, rel=0.02)
  assert 3600 * float(hours) == pytest.approx(run / 1e9, rel=0.02)
  assert re.search(r"memory of a device: 0\.\d\d GiB .*, of 1\.00;", text)
  monkeypatch.setattr(hardware, "find_chip", lambda *_: dataclasses.replace(chip, hbm=1e4))
  with pytest.raises(ValueError, match="GiB of each device, which has 0.00"):
    checked(make_config(ONE_EPOCH))


def test_a_run_says_what_it_is_before_it_opens_anything(make_config, monkeypatch, capsys):
  monkeypatch.setattr(loop.session_lib, "open_session", lambda *_: 1 / 0)
  config = make_config(ONE_EPOCH)
  with pytest.raises(ZeroDivisionError):
    loop.train(config)
  said = capsys.readouterr().err
  assert version.installed() in said and f"{config.run.dir}: 1 epochs of 4 prompts" in said
