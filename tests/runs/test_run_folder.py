"""A run folder belongs to one run, and says which; its rows are those of finished epochs."""

import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import run_folder

CONFIG = config_lib.Config(rewards={"ocr": 1.0})


def replaced(field, **changes):
  group = dataclasses.replace(getattr(CONFIG, field), **changes)
  return dataclasses.replace(CONFIG, **{field: group})


def test_config_is_written_for_people_to_read(tmp_path):
  run_folder.save_config(tmp_path / "new", CONFIG)
  text = (tmp_path / "new" / "config.json").read_text()
  assert json.loads(text)["sampler"]["window"] == [0, 9]
  assert '\n    "learning_rate": 0.0003,\n' in text
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def save_trained(folder, config):
  """What a run with one checkpoint leaves, as far as its config is concerned."""
  run_folder.save_config(folder, config)
  (folder / "checkpoints" / "1").mkdir(parents=True)


def test_same_config_and_new_folder_pass(tmp_path):
  run_folder.check_config(tmp_path, CONFIG)
  save_trained(tmp_path, CONFIG)
  run_folder.check_config(tmp_path, CONFIG)


def test_folder_without_a_checkpoint_binds_nobody(tmp_path):
  run_folder.save_config(tmp_path, CONFIG)
  (tmp_path / "checkpoints").mkdir()
  run_folder.check_config(tmp_path, dataclasses.replace(CONFIG, seed=7))


def test_other_config_is_refused_field_by_field(tmp_path):
  save_trained(tmp_path, CONFIG)
  asked = replaced("optimizer", learning_rate=0.001)
  asked = dataclasses.replace(asked, seed=1, rewards={"jpeg": 2.0})
  with pytest.raises(ValueError) as error:
    run_folder.check_config(tmp_path, asked)
  message = str(error.value)
  assert "optimizer.learning_rate: the run has 0.0003, you ask for 0.001" in message
  assert "seed: the run has 0, you ask for 1" in message
  assert "rewards.ocr: the run has 1.0, you do not set it" in message
  assert "rewards.jpeg: the run has no such field, you ask for 2.0" in message
  assert "another run.dir" in message
  assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
  "field,changes",
  [
    ("run", {"dir": "elsewhere"}),
    ("train", {"epochs": 999}),
    ("eval", {"every": 1, "num_steps": 3, "prompts": 5, "batch": 7}),
    ("log", {"wandb": True}),
    ("checkpoint", {"every": 1, "keep": 9}),
    ("mesh", {"fsdp": 8}),
  ],
)
def test_fields_that_change_no_result_may_differ(tmp_path, field, changes):
  save_trained(tmp_path, CONFIG)
  run_folder.check_config(tmp_path, replaced(field, **changes))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_other_length_is_refused_where_the_learning_rate_falls_towards_the_last_epoch(
  tmp_path, schedule
):
  falling = replaced("optimizer", schedule=schedule)
  save_trained(tmp_path, falling)
  run_folder.check_config(tmp_path, falling)
  longer = dataclasses.replace(falling, train=dataclasses.replace(falling.train, epochs=999))
  with pytest.raises(ValueError) as error:
    run_folder.check_config(tmp_path, longer)
  assert (
    f"train.epochs: the run has 100, you ask for 999; optimizer.schedule={schedule!r} falls until then"
    in str(error.value)
  )


def test_damaged_config_is_named(tmp_path):
  save_trained(tmp_path, CONFIG)
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
    run_folder.check_config(tmp_path, CONFIG)


def write_rows(path, epochs, tail=""):
  path.write_text("".join(json.dumps({"epoch": e, "reward": 0.5}) + "\n" for e in epochs) + tail)
  return path


def epochs_of(path):
  return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
  path = write_rows(tmp_path / "metrics.jsonl", [0, 1, 1, 2, 3])
  assert run_folder.truncate_metrics(path, 2) == 2
  assert epochs_of(path) == [0, 1, 1]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"epoch": 1, "rew', '{"epoch": ', "{", '"\xe9', "[1]", "\x00"])
def test_half_written_last_row_is_dropped(tmp_path, tail):
  path = write_rows(tmp_path / "metrics.jsonl", [0, 1], tail)
  assert run_folder.truncate_metrics(path, 5) == 1
  assert epochs_of(path) == [0, 1]


def test_kept_rows_keep_their_bytes(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"epoch":0,  "note": "\u00e9", "loss": NaN}\n{"epoch": 1}')
  run_folder.truncate_metrics(path, 2)
  assert path.read_text() == '{"epoch":0,  "note": "\u00e9", "loss": NaN}\n{"epoch": 1}\n'


def test_missing_metrics_file_is_no_error(tmp_path):
  assert run_folder.truncate_metrics(tmp_path / "metrics.jsonl", 0) == 0
  with pytest.warns(UserWarning, match="is missing; the rows of the finished epochs are lost"):
    assert run_folder.truncate_metrics(tmp_path / "metrics.jsonl", 3) == 0
  assert not (tmp_path / "metrics.jsonl").exists()


def test_damaged_rows_are_named(tmp_path):
  path = write_rows(tmp_path / "metrics.jsonl", [0], "garbage\n" + '{"epoch": 2}\n')
  with pytest.warns(UserWarning, match=r"rows \[2\] cannot be read"):
    run_folder.truncate_metrics(path, 5)
  assert epochs_of(path) == [0, 2]


def test_checkpoints_without_a_config_are_refused(tmp_path):
  save_trained(tmp_path, CONFIG)
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match=r"config\.json: is missing, .*another run\.dir"):
    run_folder.check_config(tmp_path, CONFIG)


def test_full_disk_is_named():
  with pytest.raises(ValueError, match=r"run\.dir='mine': No space left.*Make room"):
    with run_folder.named_errors("mine"), open("/dev/full", "w") as file:
      file.write("row")
      file.flush()
  with pytest.raises(FileNotFoundError), run_folder.named_errors("mine"):
    open("nowhere/at/all")


def test_a_second_run_in_the_folder_is_refused_and_the_first_one_named(tmp_path):
  hold = (
    "from tpgrpo_jax.runs import run_folder\nwith run_folder.hold('run'): print('held'), input()"
  )
  pipe = subprocess.PIPE
  first = subprocess.Popen(
      [sys.executable, "-c", hold], cwd=tmp_path, stdin=pipe, stdout=pipe, text=True,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )  # fmt: skip
  assert first.stdout.readline() == "held\n"
  with pytest.raises(ValueError, match=f"process {first.pid} on .* is training in it"):
    with run_folder.hold(tmp_path / "run"):
      pass
  first.kill()
  first.communicate()
  with run_folder.hold(tmp_path / "run"):
    pass


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_in_the_folders_place_is_named(tmp_path, path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="run.dir=.* is a file; must be a folder"):
    with run_folder.hold(tmp_path / path):
      pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
  (tmp_path / "closed").mkdir(mode=0o500)
  with pytest.raises(ValueError, match="run.dir=.*cannot be written to .*another run.dir"):
    with run_folder.hold(tmp_path / "closed"):
      pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_file_system_without_locks_is_warned_of_and_used(tmp_path, monkeypatch, number):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", flock)
  with pytest.warns(UserWarning, match="has no locks"), run_folder.hold(tmp_path / "run"):
    assert (tmp_path / "run" / ".lock").is_file()


def test_a_run_cannot_be_made_shorter_than_it_is(tmp_path):
  for epochs, finished in ((13, 13), (14, 13), (5, None)):
    run_folder.check_length(tmp_path, epochs, finished)
  with pytest.raises(ValueError, match="train.epochs=5: the run in .* has finished 13"):
    run_folder.check_length(tmp_path, 5, 13)
