"""The pictures of a model that edits: part of the condition, and shown to the rewards."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpgrpo_jax import caches, types
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.data import pictures as pictures_lib
from tpgrpo_jax.models import hf, picture_cache
from tpgrpo_jax.training import mesh as mesh_lib


class Pictures(NamedTuple):
  """The pictures of a run's prompts, all of one size.

  Attributes:
    add: (condition, its prompts) -> the condition with the latents of their pictures.
    show: prompts -> the same with the picture's pixels, uint8 [H, W, 3], in place of its path.
  """

  add: Callable[[types.Condition, Sequence[types.Prompt | str]], types.Condition]
  show: Callable[[Sequence[types.Prompt]], list[types.Prompt]]


def open_pictures(
  config: config_lib.Config,
  autoencoder: pathlib.Path,
  outline: tuple[Any, Any],
  size: tuple[int, int],
  prompts: Sequence[types.Prompt | str],
) -> Pictures:
  """Makes sure that the pictures of all prompts are encoded, once, as their texts are.

  The encoder's weights are loaded for pictures that are not in the cache, and freed before this returns. A
  picture is known by its file's content as it was at this call.

  Args:
    config: of the run; relative paths begin in prompts.path.
    autoencoder: its folder.
    outline: its structure and the shapes of its weights.
    size: (height, width) that pictures are stretched to: that of the painted ones.
    prompts: all that will be asked for.

  Raises:
    ValueError: a prompt that names no picture, or a picture that cannot be read.
  """
  root = config.prompts.path or "."
  named = dict.fromkeys(pictures_lib.paths_of(prompts, root))
  content = {path: hashlib.sha256(pictures_lib.read_bytes(path)).hexdigest()[:32] for path in named}
  encoded = picture_cache.encode_pictures(
    {content[p]: functools.partial(pictures_lib.read_picture, p, *size) for p in named},
    lambda: _open_encoder(config.vae, autoencoder, *outline),
    folder=picture_cache.cache_folder(
      caches.place("prompts", config.text.cache), autoencoder, size=size, dtype=config.vae.dtype
    ),
    batch_size=config.vae.images_per_chunk * jax.local_device_count(),
  )
  name = lambda asked: [content[path] for path in pictures_lib.paths_of(asked, root)]

  def add(condition, asked):
    return dataclasses.replace(condition, image=encoded.latents(name(asked)))

  def show(asked):
    names = name(asked)
    pixels = {each: encoded.pixels(each) for each in dict.fromkeys(names)}  # samples share one
    metadata = [
      {**prompt.metadata, pictures_lib.MEMBER: pixels[each]} for prompt, each in zip(asked, names)
    ]
    return [types.Prompt(prompt.text, each) for prompt, each in zip(asked, metadata)]

  return Pictures(add, show)


def _open_encoder(settings, folder, graphdef, abstract):
  """The encoder on all devices of this process, which divide its batches."""
  mesh = mesh_lib.local_mesh()
  copied = jax.tree.map(lambda _: NamedSharding(mesh, P()), abstract)
  params = hf.load_params(folder, abstract, shardings=copied, dtype=settings.dtype)
  encode = picture_cache.make_encoder(graphdef, params)

  def encode_here(pictures):
    with jax.set_mesh(mesh):
      return encode(jax.device_put(pictures, mesh_lib.batch_sharding(mesh)))

  return encode_here
