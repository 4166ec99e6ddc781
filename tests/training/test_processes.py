"""Runs of several processes of this machine: the same as one process, and nobody waits for the dead."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import left_behind
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import bridge
from tpgrpo_jax.runs import checkpoint, distributed
from tpgrpo_jax.training import loop
from tpgrpo_jax.training import mesh as mesh_lib

HERE = pathlib.Path(__file__).parent
RECIPE = """
import json
import pathlib
from tpgrpo_jax import config as config_lib


def get_config():
  tree = json.loads(pathlib.Path({path!r}).read_text())
  return config_lib.to_config_dict(config_lib.from_config_dict(config_lib.Config, tree))
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def here():
  """The environment of a command."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
  }


def start(config, count, module="train", arguments=(), alone=False):
  """The real command in `count` processes of one device each; alone is told of no coordinator."""
  run_dir = pathlib.Path(config.run.dir)
  run_dir.parent.mkdir(exist_ok=True, parents=True)
  described = run_dir.with_suffix(".json")
  described.write_text(json.dumps(dataclasses.asdict(config)))
  recipe = run_dir.with_suffix(".py")
  recipe.write_text(RECIPE.format(path=str(described)))
  address = f"localhost:{free_port()}"
  command = [sys.executable, "-m", f"tpgrpo_jax.{module}", "--config", str(recipe)]
  peers = [
    f"--config.distributed.coordinator={address}",
    f"--config.distributed.num_processes={count}",
  ]
  return [
    subprocess.Popen(
      [*command, *([] if alone else [*peers, f"--config.distributed.process_id={i}"]), *arguments],
      env=here(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for i in range(count)
  ]  # fmt: skip


def finish(processes, timeout=300):
  """Their outputs; fails unless all end well."""
  outputs = [p.communicate(timeout=timeout)[0] for p in processes]
  assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(outputs)[-4000:]
  return outputs


def assert_close(found, wanted):
  rows, expected = left_behind.rows(found), left_behind.rows(wanted)
  assert [(r["kind"], r["epoch"]) for r in rows] == [(r["kind"], r["epoch"]) for r in expected]
  for row, other in zip(rows, expected):
    assert row.keys() == other.keys()
    for name in row.keys() - {"kind"}:
      # Of a log-ratio that is exactly 0 on one mesh, rounding may remain on another.
      np.testing.assert_allclose(row[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
  (a, _), (b, _) = left_behind.final_state(found), left_behind.final_state(wanted)
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5, err_msg=name)


FIELDS = {
  "train.epochs": 2,
  "optimizer.eps": 1e-3,  # Adam divides by it: rounding of gradients near 0 stays rounding
  "loss.clip_range": 0.5,  # no ratio near it, where rounding would decide
  "distributed.timeout": 120,
}


@pytest.fixture(scope="module")
def one(config_in, single_mesh, tmp_path_factory):
  """A finished run of one process on one device."""
  config = config_in(tmp_path_factory.mktemp("one") / "run", FIELDS)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    loop.train(config)
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  "count, mesh",
  [
    *(
      pytest.param(2, config_lib.Mesh(*shape), marks=pytest.mark.exhaustive)
      for shape in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
    ),
    (4, config_lib.Mesh(1, 2, 2)),  # two processes share data in the tests below
  ],
)
def test_several_processes_learn_what_one_does(one, config_in, one_device, tmp_path, count, mesh):
  config = config_in(tmp_path / "run", FIELDS | {"mesh": mesh})
  outputs = finish(start(config, count))
  assert sum("To see it:" in output for output in outputs) == 1  # one speaks for all
  assert_close(config, one)


@pytest.mark.slow
def test_rewards_of_the_devices_are_those_of_one_process_too(config_in, one_device, tmp_path):
  sys.path.append(str(HERE.parent / "rewards"))
  import stored_models

  pick = stored_models.write_folder(stored_models.load(), "clip_h", tmp_path / "pick")
  # This model's scores are of size 10, where the bound below is for numbers of size 1. Beside them stands a
  # reward of the host that a pixel's last bit does not change, as it may a JPEG's length.
  coarse = {"weight": 0.1, "make": "scripted_rewards:make"}
  rewards = {"pickscore": {"weight": 0.1, "path": str(pick)}, "coarse": coarse}
  fields = FIELDS | {"rewards": rewards, "train.epochs": 1, "eval.prompts": 1}
  single = config_in(tmp_path / "single", fields)
  loop.train(single)
  config = config_in(tmp_path / "run", fields | {"mesh": config_lib.Mesh(2, 1, 1)})
  finish(start(config, 2))
  assert_close(config, single)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(one, config_in, one_device, tmp_path):
  begun = config_in(tmp_path / "run", FIELDS | {"train.epochs": 1})
  loop.train(begun)
  config = config_in(tmp_path / "run", FIELDS | {"mesh": config_lib.Mesh(2, 1, 1)})
  finish(start(config, 2))
  assert_close(config, one)


@pytest.mark.parametrize(
  "module, arguments, file",
  [
    pytest.param("evaluate", ("--prompts=7",), "evaluation.json", marks=pytest.mark.slow),
    pytest.param("sample", ("ANT", "BEE"), "0001_BEE.png", marks=pytest.mark.exhaustive),
  ],
)
def test_two_processes_look_at_a_model_as_one_does(config_in, tmp_path, module, arguments, file):
  files = []
  for count, mesh in ((1, config_lib.Mesh()), (2, config_lib.Mesh(1, 2, 1))):
    output = tmp_path / str(count)
    config = config_in(tmp_path / f"run{count}", FIELDS | {"mesh": mesh})
    outputs = finish(start(config, count, module, [*arguments, f"--output={output}"]))
    assert sum(str(output) in text for text in outputs) == 1  # one speaks for all
    files.append((output / file).read_bytes())
  assert files[0] == files[1]


@pytest.mark.slow
def test_where_one_of_two_is_killed_the_other_ends_and_the_run_goes_on(
  one, config_in, one_device, tmp_path
):
  fields = FIELDS | {"mesh": config_lib.Mesh(2, 1, 1), "distributed.heartbeat_timeout": 10}
  config = config_in(tmp_path / "run", fields)
  processes = start(config, 2)
  deadline = time.monotonic() + 120
  while not rows_exist(config) and time.monotonic() < deadline:
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGKILL)
  began = time.monotonic()
  output, _ = processes[0].communicate(timeout=60)
  assert processes[0].returncode != 0, output[-2000:]
  assert (
    time.monotonic() - began < 45
  )  # the heartbeat's 10 s, and the end of a process on a busy machine
  processes[1].communicate()
  finish(start(config, 2))
  assert_close(config, one)


def rows_exist(config):
  path = pathlib.Path(config.run.dir) / "metrics.jsonl"
  return path.is_file() and path.stat().st_size > 0


@pytest.mark.parametrize(
  "rewards",
  [
    pytest.param("", marks=pytest.mark.slow),
    pytest.param("hang_in_first:4", marks=pytest.mark.exhaustive),
  ],
)
def test_a_signal_to_end_one_process_ends_all_with_a_checkpoint(
  one, config_in, one_device, tmp_path, monkeypatch, rewards
):
  fields = FIELDS | {"mesh": config_lib.Mesh(2, 1, 1), "checkpoint.every": 10}
  config = config_in(tmp_path / "run", fields | {"train.epochs": 500})
  monkeypatch.setenv("SCRIPTED_REWARD", rewards)  # calls 4 and 5 are of the second epoch
  processes = start(config, 2)
  deadline = time.monotonic() + 120
  while (
    len(left_behind.rows(config) if rows_exist(config) else []) < 3 and time.monotonic() < deadline
  ):
    time.sleep(0.1)
  time.sleep(2 * bool(rewards))  # until it hangs
  processes[1].send_signal(signal.SIGTERM)
  began = time.monotonic()
  outputs = [p.communicate(timeout=60)[0] for p in processes]
  assert time.monotonic() - began < 60
  assert [p.returncode for p in processes] == [143, 143], "\n".join(outputs)[-3000:]
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as kept:
    assert kept.latest() >= 1


def test_signals_before_the_first_epoch_end_processes(config_in, tmp_path):
  fields = FIELDS | {"mesh": config_lib.Mesh(2, 1, 1), "train.epochs": 500}
  config = config_in(tmp_path / "run", fields)
  processes = start(config, 2)
  deadline = time.monotonic() + 120
  while not (tmp_path / "run" / ".lock").exists() and time.monotonic() < deadline:
    time.sleep(0.01)
  for process in processes:  # JAX has met its peers, and nothing is trained yet
    process.send_signal(signal.SIGTERM)
  outputs = [p.communicate(timeout=60)[0] for p in processes]
  assert {p.returncode for p in processes} <= {143, -15}, "\n".join(outputs)[-3000:]


def test_processes_of_different_configs_are_refused(monkeypatch):
  monkeypatch.setattr(distributed.processes, "sum_over", lambda flags: flags)
  base = config_lib.Config()
  fields = json.loads(json.dumps(bridge.flatten(dataclasses.asdict(base))))
  first = {k: v for k, v in fields.items() if not k.startswith(distributed._OF_A_MACHINE)}
  monkeypatch.setattr(distributed.processes, "from_first", lambda _: first)
  elsewhere = config_lib.Distributed("host:1", 2, 1)
  distributed._check_same(dataclasses.replace(base, distributed=elsewhere))
  with pytest.raises(ValueError, match="seed: process 0 has 0, process 0 has 7"):
    distributed._check_same(dataclasses.replace(base, seed=7))


@pytest.mark.slow
def test_a_run_folder_that_is_refused_ends_all_processes_with_its_message(one, config_in, tmp_path):
  (tmp_path / "run").write_text("a file")
  config = config_in(tmp_path / "run", FIELDS | {"mesh": config_lib.Mesh(2, 1, 1)})
  processes = start(config, 2)
  for process in processes:
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "is a file; must be a folder" in output, output[-2000:]


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(RuntimeError, match=r"distributed\.coordinator=.*port is taken"):
      distributed.initialize(config_lib.Distributed(f"localhost:{port}", 2, 0, timeout=3))


def test_a_coordinator_that_does_not_answer_is_named(tmp_path):
  script = (
    "from tpgrpo_jax import config; from tpgrpo_jax.runs import distributed\n"
    f"d = config.Distributed('localhost:{free_port()}', 2, 1, timeout=3)\n"
    "distributed.initialize(d)"
  )
  began = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])},
  )  # fmt: skip
  assert done.returncode != 0
  assert "distributed.timeout=3 s" in done.stderr, done.stderr[-3000:]
  assert time.monotonic() - began < 60


def test_one_process_needs_no_others(monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", None)
  distributed.initialize(config_lib.Distributed())
  distributed.initialize(config_lib.Distributed("off"))


@pytest.mark.slow
def test_runs_side_by_side_in_one_slurm_job_do_not_meet(config_in, tmp_path, monkeypatch):
  """Two seeds, and an evaluation of one while the other trains: each a process that SLURM started alone."""
  slurm = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
  }
  for name, value in slurm.items():
    monkeypatch.setenv(name, value)
  fields = {"train.epochs": 1, "eval.every": 0}
  configs = [config_in(tmp_path / f"seed{seed}", fields | {"seed": seed}) for seed in (0, 1)]
  both = [start(config, 1, alone=True)[0] for config in configs]
  finish(both)
  longer = config_in(tmp_path / "seed1", fields | {"seed": 1, "train.epochs": 3})
  evaluation = ["--run", str(tmp_path / "seed0"), "--prompts=2", f"--output={tmp_path / 'beside'}"]
  (training,) = start(longer, 1, alone=True)
  beside = subprocess.Popen(
    [sys.executable, "-m", "tpgrpo_jax.evaluate", *evaluation], env=here(),
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
  )  # fmt: skip
  finish([training, beside])
  assert left_behind.rows(longer)[-1]["epoch"] == 3
