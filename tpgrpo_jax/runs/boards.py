"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl as curves, and pictures beside them.

A run that is resumed is one curve. TensorBoard is told from which epoch on what it has does not count;
Weights & Biases takes a run by its id, which the run folder keeps.
"""

from collections.abc import Mapping, Sequence
import importlib.util
import os
import secrets
import sys
from typing import Any

from etils import epath
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import run_folder

ID_FILE = "wandb_id"


class TensorBoard:
  """Writes event files below <run_dir>/tensorboard."""

  def __init__(self, run_dir: os.PathLike | str, next_epoch: int):
    """Opens a file; of the files before it, everything from `next_epoch` on does not count any more."""
    folder = str(epath.Path(run_dir) / "tensorboard")
    self._writer = _import_tensorboardx().SummaryWriter(folder, purge_step=next_epoch)

  def write(self, numbers: Mapping[str, float], epoch: int) -> None:
    """Adds a point to the curve of each name."""
    for name, value in numbers.items():
      self._writer.add_scalar(name, value, epoch)

  def pictures(
    self,
    name: str,
    sheet: np.ndarray,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    epoch: int,
  ) -> None:
    """Adds the sheet, and its captions as text under the same name."""
    del images
    self._writer.add_image(name, sheet, epoch, dataformats="HWC")
    listed = "\n".join(f"{i}. {caption}" for i, caption in enumerate(captions, 1))
    self._writer.add_text(name, listed, epoch)

  def close(self, failed: bool) -> None:
    """Flushes the file."""
    del failed
    self._writer.close()


class WandB:
  """Sends rows to Weights & Biases, or keeps them below <run_dir>/wandb where WANDB_MODE=offline.

  Its steps are epochs. They only grow: of rows that are written again the first ones stay.
  """

  def __init__(self, run_dir: os.PathLike | str, log: config_lib.Log, config: Any, next_epoch: int):
    """Opens the run, or goes on with it where epochs of it are kept.

    Raises:
      ValueError: wandb is missing, or refuses.
    """
    check(log)
    import wandb  # pyright: ignore[reportMissingImports]

    self._wandb = wandb
    try:
      self._run = wandb.init(
        project=log.project or None,
        name=log.name or os.path.basename(os.path.normpath(run_dir)),
        group=log.group or None,
        id=keep_id(run_dir, log.id, goes_on=next_epoch > 0),
        dir=None if run_folder.is_remote(run_dir) else os.fspath(run_dir),
        config=config,
        resume="allow",
        allow_val_change=True,  # a resume may change some fields
      )
    except wandb.Error as error:
      raise ValueError(
        f"log.wandb=True: wandb says: {error}. Run wandb login, or set WANDB_MODE=offline."
      ) from error
    self._run.define_metric("*", step_metric="epoch")

  def write(self, numbers: Mapping[str, float], epoch: int) -> None:
    """Adds a point to the curve of each name."""
    self._run.log({"epoch": epoch, **numbers}, step=epoch)

  def pictures(
    self,
    name: str,
    sheet: np.ndarray,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    epoch: int,
  ) -> None:
    """Adds every picture with its caption."""
    del sheet
    each = [self._wandb.Image(image, caption=text) for image, text in zip(images, captions)]
    self._run.log({name: each}, step=epoch)

  def close(self, failed: bool) -> None:
    """Sends what is left."""
    self._run.finish(exit_code=int(failed))


def check(log: config_lib.Log) -> None:
  """Raises ValueError where a board that is asked for is not installed."""
  if log.wandb and importlib.util.find_spec("wandb") is None:
    raise ValueError("log.wandb=True: wandb is missing. pip install wandb")


def keep_id(run_dir: os.PathLike | str, asked: str, *, goes_on: bool) -> str:
  """The run's id, kept in its folder: as asked, else the kept one of a run that goes on, else $WANDB_RUN_ID,
  else a new one.

  A run that begins anew in a folder, because nothing was saved, is a new curve: of an old one W&B would keep
  the rows that are there.
  """
  path = epath.Path(run_dir) / ID_FILE
  kept = path.read_text().strip() if path.exists() else ""
  known = asked or (kept if goes_on else "") or os.environ.get("WANDB_RUN_ID", "")
  found = known or secrets.token_hex(4)
  if found != kept:
    run_folder.write(path, f"{found}\n".encode())
  return found


def _import_tensorboardx():
  """tensorboardX without torch, which it imports where there is one, for the name of a type alone."""
  blocked: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
  sys.modules.update(blocked)
  try:
    import tensorboardX
  finally:
    for name in blocked:
      del sys.modules[name]
  return tensorboardX
