"""The first lines of a run, which need jax alone: they stand there before the rest is imported."""

import jax

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import version


def start(config: config_lib.Config) -> str:
  """What is known of a run before anything is opened: versions and devices, then the folder and its size."""
  devices, mesh, train = jax.devices(), config.mesh, config.train
  data = mesh.data if mesh.data > 0 else len(devices) // (mesh.fsdp * mesh.tensor)
  return (
    f"tpgrpo_jax {version.installed()}, jax {jax.__version__}: {len(devices)} x {devices[0].device_kind}, "
    f"mesh data {data} x fsdp {mesh.fsdp} x tensor {mesh.tensor}\n{config.run.dir}: {train.epochs} epochs of "
    f"{train.prompts_per_epoch} prompts x {train.group_size} samples"
  )
