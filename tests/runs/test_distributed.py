"""Who has peers waits for them; who has none needs no coordinator."""

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
