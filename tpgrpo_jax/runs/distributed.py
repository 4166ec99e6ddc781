"""What is set up once a process: JAX's multi-controller runtime, the cache of compiled programs."""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from typing import Any
import warnings

import jax
import numpy as np

from tpgrpo_jax import caches
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import bridge
from tpgrpo_jax.runs import processes

_OF_A_MACHINE = (
  "distributed.",
  "run.programs",
  "text.cache",
  "prompts.cache",
)  # may differ between processes

# How many processes a launcher has started: Open MPI's, and that of MPICH and Intel MPI.
_PEERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

_BY_ENVIRONMENT = ("SlurmCluster", "OmpiCluster")  # whose address is in the environment


def set_up(config: config_lib.Config) -> None:
  """What every command does before anything is computed.

  Raises:
    RuntimeError: as `initialize`.
    ValueError: the processes were started with different configs.
  """
  jax.config.update(
    "jax_enable_x64", False
  )  # whatever the environment says: all is made for float32
  initialize(config.distributed)
  share_programs(config.run.programs)
  if jax.process_count() > 1:
    _check_same(config)


def _check_same(config):
  fields = bridge.flatten(json.loads(json.dumps(dataclasses.asdict(config))))
  own = {k: v for k, v in fields.items() if not k.startswith(_OF_A_MACHINE)}
  first = processes.from_first(own)
  lines = [
    f"  {name}: process 0 has {first.get(name)!r}, process {jax.process_index()} has {own.get(name)!r}"
    for name in first | own
    if first.get(name) != own.get(name)
  ]
  if processes.sum_over(np.asarray([bool(lines)], np.int32))[0]:
    raise ValueError(
      "the processes of this run were started with different configs:\n"
      + ("\n".join(lines) or "  (the message of another process names the fields)")
      + "\nGive all of them the same command, but for distributed.process_id."
    )


def initialize(config: config_lib.Distributed) -> None:
  """Joins the other processes of this run; does nothing for a run of one process.

  Must come before anything is computed. Under SLURM, Open MPI, an indexed Kubernetes job and on Cloud TPU
  JAX finds its peers by itself. Where processes are missing after `timeout`, JAX ends this one.

  Raises:
    RuntimeError: nobody answers at the coordinator's address, or its port is taken; or a launcher has
      started peers of which JAX knows nothing.
  """
  if config.coordinator == "off" or (config.coordinator == "auto" and not _in_cluster()):
    if config.coordinator == "auto":
      _check_alone()
    return
  explicit: dict[str, Any] = {}
  _part_steps()
  if config.coordinator != "auto":
    explicit = dict(
      coordinator_address=config.coordinator,
      num_processes=config.num_processes,
      process_id=config.process_id,
    )
    # JAX would end the process in a check of its own C++, with a stack trace.
    if config.process_id != 0:
      _wait_for(config)
    else:
      _check_free(config.coordinator, "Name another port to all processes")
      others = config.num_processes - 1
      if others:
        print(
          f"distributed.coordinator={config.coordinator}: waits for {others} more processes, "
          f"{config.timeout} s at most.",
          file=sys.stderr,
        )
  elif address := _address_of_first():
    _check_free(address, "Set JAX_COORDINATOR_PORT to another one for all processes of one run")
  jax.distributed.initialize(
    initialization_timeout=config.timeout,
    heartbeat_timeout_seconds=config.heartbeat_timeout,
    **explicit,
  )
  # JAX has taken SIGTERM, to have a checkpoint saved, and would not end. Until training takes it, there is
  # nothing to save (runs.preemption).
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _part_steps():
  """Gives every step of a SLURM job a port of its own; JAX makes it of the job's number alone.

  Else the processes of one srun would join those of another in the same job.
  """
  job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
  if job.isdecimal() and step.isdecimal():
    first, count = 65535 - 2**12 + 1, 2**12  # JAX's range; the first step keeps JAX's port
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(first + (int(job) + 31 * int(step)) % count))


def _check_alone():
  """Without it every process would train a run of its own, or be refused by the first one's lock."""
  for name in _PEERS if _cluster() is None else ():
    count = os.environ.get(name, "")
    if count.isdecimal() and int(count) > 1:
      raise RuntimeError(
        f"{name}={count}: this process was started with {int(count) - 1} others, and JAX does not see how "
        "to reach them. Set distributed.coordinator (host:port of the first one), num_processes and "
        "process_id; or distributed.coordinator=off, where each works for itself."
      )


def _check_free(coordinator, remedy):
  """JAX would crash where another program listens at process 0's own port."""
  port = int(coordinator.rpartition(":")[2])
  try:
    socket.create_server(("", port)).close()
  except OSError as error:
    raise RuntimeError(
      f"distributed.coordinator={coordinator!r}: its port is taken on this machine "
      f"({error.strerror}). {remedy}, or end what holds it."
    ) from error


def _wait_for(config):
  """Returns when something listens at the coordinator's address."""
  host, _, port = config.coordinator.rpartition(":")
  deadline = time.monotonic() + config.timeout
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=2).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise RuntimeError(
          f"distributed.coordinator={config.coordinator!r}: no answer within "
          f"distributed.timeout={config.timeout} s ({error}). Check the address, that its port is open, "
          "and that process 0 was started."
        ) from error
      time.sleep(0.5)


def share_programs(folder: str) -> None:
  """Keeps compiled programs on disk for later runs, as `config.Run.programs` says."""
  if folder == "off" or (not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
    return
  chosen = caches.place("programs", folder)
  try:
    caches.check_writable("compiled programs", chosen, "run.programs")
  except ValueError as error:  # a run does without, and compiles everything anew
    warnings.warn(f"{error} Until then every start compiles everything.", stacklevel=2)
    return
  jax.config.update("jax_compilation_cache_dir", os.fspath(chosen))


def _in_cluster():
  """Whether a scheduler that JAX knows started this process among others.

  One that it started alone needs no coordinator, whose port would be that of every other such process on
  the node.
  """
  found = _cluster()
  return found is not None and found.get_process_count() > 1


def _address_of_first():
  """Where JAX will have process 0 listen; "" in other processes, and where only a service knows it.

  Two runs of one step of a SLURM job are given the same port: see `_part_steps`.
  """
  found: Any = _cluster()
  if found.__name__ not in _BY_ENVIRONMENT or found.get_process_id() != 0:
    return ""
  return found.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))


def _cluster() -> Any:
  """The scheduler that started this process, as JAX sees it; None without one."""
  from jax._src import clusters  # the public way to ask is to fail

  known = clusters.ClusterEnv._cluster_types
  found = [e for e in known if not e.opt_in_only_method and e.is_env_present()]
  # Every pod of Kubernetes looks like a cluster; only those of an indexed job have peers.
  found = [e for e in found if e.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ]
  return found[0] if found else None
