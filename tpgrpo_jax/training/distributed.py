"""Several processes become one program: JAX's multi-controller runtime, started once a process."""

import os

import jax

from tpgrpo_jax import config as config_lib


def initialize(config: config_lib.Distributed) -> None:
  """Joins the other processes of this run; does nothing for a run of one process.

  Must come before anything is computed. Under SLURM, Open MPI, an indexed Kubernetes job and on Cloud TPU
  JAX finds its peers by itself.

  Raises:
    RuntimeError: the coordinator or a process does not answer within `timeout`.
  """
  if config.coordinator == "off" or (config.coordinator == "auto" and not _in_cluster()):
    return
  explicit = {}
  if config.coordinator != "auto":
    explicit = dict(
      coordinator_address=config.coordinator,
      num_processes=config.num_processes,
      process_id=config.process_id,
    )
  try:
    jax.distributed.initialize(
      initialization_timeout=config.timeout,
      heartbeat_timeout_seconds=config.heartbeat_timeout,
      **explicit,
    )
  except RuntimeError as error:
    raise RuntimeError(
      f"distributed.coordinator={config.coordinator!r}: not all processes met within "
      f"distributed.timeout={config.timeout} s ({str(error).splitlines()[0]}). Check the address, that "
      "its port is open, and that every process was started."
    ) from error


def _in_cluster():
  """Whether a scheduler that JAX knows started this process among others."""
  from jax._src import clusters  # the public way to ask is to fail

  known = clusters.ClusterEnv._cluster_types
  found = [e.__name__ for e in known if not e.opt_in_only_method and e.is_env_present()]
  # Every pod of Kubernetes looks like a cluster; only those of an indexed job have peers.
  return any(name != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ for name in found)
