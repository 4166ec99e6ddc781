"""A run cut anywhere and resumed is the uninterrupted run; a bad reward stops it with the culprit named."""

import dataclasses
import json
import logging
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import weakref

import jax
from jax.experimental import multihost_utils
import left_behind
import numpy as np
import pytest
import scripted_rewards

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.flow import schedule
from tpgrpo_jax.runs import checkpoint, preemption
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import loop
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent.parent
# Reward calls of a run: one of the first evaluation; in each epoch two, and one of its evaluation.
CHUNKS = 2
ONE_TRY = {"scoring.retries": 0}
pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def uninterrupted(config_in, single_mesh, tmp_path_factory):
  """The config of a finished run on one device."""
  config = config_in(tmp_path_factory.mktemp("uninterrupted") / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    loop.train(config)
  return config


def script(monkeypatch, text):
  monkeypatch.setenv(scripted_rewards.VARIABLE, text)


@pytest.mark.parametrize(
  "epoch", [1, *(pytest.param(epoch, marks=pytest.mark.exhaustive) for epoch in (0, 2))]
)
def test_run_cut_in_an_epoch_and_resumed_equals_the_uninterrupted_one(
  epoch, uninterrupted, make_config, one_device, monkeypatch
):
  config = make_config(ONE_TRY)
  calls_before = 1 + epoch * (CHUNKS + 1)
  script(monkeypatch, f"raise:{calls_before + 1}")  # the second microbatch of that epoch
  with pytest.raises(rewards.RewardError, match="the reward server is gone"):
    loop.train(config)
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_run_cut_between_the_update_and_the_evaluation_equals_the_uninterrupted_one(
  uninterrupted, make_config, one_device, monkeypatch
):
  config = make_config(ONE_TRY)
  script(monkeypatch, f"raise:{1 + CHUNKS}")  # the evaluation after the first epoch
  with pytest.raises(rewards.RewardError, match="the reward server is gone"):
    loop.train(config)
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_reward_that_fails_once_is_asked_again(
  uninterrupted, make_config, one_device, monkeypatch, caplog
):
  config = make_config({"scoring.backoff": 0.01})
  script(monkeypatch, f"raise:{1 + CHUNKS + 2}")
  loop.train(config)
  assert "the reward server is gone; again in 0.01 s" in caplog.text
  left_behind.assert_same_run(config, uninterrupted)


def test_reward_that_hangs_stops_the_run_with_the_finished_epochs_saved(
  uninterrupted, make_config, one_device, monkeypatch
):
  fields = ONE_TRY | {"scoring.timeout": 1.0, "checkpoint.every": 10}
  config = make_config(fields)
  script(monkeypatch, f"hang:{1 + CHUNKS + 2}")  # in the second epoch
  with pytest.raises(rewards.RewardError, match="no answer within 1 s"):
    loop.train(config)
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.steps() == [1]
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


@pytest.mark.parametrize(
  "what, call, finished",
  [
    ("term", 1 + CHUNKS + 2, 1),  # in the second epoch
    ("interrupt", 1, 0),  # in the first
    pytest.param("term_and_hang", 1 + CHUNKS + 2, 1, marks=pytest.mark.slow),
    ("term_and_hang", 2 * (CHUNKS + 1), 2),  # in the evaluation after it
  ],
)
def test_run_that_is_asked_to_end_saves_and_goes(
  what, call, finished, uninterrupted, make_config, one_device, monkeypatch, request
):
  config = make_config({"checkpoint.every": 10})
  script(monkeypatch, f"{what}:{call}")
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
  request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
  with pytest.raises(preemption.Preempted) as ended:
    loop.train(config)
  assert ended.value.epoch == finished
  if what == "term_and_hang":
    assert time.monotonic() - scripted_rewards.HUNG.pop() < 25  # not the 30 s that the reward hangs
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.steps() == [finished] * (finished > 0)
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_run_ends_where_jax_announces_the_end_of_the_machine(
  uninterrupted, make_config, one_device, monkeypatch
):
  config = make_config({"checkpoint.every": 10})
  with monkeypatch.context() as patch:
    patch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 2)
    with pytest.raises(preemption.Preempted):
      loop.train(config)
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.steps() == [2]
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_signal_while_the_last_checkpoint_is_written_does_not_lose_it(
  uninterrupted, make_config, one_device, monkeypatch
):
  config, close = make_config({"checkpoint.every": 10}), checkpoint.RunCheckpoints.close

  def signalled(self):
    os.kill(os.getpid(), signal.SIGTERM)
    close(self)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.RunCheckpoints, "close", signalled)
    loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_evaluation_that_was_cut_is_made_up_for(
  uninterrupted, make_config, one_device, monkeypatch
):
  config = make_config(ONE_TRY)
  script(monkeypatch, f"raise:{1 + 3 * (CHUNKS + 1) - 1}")  # the last evaluation
  with pytest.raises(rewards.RewardError):
    loop.train(config)
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


@pytest.mark.slow
def test_sharded_run_cut_and_resumed_equals_the_uninterrupted_one(
  make_config, tmp_path, monkeypatch
):
  fields = ONE_TRY | {"mesh": config_lib.Mesh(2, 2, 2)}
  whole = make_config(fields | {"run.dir": str(tmp_path / "whole")})
  loop.train(whole)
  config = make_config(fields)
  script(monkeypatch, f"raise:{1 + CHUNKS + 1}")
  with pytest.raises(rewards.RewardError, match="the reward server is gone"):
    loop.train(config)
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, whole)


def test_shorter_run_continued_equals_the_longer_one(uninterrupted, make_config, one_device):
  loop.train(make_config({"train.epochs": 2}))
  config = make_config()
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


def test_best_weights_are_those_of_the_best_evaluation(uninterrupted):
  evals = [row for row in left_behind.rows(uninterrupted) if row["kind"] == "eval"]
  wanted = max(evals, key=lambda row: row["reward/mean"])["epoch"]  # the first of equals
  epoch, found = left_behind.best_state(uninterrupted)
  assert epoch == wanted
  if epoch == 0:
    base = session_lib.open_session(uninterrupted).model.trainable
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.leaves(base))


def test_run_without_progress_ends_by_its_patience_and_is_judged_by_other_prompts(
  make_config, one_device, capsys
):
  fields = {
    "train.epochs": 9,
    "eval.patience": 2,
    "eval.prompts": 5,
    "optimizer.learning_rate": 1e-30,  # nothing becomes better than the base
    "checkpoint.every": 100,
  }
  config = make_config(fields)
  loop.train(config)
  rows = left_behind.rows(config)
  assert [row["epoch"] for row in rows if row["kind"] == "train"] == [1, 2]
  judged = rows[-1]
  assert (judged["kind"], judged["epoch"], judged["prompts"]) == ("judge", 2, 3)
  assert judged["prompts_evaluated"] == 0
  assert judged["best/epoch"] == 0 and judged["last/gain/coarse/mean"] == 0.0
  path = pathlib.Path(config.run.dir) / "metrics.jsonl"
  before = path.read_bytes()
  loop.train(config)  # ended is ended
  assert path.read_bytes() == before
  text = capsys.readouterr()
  assert "No evaluation was better than the base model's" in text.out + text.err


def test_finished_run_started_again_changes_nothing(uninterrupted, one_device):
  path = pathlib.Path(uninterrupted.run.dir) / "metrics.jsonl"
  before = path.read_bytes()
  loop.train(uninterrupted)
  assert path.read_bytes() == before


def test_shorter_run_is_refused_and_nothing_is_rewritten(uninterrupted, make_config, one_device):
  folder = pathlib.Path(uninterrupted.run.dir)
  files = lambda: {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  before = files()
  with pytest.raises(ValueError, match="train.epochs=2: the run in .* has finished 3"):
    loop.train(make_config({"run.dir": uninterrupted.run.dir, "train.epochs": 2}))
  assert files() == before


@pytest.mark.parametrize("done, why", [(0, "of a run without a checkpoint"), (1, "after epoch 1")])
def test_rows_that_a_resume_drops_are_said(
  done, why, make_config, one_device, monkeypatch, tmp_path, capsys
):
  (tmp_path / "run").mkdir()
  rows = [{"epoch": e, "kind": "train"} for e in range(3)]
  (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
  monkeypatch.setattr(loop, "_restore_or_start", lambda *_: ({}, {"epoch": done}))
  monkeypatch.setattr(loop, "_train", lambda *_: {})
  loop.train(make_config())
  assert f"drops {3 - 2 * done} rows of metrics.jsonl {why}" in capsys.readouterr().err


def test_metrics_hold_every_row_once(uninterrupted):
  rows = [(row["kind"], row["epoch"]) for row in left_behind.rows(uninterrupted)]
  wanted = [("eval", 0)]
  for epoch in (1, 2, 3):
    wanted += [("train", epoch), ("eval", epoch)]
  assert rows == wanted


def test_metrics_of_an_epoch_tell_what_the_issue_asks_for(uninterrupted):
  row = [r for r in left_behind.rows(uninterrupted) if r["kind"] == "train"][-1]
  assert row.keys() >= {
    "reward/mean", "reward/std", "reward/coarse/mean", "reward/coarse/std",
    "completion_reward/0", "completion_reward/2", "increment/0", "increment/1",
    "turning_point/0", "turning_point/1", "group/zero_spread", "advantage/std",
    "ratio/mean", "ratio/min", "ratio/max", "ratio/first_update_max_abs_log",
    "clip/above", "clip/below", "kl", "grad_norm", "evaluations_per_sample",
    "image/mean", "image/contrast", "image/edge_density", "total/samples", "total/evaluations",
  }  # fmt: skip
  assert row["ratio/first_update_max_abs_log"] == 0
  assert row["total/samples"] == 3 * 16
  assert row["total/scored"] == 3 * 16 * 3  # two completions of each, and its own image
  assert "total/teraflops_with_rewards" not in row  # "coarse" does not say what it takes


@pytest.mark.parametrize(
  "what, rule",
  [("nan", "returned the score nan"), ("short", "must be of shape (")],
)
def test_bad_reward_stops_the_run_with_the_prompt_named_and_the_run_resumes(
  what, rule, uninterrupted, make_config, one_device, monkeypatch, prompt_folder
):
  config = make_config()
  script(monkeypatch, f"{what}:{1 + CHUNKS + 1}")
  with pytest.raises(rewards.RewardError) as caught:
    loop.train(config)
  message = str(caught.value)
  assert "reward 'coarse'" in message
  assert rule in message
  words = (prompt_folder / "train.txt").read_text().split()
  assert any(f"the prompt {word!r}" in message for word in words)
  assert "start the same command again" in message
  script(monkeypatch, "")
  loop.train(config)
  left_behind.assert_same_run(config, uninterrupted)


@pytest.mark.parametrize("name", ["states_credit", "bare_credit"])
def test_credit_of_another_form_is_refused_before_anything_is_sampled(
  name, make_config, one_device
):
  config = make_config({"credit.method": f"scripted_rewards:{name}"})
  with pytest.raises(ValueError) as caught:
    session_lib.open_session(config)
  message = str(caught.value)
  assert (
    f"credit.method='scripted_rewards:{name}': must return StepCredit(reward float [2, 16]"
    in message
  )


def test_credit_that_is_not_finite_stops_the_run(make_config, one_device, prompt_folder):
  with pytest.raises(ValueError) as caught:
    loop.train(make_config({"credit.method": "scripted_rewards:nan_credit"}))
  words = (prompt_folder / "train.txt").read_text().split()
  message = str(caught.value)
  assert "gave nan to step 0" in message and any(f"sample of {word!r}" in message for word in words)


@pytest.mark.parametrize(
  "first, said",
  [
    (0, "No checkpoint was saved."),
    (2, "The newest checkpoint is that of epoch 1, and what came after it is lost: 1 finished"),
  ],
)
def test_update_that_is_not_finite_stops_the_run_and_says_what_is_kept(
  first, said, make_config, one_device, monkeypatch
):
  config, update = make_config({"checkpoint.every": 1}), epoch_lib.update_epoch
  save = checkpoint.RunCheckpoints.save
  only_first = lambda self, step, *rest, **how: step == 1 and save(self, step, *rest, **how)

  def broken(session, state, epoch, sampled):
    if epoch == first:
      sampled = dataclasses.replace(sampled, advantage=np.full_like(sampled.advantage, np.nan))
    return update(session, state, epoch, sampled)

  monkeypatch.setattr(epoch_lib, "update_epoch", broken)
  monkeypatch.setattr(checkpoint.RunCheckpoints, "save", only_first)
  with pytest.raises(ValueError, match=r"epoch \d: loss nan.*must be finite") as caught:
    loop.train(config)
  (note,) = caught.value.__notes__
  assert note.startswith(said)
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.steps() == [1] * (first > 0)


def test_other_prompts_in_the_same_folder_are_refused_on_resume(make_config, one_device, tmp_path):
  folder = tmp_path / "prompts"
  folder.mkdir()
  for split in ("train", "test"):
    (folder / f"{split}.txt").write_text("ANT\nBEE\nCAT\nDOG\n")
  fields = {"prompts.path": str(folder), "train.epochs": 1}
  loop.train(make_config(fields))
  (folder / "train.txt").write_text("ELK\nFOX\nGNU\nHEN\n")
  with pytest.raises(ValueError, match="its files .* have changed since the run"):
    loop.train(make_config(fields | {"train.epochs": 2}))


def test_other_weights_in_the_same_folder_are_refused_on_resume(
  make_config, small_model, one_device, tmp_path
):
  folder = tmp_path / "model"
  shutil.copytree(small_model, folder)
  fields = {"model.path": str(folder), "train.epochs": 1}
  loop.train(make_config(fields))
  weights = folder / "diffusion_pytorch_model.safetensors"
  content = bytearray(weights.read_bytes())
  content[-1] ^= 1
  weights.write_bytes(content)
  with pytest.raises(ValueError, match="model.path=.*its files .* have changed since the run"):
    loop.train(make_config(fields | {"train.epochs": 2}))


def test_prompt_that_the_model_cannot_read_is_refused_at_the_start(make_config, tmp_path):
  (tmp_path / "train.txt").write_text("ANT\nELEPHANT\n")
  (tmp_path / "test.txt").write_text("BEE\n")
  with pytest.raises(ValueError, match="prompt 'ELEPHANT': 8 bytes"):
    session_lib.open_session(make_config({"prompts.path": str(tmp_path)}))


def test_prompt_that_a_reward_cannot_score_is_refused_at_the_start(make_config, tmp_path):
  (tmp_path / "train.txt").write_text('ANT\nA ""\n')
  (tmp_path / "test.txt").write_text("BEE\n")
  config = make_config({"prompts.path": str(tmp_path), "rewards": {"ocr": 1.0}})
  with pytest.raises(ValueError, match="the text to render is empty"):
    session_lib.open_session(config)


def test_run_folder_of_another_config_is_refused_with_both_values(
  uninterrupted, make_config, one_device
):
  config = make_config({"run.dir": uninterrupted.run.dir, "loss.clip_range": 0.5})
  with pytest.raises(ValueError) as caught:
    loop.train(config)
  message = str(caught.value)
  assert f"run.dir={uninterrupted.run.dir!r}: this folder was made by another config" in message
  assert "loss.clip_range: the run has 1e-05, you ask for 0.5" in message
  assert "use another run.dir" in message


def test_every_program_is_compiled_once(make_config, one_device, caplog):
  """Over three epochs with drawn windows, which differ (see the next test)."""
  config = make_config({"seed": 1})
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    loop.train(config)
  lines = [record.getMessage() for record in caplog.records]
  for program in ("sample_microbatch", "train_step", "assign", "sample"):
    compiled = [line for line in lines if f"Finished XLA compilation of jit({program})" in line]
    assert len(compiled) == 1, program


def test_trajectories_of_an_epoch_are_gone_before_the_next_one_samples(
  make_config, one_device, monkeypatch
):
  made, alive = [], []
  sample = epoch_lib.sample_epoch

  def watched(*args):
    alive.extend(ref() for ref in made if ref() is not None)
    sampled = sample(*args)
    made.extend(weakref.ref(a) for t in sampled.rollout.transitions for a in (t.states, t.final))
    assert all(t.velocity is None for t in sampled.rollout.transitions)  # no loss reads it
    return sampled

  monkeypatch.setattr(epoch_lib, "sample_epoch", watched)
  loop.train(make_config())
  assert len(made) == 2 * CHUNKS * 3 and not alive


def test_windows_of_seed_one_differ_between_epochs(make_config):
  s = make_config().sampler
  rngs = [np.random.default_rng((1, epoch, 1)) for epoch in range(3)]
  windows = [schedule.draw_window(rng, s.window, s.window_range) for rng in rngs]
  assert windows == [(1, 3), (0, 2), (1, 3)]


RECIPE = """
from tpgrpo_jax import config as config_lib


def get_config():
  config = config_lib.to_config_dict(config_lib.Config())
  config.model.path = {model!r}
  config.prompts.name = "folder"
  config.prompts.path = {prompts!r}
  config.sampler.num_steps = 3
  config.sampler.window = (0, 2)
  config.credit.method = "flow_grpo"
  config.rewards = {{
    "jpeg_compressibility": 1.0,
    "coarse": {{"weight": 1.0, "make": "scripted_rewards:make"}},
  }}
  config.train.epochs = 2
  config.train.prompts_per_epoch = 2
  config.train.group_size = 4
  config.train.microbatch = 8
  config.train.updates_per_epoch = 1
  config.eval.num_steps = 2
  config.eval.prompts = 8
  config.checkpoint.every = 1
  return config
"""

# The real command, then what it has imported.
COMMAND = """
import json, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
try:
  runpy.run_module("tpgrpo_jax.train", run_name="__main__", alter_sys=True)
except SystemExit as exit:
  if exit.code:
    raise
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def recipe(small_model, prompt_folder, tmp_path_factory):
  path = tmp_path_factory.mktemp("recipe") / "recipe.py"
  path.write_text(RECIPE.format(model=str(small_model), prompts=str(prompt_folder)))
  return path


@pytest.fixture(scope="module")
def environment(prepared_folder):
  """Of the processes that train."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TFDS_DATA_DIR": str(prepared_folder),
    "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(HERE)]),
  }


@pytest.fixture(scope="module")
def command(recipe, environment):
  """Returns (run_dir, reward script, arguments) -> the finished process of the real training command."""

  def run(run_dir, reward="", arguments=()):
    given = ["--config", str(recipe), f"--config.run.dir={run_dir}", *arguments]
    return subprocess.run(
      [sys.executable, "-c", COMMAND, *given],
      env=environment | {scripted_rewards.VARIABLE: reward},
      capture_output=True,
      text=True,
      timeout=1800,
      check=False,
    )

  return run


@pytest.fixture(scope="module")
def whole_command(command, tmp_path_factory):
  """(run folder, finished process) of an uninterrupted run of the real command."""
  run_dir = tmp_path_factory.mktemp("command") / "run"
  done = command(run_dir)
  assert done.returncode == 0, done.stderr
  return run_dir, done


def test_training_never_imports_tensorflow_or_torch(whole_command):
  imported = json.loads(whole_command[1].stdout.splitlines()[-1])
  assert "jax" in imported
  assert not {"tensorflow", "torch"} & set(imported)


@pytest.mark.slow
def test_killed_command_started_again_equals_the_uninterrupted_one(
  command, whole_command, tmp_path
):
  run_dir = tmp_path / "run"
  killed = command(run_dir, "kill:2")  # in the second epoch; call 0 is the first evaluation
  assert killed.returncode == -9, killed.stderr
  resumed = command(run_dir)
  assert resumed.returncode == 0, resumed.stderr
  configs = []
  for folder in (run_dir, whole_command[0]):
    tree = json.loads((folder / "config.json").read_text())
    configs.append(config_lib.from_config_dict(config_lib.Config, tree))
  left_behind.assert_same_run(*configs)


@pytest.mark.exhaustive
def test_interrupted_command_saves_and_the_same_one_goes_on(command, whole_command, tmp_path):
  run_dir = tmp_path / "run"
  interrupted = command(run_dir, "interrupt:2")  # in the second epoch
  assert interrupted.returncode == 128 + signal.SIGINT, interrupted.stderr
  assert (
    "Ctrl-C: saves the finished epochs, if any, and ends. Once more: ends at once."
    in interrupted.stderr
  )
  assert "saved up to epoch 1. The same command goes on." in interrupted.stderr
  assert "Traceback" not in interrupted.stderr
  at_once = command(run_dir, "interrupt_twice:1")  # in the evaluation at the end
  assert at_once.returncode == 128 + signal.SIGINT, at_once.stderr
  assert "interrupted" in at_once.stderr and "Traceback" not in at_once.stderr
  resumed = command(run_dir)
  assert resumed.returncode == 0, resumed.stderr
  folders = (run_dir, whole_command[0])
  trees = [json.loads((folder / "config.json").read_text()) for folder in folders]
  left_behind.assert_same_run(
    *(config_lib.from_config_dict(config_lib.Config, tree) for tree in trees)
  )


# The real command in a terminal. It says when the moment has come, and gives the user a second to type.
AT_A_TERMINAL = """
import fcntl, os, runpy, signal, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
moment = sys.argv.pop()

from jax import monitoring
import scripted_rewards
from tpgrpo_jax.runs import checkpoint
from tpgrpo_jax.training import batches, progress

said = []

def say(name):
  if name == moment and not said:
    said.append(name)
    os.write(1, f"@{name}@".encode())
    time.sleep(1.5)

def before(owner, attribute, name):
  function = getattr(owner, attribute)
  def run(*args, **kwargs):
    say(name(*args))
    return function(*args, **kwargs)
  setattr(owner, attribute, run)

before(progress.Bar, "advance", lambda bar, count: bar._name)  # the rollout, between two microbatches
before(batches, "split_updates", lambda *_: "update")

def under_way(event, seconds, **kwargs):  # lowered, and not compiled yet
  if event.endswith("jaxpr_to_mlir_module_duration") and "train_step" in str(kwargs):
    say("compiling")

monitoring.register_event_duration_secs_listener(under_way)
save = checkpoint.RunCheckpoints.save

def saving(*args, **kwargs):
  if begun := save(*args, **kwargs):
    say("saving")  # while it is written
  return begun

checkpoint.RunCheckpoints.save = saving
make = scripted_rewards.make

def scoring():
  reward = make()
  def call(*args):
    say("reward")
    return reward(*args)
  return call

scripted_rewards.make = scoring
runpy.run_module("tpgrpo_jax.train", run_name="__main__", alter_sys=True)
"""


def press_ctrl_c(arguments, environment, moment):
  """(status, what the terminal showed) of the command, at which Ctrl-C is typed at that moment."""
  ours, theirs = os.openpty()
  termios.tcsetwinsize(theirs, (24, 120))
  process = subprocess.Popen(
    [sys.executable, "-c", AT_A_TERMINAL, *arguments, moment],
    stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
  )  # fmt: skip
  os.close(theirs)
  shown, typed, end = b"", False, time.monotonic() + 1800
  try:
    while time.monotonic() < end:
      if not select.select([ours], [], [], 1.0)[0]:
        continue
      try:
        shown += os.read(ours, 4096)
      except OSError:  # the terminal is closed: the process has ended
        break
      if not typed and f"@{moment}@".encode() in shown:
        typed = True
        os.write(ours, b"\x03")
    return process.wait(timeout=60), shown.decode()
  finally:
    process.kill()
    process.wait()
    os.close(ours)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_at_any_moment_saves_and_the_same_command_goes_on(
  command, recipe, environment, tmp_path
):
  longer = ["--config.train.epochs=4", "--config.checkpoint.every=3"]
  whole = command(tmp_path / "whole", arguments=longer)
  assert whole.returncode == 0, whole.stderr
  run_dir = tmp_path / "run"
  arguments = ["--config", str(recipe), f"--config.run.dir={run_dir}", *longer]
  moments = {
    "compiling": 1,
    "rollout": 1,
    "reward": 1,
    "update": 2,
    "saving": 3,
  }  # epochs that are kept
  for moment, kept in moments.items():
    status, shown = press_ctrl_c(arguments, environment, moment)
    assert status == 128 + signal.SIGINT, shown
    assert f"@{moment}@" in shown and "Traceback" not in shown, shown
    assert "Ctrl-C: saves the finished epochs, if any, and ends." in shown, shown
    assert f"saved up to epoch {kept}. The same command goes on." in shown, shown
    with checkpoint.RunCheckpoints(run_dir, read_only=True) as checkpoints:
      assert checkpoints.latest() == kept, moment
  done = command(run_dir, arguments=longer)
  assert done.returncode == 0, done.stderr
  trees = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("run", "whole")]
  left_behind.assert_same_run(
    *(config_lib.from_config_dict(config_lib.Config, tree) for tree in trees)
  )
