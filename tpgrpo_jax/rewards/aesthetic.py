"""LAION's aesthetic score: a few linear layers on CLIP-L's image embedding."""

from collections.abc import Callable, Mapping
import functools
import os
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models.hf import arrays, files
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf.table import make_entry, unflatten
from tpgrpo_jax.rewards import preprocess, towers

LAYERS = ("0", "2", "4", "6", "7")  # of an nn.Sequential with dropout between, and no activation
CONVERT = """
The public file, sac+logos+ava1-l14-linearMSE.pth of
github.com/christophschuhmann/improved-aesthetic-predictor, is a pickle, which can run any code when it is
opened and is not read. Convert it once, where torch and safetensors are installed, with these lines of
Python, and set head to the new file:
  import torch, safetensors.torch
  weights = torch.load("sac+logos+ava1-l14-linearMSE.pth", map_location="cpu", weights_only=True)
  safetensors.torch.save_file(weights, "aesthetic_head.safetensors")
Or leave head out, and set path to a folder whose model.safetensors holds tower and head, such as Aesthetic/
of DiffSynth-Studio/ImageMetrics."""


def make(
  *,
  path: str | os.PathLike[str],
  head: str | os.PathLike[str] = "",
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward head(e / |e|), with e the image's projection; about 1 to 10. Prompts do not count.

  Source: LAION's improved-aesthetic-predictor, simple_inference.py; the head is linear layers of
  widths 768, 1024, 128, 64, 16, 1.

  Args:
    path: CLIP-L/14 in transformers' layout, openai/clip-vit-large-patch14: a folder or hub id.
    head: the head's safetensors file, with LAION's names; "" where the file at path holds it beside the image
      tower, as in DiffSynth-Studio/ImageMetrics. Such a folder needs no config.json.
    dtype: float32 or bfloat16, of the tower and its weights; the head is float32 always.
    batch: images at once on each device.
    placement: where the weights go; None for the default device.

  Raises:
    ValueError: an option out of its range, or files that do not hold what they should; where the head
      is a pickle, how to convert it.
  """
  towers.check_options(dtype, batch)
  folder = towers.open_folder(path)
  shardings = None if placement is None else placement.params
  # Before the tower: it takes a moment, and its file is the one that users have to make.
  if str(head):
    head_weights = load_head(head, shardings)
    encoder = hf_clip.load_vision(folder, dtype=towers.DTYPES[dtype], shardings=shardings)
  else:
    tensors = files.find_tensors(folder, field="path")
    head_weights = read_head(f"path={str(path)!r}", tensors, shardings, bare=hf_clip.bare)
    encoder = hf_clip.load_wrapped_vision(folder, dtype=towers.DTYPES[dtype], shardings=shardings)
  config, reads = encoder.config, head_weights["layers"]["0"]["kernel"].shape[0]
  if config.projection_dim != reads:
    raise ValueError(
      f"head={str(head)!r}: reads embeddings of {reads} numbers, but the model at path gives "
      f"{config.projection_dim}. LAION's head belongs to openai/clip-vit-large-patch14."
    )

  def score(weights, images):
    tower = nnx.merge(encoder.graphdef, weights["tower"])
    embedding = tower(preprocess.clip_pixels(images, size=config.image_size)).projected
    return apply_head(weights["head"], towers.normalized(embedding))

  weights = {"tower": encoder.weights, "head": head_weights}
  return towers.make_reward(score, weights, lambda prompts: (), batch=batch, placement=placement)


def apply_head(weights: types.Params, x: jax.Array) -> jax.Array:
  """Layer after layer of unit embeddings x [N, E] -> [N]."""
  product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  for name in LAYERS:
    layer = weights["layers"][name]
    x = product(x, layer["kernel"]) + layer["bias"]
  return x[:, 0]


def load_head(path: str | os.PathLike[str], shardings=None) -> types.Params:
  """Loads {"layers": {name: {"kernel": [in, out], "bias": [out]}}} in float32.

  Args:
    path: a safetensors file with tensors layers.0.weight [out, in], layers.0.bias and so on.
    shardings: tree of shapes -> tree of shardings; by default the default device.

  Raises:
    ValueError: no such file, a pickle, or another head.
  """
  file = pathlib.Path(path)
  if not file.is_file() or file.suffix != ".safetensors":
    what = "not a safetensors file" if file.exists() else "no such file"
    raise ValueError(f"head={str(path)!r}: {what}.{CONVERT}")
  tensors = files.find_tensors(file.parent, file=file.name, field="head")
  return read_head(f"head={str(file)!r}", tensors, shardings)


def read_head(
  where: str,
  tensors: Mapping[str, files.Tensor],
  shardings=None,
  *,
  bare: Callable[[str], str] | None = None,
) -> types.Params:
  """Reads what `load_head` loads, from the tensors of a file.

  Args:
    where: the option and its value, for messages.
    tensors: as of files.find_tensors.
    shardings: tree of shapes -> tree of shardings; by default the default device.
    bare: a name in the file -> the head's own, where the file holds more; other tensors are left out.

  Raises:
    ValueError: another head, or none.
  """
  own = {name: name for name in tensors}
  if bare is not None:
    own = {bare(name): name for name in tensors if bare(name).startswith("layers.")}
  widths = _widths(where, {name: tensors[stored] for name, stored in own.items()})
  shapes = {}
  for name, d_in, d_out in zip(LAYERS, widths, widths[1:]):
    shapes |= {f"layers.{name}.kernel": (d_in, d_out), f"layers.{name}.bias": (d_out,)}
  abstract = unflatten({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
  rule = "LAION's head, linear layers that end in one number (other heads are not read)"
  return arrays.read_params(
    pathlib.Path(where),
    tensors,
    [make_entry(k, None, k.replace("kernel", "weight"), s) for k, s in shapes.items()],
    abstract,
    shardings=None if shardings is None else shardings(abstract),
    aliases=lambda found: own,
    rule=rule,
  )


def _widths(where, tensors):
  """Of the embedding and of every layer's output, the last being 1."""
  names = [f"layers.{name}.weight" for name in LAYERS]
  shapes = [tensors[name].shape for name in names if name in tensors]
  if len(shapes) < len(names) or any(len(shape) != 2 for shape in shapes):
    raise ValueError(
      f"{where}: holds {', '.join(sorted(tensors)[:4]) or 'no layers'} ...: must hold matrices "
      f"{', '.join(names)} and their biases, LAION's linear head (sac+logos+ava1-l14-linearMSE)."
    )
  return [shapes[0][1], *(shape[0] for shape in shapes[:-1]), 1]
