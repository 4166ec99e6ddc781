"""What the rewards that look through CLIP's towers share: folders, prompts to ids, images in chunks."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import os
import pathlib
from typing import Any
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import registry, types
from tpgrpo_jax.cost import flops
from tpgrpo_jax.models.hf import encoder as hf_encoder
from tpgrpo_jax.models.hf import files
from tpgrpo_jax.models.hf import tokenizer as hf_tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH = 64
"""Images at once on each device; CLIP-H's attention takes 4 MiB of float32 for each, and a picture of
1024 x 1024 some 50 MiB while it is resized."""

TokenizeFn = Callable[[Sequence[str]], np.ndarray]
"""prompts -> int32 [N, L]."""


def check_options(dtype: str, batch: int) -> None:
  """Raises ValueError unless `dtype` is a name of DTYPES and `batch` a positive integer."""
  registry.check(dtype, DTYPES, field="dtype")
  if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
    raise ValueError(f"batch={batch!r}: must be an integer >= 1. {BATCH} is the default.")


CONVERT_CLIP = """
Convert such a folder once, where torch and transformers are installed, with this line of Python:
  import transformers; transformers.CLIPModel.from_pretrained("FOLDER").save_pretrained("FOLDER")"""


def open_folder(
  path: str | os.PathLike[str],
  *,
  field: str = "path",
  weights: bool = True,
  convert: str = CONVERT_CLIP,
) -> pathlib.Path:
  """The local folder of a model, fetched where `path` is a hub id.

  Args:
    path: a folder, or a hub id "owner/name".
    field: the option that holds it, for messages.
    weights: False fetches no weights.
    convert: how a pickle is made a safetensors file, for the message that it is not read.

  Raises:
    ValueError: no such folder, or a file.
  """
  if not isinstance(path, str | os.PathLike) or not str(path):
    raise ValueError(f'{field}={path!r}: must be a folder, or a hub id "owner/name".')
  folder = files.resolve(path, field=field, weights=weights)
  if folder.is_file():
    is_pickle = any(folder.match(pattern) for pattern in files.PICKLES)
    what = f"a pickle, which can run any code when it is opened and is not read.{convert}"
    raise ValueError(
      f"{field}={str(path)!r}: is {what}" if is_pickle
      else f"{field}={str(path)!r}: is a file, must be a folder. Give the folder that holds it."
    )  # fmt: skip
  if not folder.is_dir():
    raise ValueError(
      f'{field}={str(path)!r}: no such folder. Give a folder, or a hub id "owner/name".'
    )
  return folder


def check_safetensors(path: str | os.PathLike[str], folder: pathlib.Path, *, convert: str) -> None:
  """Raises ValueError, with how a pickle is converted, unless there are safetensors in the folder."""
  if any(folder.glob("*.safetensors")):
    return
  found = sorted(file.name for file in folder.iterdir())
  shown = f" (it holds {', '.join(found[:5])})" if found else ""
  raise ValueError(
    f"path={str(path)!r}: no safetensors in it{shown}. Pickles are not read.{convert}"
  )


def load_tokenize(
  label: str,
  folder: pathlib.Path,
  tokenizer: str | os.PathLike[str],
  config: Any,
  *,
  hint: str,
  clean: Callable[[str], str] = lambda prompt: prompt,
  kind: str = "clip",
  length: int = 0,
) -> TokenizeFn:
  """Makes the function prompts -> ids of a text tower, padded or cut to its length.

  Prompts that are cut are counted in a warning, each of them once.

  Args:
    label: the reward's name, for messages.
    folder: of the model.
    tokenizer: folder or hub id of a tokenizer; "" for the model's own.
    config: the text tower's, with vocab_size and max_position_embeddings.
    hint: where the public model's tokenizer is, for the message that there is none.
    clean: what is done to a prompt before.
    kind: of the tokenizer, a name of models.hf.tokenizer.KINDS.
    length: tokens that are read; 0 is all that the tower has positions for.

  Raises:
    ValueError: no tokenizer, or, from the function, one of another model.
  """
  if tokenizer:
    folder = open_folder(tokenizer, field="tokenizer", weights=False)
  elif not hf_tokenizer.has_tokenizer(kind, folder):
    wanted = ", or ".join(" and ".join(names) for names in hf_tokenizer.KINDS[kind][1])
    raise ValueError(
      f"path={str(folder)!r}: holds no tokenizer ({wanted}). Copy "
      f"the files there, or set tokenizer to their folder or hub id: {hint}."
    )
  load, length = hf_tokenizer.load_tokenizer(kind, folder), length or config.max_position_embeddings
  options = dict(padding="max_length", max_length=length, truncation=True)
  warned: set[str] = set()

  def tokenize(prompts: Sequence[str]) -> np.ndarray:
    texts = list(dict.fromkeys(prompts))  # completions and groups repeat them
    cleaned = [clean(text) for text in texts]
    ids = np.asarray(load(cleaned, **options)["input_ids"], np.int32)
    if ids.max() >= config.vocab_size:
      raise ValueError(
        f"tokenizer: gives id {ids.max()}, but the model at path has vocab_size={config.vocab_size}. "
        f"It is another model's: {hint}."
      )
    whole = [len(row) for row in load(cleaned, verbose=False)["input_ids"]]
    cut = {text for text, tokens in zip(texts, whole) if tokens > length} - warned
    if cut:
      warned.update(cut)
      warnings.warn(
        f"{len(cut)} of {len(texts)} prompts have more than the {length} tokens that {label} reads: it "
        "does not see their end.",
        stacklevel=3,
      )
    row = {text: i for i, text in enumerate(texts)}
    return ids[[row[prompt] for prompt in prompts]]

  return tokenize


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """The cosine of the angle between rows of a and of b, both [N, E], in float32; [N]."""
  a, b = normalized(a), normalized(b)
  return jnp.sum(a * b, axis=-1)


def normalized(x: jax.Array) -> jax.Array:
  """Rows [N, E] divided by their length, in float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def make_text_image_reward(
  encoder: hf_encoder.Encoder,
  tokenize: TokenizeFn,
  pixels: Callable[..., jax.Array],
  score: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  batch: int,
  placement: types.Placement | None,
) -> types.DeviceRewardFn:
  """Makes the reward score(cosine of a prompt and its image, exp(logit_scale)).

  Args:
    encoder: a loaded clip.CLIP.
    tokenize: prompts -> ids.
    pixels: (images, size) -> what the image tower sees.
    score: (cosine [N], exp(logit_scale)) -> [N].
    batch: images at once on each device.
    placement: as of `make_reward`.
  """
  return make_reward(
    text_image_score(encoder, pixels, score),
    encoder.weights,
    lambda prompts: (tokenize(prompts),),
    batch=batch,
    placement=placement,
  )


def text_image_score(
  encoder: hf_encoder.Encoder,
  pixels: Callable[..., jax.Array],
  score: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
  """What `make_text_image_reward` compiles: pure (weights, images [n, H, W, 3], ids [n, L]) -> [n]."""
  graphdef, size = encoder.graphdef, encoder.config.vision.image_size

  def score_chunk(weights, images, ids):
    model = nnx.merge(graphdef, weights)
    text, vision = model(ids, pixels(images, size=size))
    cos = cosine(text.projected, vision.projected)
    return score(cos, jnp.exp(weights["logit_scale"]))

  return score_chunk


def make_reward(
  score: Callable[..., jax.Array],
  weights: Any,
  inputs: Callable[[Sequence[str]], tuple[np.ndarray, ...]],
  *,
  batch: int,
  placement: types.Placement | None,
) -> types.DeviceRewardFn:
  """Makes a device reward of a function of weights, images and what is made of the prompts.

  It is compiled once for every shape of images; the weights are arguments and not constants.

  Args:
    score: (weights, images [n, H, W, 3], *inputs [n, ...]) -> [n]; pure.
    weights: a pytree of arrays.
    inputs: prompts -> arrays of the host with leading axis N.
    batch: images at once on each device; more are scored one chunk after another.
    placement: where images and inputs go; None for the default device.
  """
  mesh = getattr(jax.tree.leaves(weights)[0].sharding, "mesh", None)

  def reward(
    images: jax.Array | np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
  ) -> jax.Array:
    del metadata
    _check_images(images, prompts)
    if not len(prompts):
      return jnp.zeros((0,), jnp.float32)
    given = (images, *inputs(prompts))
    arrays = jax.tree.map(jnp.asarray, given) if placement is None else placement.batch(given)
    shards = len(prompts) // arrays[0].sharding.shard_shape(arrays[0].shape)[0]
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      return run_chunks(score, weights, arrays, batch=batch, shards=shards)

  def count(height, width):
    """Operations of one picture and its prompt."""
    picture = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      return flops.count(score, weights, picture, *inputs(["a picture"])).total

  reward.flops = functools.cache(count)  # pyright: ignore[reportFunctionMemberAccess]
  return reward


@functools.partial(jax.jit, static_argnames=("score", "batch", "shards"))
def run_chunks(
  score: Callable[..., jax.Array], weights: Any, arrays: tuple, *, batch: int, shards: int
) -> jax.Array:
  """score(weights, *arrays) [N], at most `batch` rows of each of `shards` equal parts at a time."""
  chunked = _in_chunks(functools.partial(score, weights), arrays, batch=batch, shards=shards)
  return chunked.astype(jnp.float32)


def _check_images(images, prompts):
  shape = tuple(np.shape(images))
  if images.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape[1:]:
    raise ValueError(f"images {images.dtype} {shape}: must be uint8 [N, H, W, 3], RGB.")
  if shape[0] != len(prompts):
    raise ValueError(f"{shape[0]} images, {len(prompts)} prompts: must be equally many.")


def _in_chunks(score, arrays, *, batch, shards):
  """score(*arrays) [N], at most `batch` rows of each of `shards` equal parts at a time.

  A chunk takes as many rows from every part, so that no row changes its device.
  """
  local = len(arrays[0]) // shards
  chunks = -(-local // batch)
  if chunks == 1:
    return score(*arrays)
  size = -(-local // chunks)

  def split(x):
    x = x.reshape(shards, local, *x.shape[1:])
    padding = [(0, 0), (0, chunks * size - local)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding, mode="edge").reshape(shards, chunks, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0).reshape(chunks, shards * size, *x.shape[3:])

  scores = jax.lax.map(lambda rows: score(*rows), tuple(split(x) for x in arrays))
  return scores.reshape(chunks, shards, size).swapaxes(0, 1).reshape(shards, -1)[:, :local].ravel()
