"""Who has peers waits for them; who has none needs no coordinator."""

import socket

import jax
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import distributed

SLURM = {
  "SLURM_JOB_ID": "12",
  "SLURM_STEP_NODELIST": "node1",
  "SLURM_PROCID": "0",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NUM_NODES": "1",
}


@pytest.mark.parametrize("tasks, joins", [(1, False), (2, True)])
def test_process_that_slurm_started_alone_takes_no_coordinators_port(monkeypatch, tasks, joins):
  for name, value in (SLURM | {"SLURM_NTASKS": str(tasks)}).items():
    monkeypatch.setenv(name, value)
  called = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: called.append(options))
  monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
  distributed.initialize(config_lib.Distributed())
  assert bool(called) == joins


def test_two_runs_in_one_slurm_job_are_told_that_the_port_is_taken(monkeypatch):
  """JAX makes the port of the job's number, and would end with a stack trace of its own C++."""
  for name, value in (SLURM | {"SLURM_NTASKS": "2"}).items():
    monkeypatch.setenv(name, value)
  called = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: called.append(options))
  monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
  with socket.create_server(("", 0)) as taken:
    monkeypatch.setenv("JAX_COORDINATOR_PORT", str(taken.getsockname()[1]))
    with pytest.raises(RuntimeError, match="node1:.*port is taken.*JAX_COORDINATOR_PORT"):
      distributed.initialize(config_lib.Distributed())
    monkeypatch.setenv("SLURM_PROCID", "1")  # the others only call it
    distributed.initialize(config_lib.Distributed())
  assert len(called) == 1
