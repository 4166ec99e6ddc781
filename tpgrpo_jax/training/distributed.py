"""What is set up once a process: JAX's multi-controller runtime, the cache of compiled programs."""

import os
import socket
import sys
import time
from typing import Any

import jax

from tpgrpo_jax import config as config_lib

PROGRAMS = "~/.cache/tpgrpo_jax/programs"


def set_up(config: config_lib.Config) -> None:
  """What every command does before anything is computed."""
  initialize(config.distributed)
  share_programs(config.run.programs)


def initialize(config: config_lib.Distributed) -> None:
  """Joins the other processes of this run; does nothing for a run of one process.

  Must come before anything is computed. Under SLURM, Open MPI, an indexed Kubernetes job and on Cloud TPU
  JAX finds its peers by itself. Where processes are missing after `timeout`, JAX ends this one.

  Raises:
    RuntimeError: nobody answers at the coordinator's address.
  """
  if config.coordinator == "off" or (config.coordinator == "auto" and not _in_cluster()):
    return
  explicit: dict[str, Any] = {}
  if config.coordinator != "auto":
    explicit = dict(
      coordinator_address=config.coordinator,
      num_processes=config.num_processes,
      process_id=config.process_id,
    )
    # JAX would end the process in a check of its own C++, with a stack trace.
    if config.process_id != 0:
      _wait_for(config)
    elif config.num_processes > 1:
      print(
        f"distributed.coordinator={config.coordinator}: waits for {config.num_processes - 1} more "
        f"processes, {config.timeout} s at most.",
        file=sys.stderr,
      )
  jax.distributed.initialize(
    initialization_timeout=config.timeout,
    heartbeat_timeout_seconds=config.heartbeat_timeout,
    **explicit,
  )


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
  if folder == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    return
  jax.config.update("jax_compilation_cache_dir", folder or os.path.expanduser(PROGRAMS))


def _in_cluster():
  """Whether a scheduler that JAX knows started this process among others."""
  from jax._src import clusters  # the public way to ask is to fail

  known = clusters.ClusterEnv._cluster_types
  found = [e.__name__ for e in known if not e.opt_in_only_method and e.is_env_present()]
  # Every pod of Kubernetes looks like a cluster; only those of an indexed job have peers.
  return any(name != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ for name in found)
