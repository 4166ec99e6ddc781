"""A run in a bucket is the run in a folder: against a server that speaks Cloud Storage's own protocol."""

import os
import socket

from etils import epath
import left_behind
import pytest
import scripted_rewards
from test_loop import CHUNKS, ONE_TRY

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.config import rules
from tpgrpo_jax.reporting import history
from tpgrpo_jax.runs import checkpoint, run_folder
from tpgrpo_jax.training import loop, restore
from tpgrpo_jax.training import mesh as mesh_lib


@pytest.fixture(scope="module")
def bucket():
  """The name of an empty bucket, of which every library in this process knows."""
  server_lib = pytest.importorskip("gcp_storage_emulator.server")
  pytest.importorskip("gcsfs")
  with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
  address = f"http://127.0.0.1:{port}"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", address)  # gcsfs, google-cloud-storage
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    patch.setenv(
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
    )  # asks Google's servers for the kind of bucket
    with server_lib.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
      yield "gs://bucket"


@pytest.fixture(scope="module")
def in_folder(config_in, single_mesh, tmp_path_factory):
  """The config of a finished run in a folder."""
  config = config_in(tmp_path_factory.mktemp("in_folder") / "run", {"log.images_every": 1})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    loop.train(config)
  return config


@pytest.mark.slow
def test_run_in_a_bucket_cut_and_resumed_equals_the_one_in_a_folder(
  bucket, in_folder, config_in, one_device, monkeypatch, capsys
):
  run_dir = f"{bucket}/runs/cut"
  config = config_in(run_dir, ONE_TRY | {"log.images_every": 1})
  monkeypatch.setenv(scripted_rewards.VARIABLE, f"raise:{1 + CHUNKS + 2}")  # in the second epoch
  with pytest.raises(rewards.RewardError, match="the reward server is gone"):
    loop.train(config)
  monkeypatch.setenv(scripted_rewards.VARIABLE, "")
  loop.train(config)
  left_behind.assert_same_run(config, in_folder)
  for folder in ("images", "rollouts"):
    names = [[p.name for p in epath.Path(c.run.dir, folder).iterdir()] for c in (config, in_folder)]
    assert sorted(names[0]) == sorted(names[1])
  assert not os.path.exists("gs:")  # which a path of pathlib's would make


@pytest.mark.slow
def test_checkpoint_that_was_not_finished_in_a_bucket_is_passed_over(
  bucket, in_folder, config_in, one_device
):
  config = config_in(f"{bucket}/runs/half")
  loop.train(config)
  (epath.Path(config.run.dir) / "checkpoints" / "3" / "commit_success.txt").unlink()
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.latest() == 2
  loop.train(config)
  left_behind.assert_same_run(config, in_folder)


@pytest.mark.slow
def test_commands_read_runs_in_buckets(bucket, config_in, one_device, tmp_path, capsys):
  run_dir = f"{bucket}/runs/read"
  loop.train(config_in(run_dir, {"train.epochs": 1}))
  assert history.load_run_config(run_dir).run.dir == run_dir
  opened = restore.open_model(
    history.load_run_config(run_dir), run_dir, prompts=["ANT"], weights="last"
  )
  assert "after epoch 1" in opened.name
  (run,) = history.load_runs([run_dir])["tp_grpo"]
  assert [row["epoch"] for row in run.evals] == [0, 1]
  assert len(history.sample_grids(run)) == 2


@pytest.mark.parametrize(
  "run_dir", ["gs://", "gs://bucket", "gs://bucket/", "s3://bucket/run", "http://host/run"]
)
def test_address_that_is_no_folder_of_a_bucket_is_refused(run_dir):
  config = config_lib.Config(run=config_lib.Run(dir=run_dir))
  with pytest.raises(ValueError, match=r"run\.dir=.*: must be a folder, or gs://bucket/folder"):
    rules.validate(config)


def test_bucket_that_does_not_exist_is_named(bucket, config_in):
  with pytest.raises(ValueError, match=r"run\.dir='gs://nowhere/run': cannot be written to"):
    loop.train(config_in("gs://nowhere/run"))


def test_missing_library_is_named(config_in, monkeypatch):
  def missing(*unused):
    raise ImportError("no gcsfs")

  monkeypatch.setattr(run_folder, "write", missing)
  with pytest.raises(ValueError, match=r"run\.dir=.*gcsfs is missing.*pip install"):
    loop.train(config_in("gs://bucket/run"))
