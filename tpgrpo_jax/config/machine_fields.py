"""The fields of what a run runs on, devices and processes, and of what it leaves."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device mesh.

  Attributes:
    data: devices that have whole copies of the weights; -1 takes those that fsdp x tensor leave.
    fsdp: devices that share out one copy of the weights, and the batch.
    tensor: devices that share out one copy of the weights, and the width of its layers.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Distributed:
  """How the processes of a run find each other.

  Attributes:
    coordinator: "auto" asks SLURM, Open MPI, Kubernetes or Cloud TPU; "off" is one process; else the
      host:port of process 0, and num_processes and process_id say the rest.
    num_processes: of the run, where the coordinator is host:port.
    process_id: of this process, from 0, likewise.
    timeout: seconds to wait for all processes at the start.
    heartbeat_timeout: seconds after which a silent process counts as lost, and the others stop.
  """

  coordinator: str = "auto"
  num_processes: int = 1
  process_id: int = 0
  timeout: int = 300
  heartbeat_timeout: int = 100


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What is kept of a run.

  Attributes:
    every: epochs between checkpoints.
    keep: how many of the newest stay.
    keep_every: of which epochs all stay; 0 for none.
    best: metric of the evaluations whose best weights are kept beside them: "reward/mean", the weighted sum,
      or "reward/LABEL/mean"; "" keeps none.
  """

  every: int = 10
  keep: int = 2
  keep_every: int = 0
  best: str = "reward/mean"


@dataclasses.dataclass(frozen=True)
class Log:
  """Where rows go beside metrics.jsonl, and when pictures are kept.

  Attributes:
    tensorboard: writes TensorBoard's files into the run folder.
    wandb: sends rows to Weights & Biases (pip install wandb).
    project: where Weights & Biases puts the run; "" is $WANDB_PROJECT, or its own default.
    name: of the run there; "" is the run folder's.
    group: of runs there, such as the seeds of one experiment; "" is none.
    id: of the run there. The run folder keeps it, so that a resumed run is one curve; "" makes one.
    images_every: epochs between the rollouts that are kept for the report, with pictures; 0 for none.
    profile: the epoch, from 1, of which <run.dir>/profile gets an XProf trace; 0 for none.
  """

  tensorboard: bool = True
  wandb: bool = False
  project: str = ""
  name: str = ""
  group: str = ""
  id: str = ""
  images_every: int = 10
  profile: int = 0
