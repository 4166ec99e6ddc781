"""A small DiNa-LRM head of random weights as a file, in the names of the authors' code."""

import pathlib

import numpy as np
import safetensors.numpy

from tpgrpo_jax.models import dina
from tpgrpo_jax.models.hf import dina as names
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf.table import flatten


def write_head(path: pathlib.Path, config: dina.HeadConfig, seed: int = 0) -> pathlib.Path:
  """Writes the head's safetensors; no weight is zero, so that all of them matter."""
  _, abstract = encoder.outline(lambda rngs: dina.Head(config, rngs=rngs), np.float32)
  shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
  rng = np.random.default_rng(seed)

  def draw(entry):
    is_norm = ".norm_" in f".{entry.name}"
    scale = 1.5 * entry.shape[-1] ** -0.5 if len(entry.shape) == 2 else 0.5
    return (is_norm + scale * rng.standard_normal(entry.shape)).astype(np.float32)

  entries = names.HEAD.names(config, shapes)
  safetensors.numpy.save_file({entry.name: draw(entry) for entry in entries}, path)
  return path
