"""Encoded pictures on disk, so that the autoencoder encodes only those that are new.

One file a picture, below a folder named after all that decides it: the autoencoder's files, its dtype, the
size. It holds the pixels too, which rewards are shown. At 512 x 512 a file has 1 MB.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple
import uuid

import jax
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from tpgrpo_jax import caches
from tpgrpo_jax.models import vae
from tpgrpo_jax.models.hf import files as hf_files

WHAT, FIELD = "encoded pictures", "text.cache"
FORMAT = 1  # raise it when the same picture is encoded otherwise

Encode = Callable[[np.ndarray], np.ndarray]
"""Pictures uint8 [n, H, W, 3] -> latents float32 [n, h, w, c]."""


class EncodedPictures(NamedTuple):
  """A set of pictures that are on disk, by names of their content.

  Attributes:
    latents: names [N] -> float32 [N, h, w, c].
    pixels: name -> uint8 [H, W, 3].
    computed: how many had to be encoded.
  """

  latents: Callable[[Sequence[str]], np.ndarray]
  pixels: Callable[[str], np.ndarray]
  computed: int


def encode_pictures(
  pictures: Mapping[str, Callable[[], np.ndarray]],
  open_encoder: Callable[[], Encode],
  *,
  folder: str | os.PathLike[str],
  batch_size: int,
) -> EncodedPictures:
  """Makes sure that all pictures are on disk, encoded, and opens them.

  An interrupted call loses at most a batch. Processes may share the folder; each encodes what it misses.

  Args:
    pictures: name of the content -> what reads it, uint8 [H, W, 3].
    open_encoder: loads the encoder; called only when a picture is missing.
    folder: as of `cache_folder`.
    batch_size: pictures at once; every batch has as many, so that one program serves all, and a picture's
      latents have the same bits whichever are beside it.

  Raises:
    ValueError: a picture that cannot be read, or a folder that cannot be written to.
  """
  folder = pathlib.Path(folder)
  missing = [name for name in pictures if not _is_whole(_path(folder, name))]
  if missing:
    caches.check_writable(WHAT, folder, FIELD)
    encode = open_encoder()
    steps = range(0, len(missing), batch_size)
    for start in tqdm.tqdm(steps, desc="encode pictures", mininterval=2, disable=None):
      names = missing[start : start + batch_size]
      pixels = np.stack([pictures[name]() for name in names])
      spare = [(0, batch_size - len(names)), (0, 0), (0, 0), (0, 0)]
      latents = encode(np.pad(pixels, spare, mode="edge"))
      with caches.writing(WHAT, folder, FIELD):
        for name, *tensors in zip(names, latents, pixels):
          _save(_path(folder, name), *tensors)
  load = lambda name: _load(_path(folder, name))
  latents = lambda names: np.stack([load(name)["latents"] for name in names])
  return EncodedPictures(latents, lambda name: load(name)["pixels"], len(missing))


def cache_folder(
  root: str | os.PathLike[str],
  autoencoder: str | os.PathLike[str],
  *,
  size: Sequence[int],
  dtype: str,
) -> pathlib.Path:
  """Below `root`, a folder named after all that decides the latents of a picture, itself aside.

  Args:
    root: of the cache.
    autoencoder: folder of its files; a copy of it gives the same name.
    size: (height, width) of the pictures.
    dtype: of the encoder.
  """
  facts = json.dumps(["pictures", FORMAT, *size, dtype]).encode()
  return pathlib.Path(root) / hf_files.fingerprint(pathlib.Path(autoencoder), facts)


def make_encoder(graphdef: Any, params: Any) -> Encode:
  """Binds an autoencoder; latents are scaled, and the mean of what it gives."""
  run = functools.partial(_run, graphdef)
  return lambda pictures: jax.device_get(run(params, pictures))


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, pictures):
  return vae.encode(graphdef, params, pictures / np.float32(255))


def _path(folder, name):
  return folder / name[:2] / f"{name}.safetensors"


def _is_whole(path):
  try:
    with safetensors.safe_open(path, framework="numpy"):
      return True
  except (OSError, safetensors.SafetensorError):
    return False


def _save(path, latents, pixels):
  """Writes a picture's file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {"latents": np.array(latents, np.float32, order="C"), "pixels": np.array(pixels)}
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
  temporary.write_bytes(safetensors.numpy.save(tensors))
  os.replace(temporary, path)


def _load(path):
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{path}: an encoded picture cannot be read ({error}). Start the same command again: it is made anew."
    ) from error
