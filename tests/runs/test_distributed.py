"""Who has peers waits for them; who has none needs no coordinator."""

import os
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


OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture
def called(monkeypatch):
  """The options of each call of jax.distributed.initialize, which does nothing here."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
  monkeypatch.setattr(distributed.signal, "signal", lambda *_: None)
  return calls


def set_environment(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, str(value))


def test_steps_of_one_slurm_job_have_ports_of_their_own(monkeypatch, called):
  """An evaluation by srun beside a training would join the training's processes."""
  found = {}
  for step in (0, 1, 2):
    set_environment(monkeypatch, SLURM | {"SLURM_NTASKS": 2, "SLURM_STEP_ID": step})
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "")  # restored afterwards
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    for process in (0, 1):
      monkeypatch.setenv("SLURM_PROCID", str(process))
      distributed.initialize(config_lib.Distributed())
      found.setdefault(step, set()).add(os.environ["JAX_COORDINATOR_PORT"])
  assert found[0] == {str(65535 - 4096 + 1 + 12)}  # JAX's own, of job 12
  assert all(len(ports) == 1 for ports in found.values())
  assert len(set.union(*found.values())) == 3 and len(called) == 6
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "7000")
  distributed.initialize(config_lib.Distributed())
  assert os.environ["JAX_COORDINATOR_PORT"] == "7000"


@pytest.mark.parametrize("size, joins", [(1, False), (2, True)])
def test_process_that_open_mpi_started_alone_takes_no_coordinators_port(
  monkeypatch, called, size, joins
):
  set_environment(monkeypatch, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": size})
  distributed.initialize(config_lib.Distributed())
  assert bool(called) == joins


def test_two_runs_of_one_mpirun_are_told_that_the_port_is_taken(monkeypatch, called):
  set_environment(monkeypatch, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": 2})
  # JAX makes the port of the job's number: 1531576320 / 4096 = 373920, and 373920 % 4096 = 1184.
  port = 65535 - 4096 + 1 + 1184
  with socket.create_server(("", port)):
    with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}.*port is taken.*COORDINATOR_PORT"):
      distributed.initialize(config_lib.Distributed())
    distributed.initialize(config_lib.Distributed(coordinator="off"))
    assert not called
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "0")  # any that is free
    distributed.initialize(config_lib.Distributed())
    assert len(called) == 1


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_whose_peers_jax_cannot_find_do_not_train_a_run_each(monkeypatch, called, name):
  """MPICH sets no address that JAX reads, and Open MPI one that not every version has."""
  monkeypatch.setenv(name, "4")
  with pytest.raises(RuntimeError, match=f"{name}=4.*with 3 others.*distributed.coordinator=off"):
    distributed.initialize(config_lib.Distributed())
  distributed.initialize(config_lib.Distributed(coordinator="off"))
  monkeypatch.setenv(name, "1")
  distributed.initialize(config_lib.Distributed())
  assert not called
