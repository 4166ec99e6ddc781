"""A reward from pictures that the user likes: how near a picture comes to a folder of them."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32
import numpy as np
from PIL import Image

from tpgrpo_jax import types
from tpgrpo_jax.data import pictures as pictures_lib
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.rewards import preprocess, towers

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = "captions.jsonl"


def make(
  *,
  path: str | os.PathLike[str],
  folder: str | os.PathLike[str],
  of: str = "all",
  width: float = 0.05,
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward w log(mean over demonstrations j of exp(cos(picture, j) / w)), in [-1, 1].

  cos is of CLIP's image embeddings. As the width w goes to 0 it is the cosine with the nearest
  demonstration, and as w grows the mean cosine with all; between them each demonstration pulls with weight
  softmax(cos / w), so that a picture near several is drawn to all of these, and pictures near different ones
  are drawn to different ones. Prompts count only where `of` is "prompt". What is like the demonstrations is
  rewarded, whether it shows what was asked or not: add a reward of the prompt.

  Source: the idea, rewards from demonstrations alone, is POSG's; the kernel form is ours, and the log of a
  kernel density estimate but for a constant.

  Args:
    path: a CLIP in transformers' layout, such as openai/clip-vit-large-patch14: a folder or hub id.
    folder: of PNG, JPEG or WebP pictures, of any sizes. Of "prompt", it also holds captions.jsonl, one
      {"file": ..., "prompt": ...} a line.
    of: "all" demonstrations, or those of the picture's own "prompt".
    width: w; cosines of CLIP-L between pictures of one kind differ by about 0.05 to 0.2.
    dtype: float32 or bfloat16, of the tower and its weights; the kernel is float32 always.
    batch: images at once on each device.
    placement: where weights and pictures go; None for the default device.

  Raises:
    ValueError: an option out of its range, a folder without pictures, a file that is none, or captions
      that name none; from `reward.check`, a prompt without demonstrations.
  """
  towers.check_options(dtype, batch)
  if of not in ("all", "prompt"):
    raise ValueError(f"of={of!r}: must be 'all' or 'prompt'.")
  if isinstance(width, str | bool) or not 0.0 < width < np.inf:
    raise ValueError(f"width={width!r}: must be a number above 0. 0.05 is the default.")
  files, prompts = find_demonstrations(folder, captioned=of == "prompt")
  shardings = None if placement is None else placement.params
  encoder = hf_clip.load_vision(
    towers.open_folder(path), dtype=towers.DTYPES[dtype], shardings=shardings
  )
  size = encoder.config.image_size

  def embed(tower, images):
    model = nnx.merge(encoder.graphdef, tower)
    return towers.normalized(model(preprocess.clip_pixels(images, size=size)).projected)

  def score(weights, images, wanted):
    return kernel_score(embed(weights["tower"], images), weights["liked"], wanted, width=width)

  embedded = [
    embed_pictures(jax.jit(embed), encoder.weights, files[i : i + batch], size, batch)
    for i in range(0, len(files), batch)
  ]
  liked = jnp.asarray(np.concatenate(embedded))
  if shardings is not None:
    liked = jax.device_put(liked, shardings({"liked": liked})["liked"])

  def rows_of(asked: Sequence[str]) -> tuple[np.ndarray]:
    if of == "all":
      return (np.ones((len(asked), len(files)), bool),)
    for prompt in set(asked):
      check(prompt, {})
    return (np.asarray(asked)[:, None] == np.asarray(prompts)[None],)

  def check(prompt: str, metadata: Mapping[str, Any]) -> None:
    del metadata
    if of == "prompt" and prompt not in prompts:
      raise ValueError(
        f"prompt={prompt!r}: folder={str(folder)!r} has no demonstration of it. Add one to {CAPTIONS}, "
        "or set of='all'."
      )

  weights = {"tower": encoder.weights, "liked": liked}
  reward = towers.make_reward(score, weights, rows_of, batch=batch, placement=placement)
  reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def kernel_score(
  x: Float[jax.Array, "N E"],
  liked: Float[jax.Array, "M E"],
  wanted: Bool[jax.Array, "N M"],
  *,
  width: float,
) -> Float32[jax.Array, " N"]:
  """w log(mean over j of exp(x . liked[j] / w)), over the demonstrations that are wanted, w = width.

  Args:
    x: unit embeddings of pictures.
    liked: unit embeddings of demonstrations.
    wanted: which of them count for which picture; one or more of each row.
    width: w.
  """
  cosines = jnp.matmul(x, liked.T, precision=jax.lax.Precision.HIGHEST).astype(jnp.float32)
  kernel = jnp.where(wanted, cosines / width, -jnp.inf)
  return width * (jax.nn.logsumexp(kernel, axis=-1) - jnp.log(jnp.sum(wanted, axis=-1)))


def find_demonstrations(
  folder: str | os.PathLike[str], *, captioned: bool
) -> tuple[list[pathlib.Path], list[str]]:
  """(pictures, their prompts), in the order of their names; "" for each prompt without captions.

  Raises:
    ValueError: no pictures, no captions, or captions of pictures that are not there.
  """
  root = pathlib.Path(folder).expanduser()
  if not captioned:
    found = sorted(root.iterdir()) if root.is_dir() else []
    files = [file for file in found if file.suffix.lower() in PICTURES]
    if not files:
      raise ValueError(
        f"folder={str(folder)!r}: must be a folder with pictures ({', '.join(PICTURES)}) that you like."
      )
    return files, [""] * len(files)
  pairs = _read_captions(root / CAPTIONS)
  for file, _ in pairs:
    if not file.is_file():
      raise ValueError(
        f"folder={str(folder)!r}: {CAPTIONS} names {file.name!r}, which is not there."
      )
  return [file for file, _ in pairs], [prompt for _, prompt in pairs]


def _read_captions(path):
  rule = 'one {"file": "...", "prompt": "..."} a line'
  if not path.is_file():
    raise ValueError(f"folder={str(path.parent)!r}: of='prompt' needs {CAPTIONS} in it, {rule}.")
  pairs = []
  for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
    if not line.strip():
      continue
    try:
      said = json.loads(line)
      pairs.append((path.parent / str(said["file"]), str(said["prompt"])))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{path}: line {number} must be {rule} ({type(error).__name__}).") from error
  if not pairs:
    raise ValueError(f"{path}: is empty. Write {rule}.")
  return pairs


def embed_pictures(embed, tower, files, size, batch) -> np.ndarray:
  """Unit embeddings [n, E] of picture files; filled up to `batch`, so that one program serves all.

  Raises:
    ValueError: a file that is no picture.
  """
  images = np.stack([_read_picture(file, size) for file in files])
  padded = np.pad(images, [(0, batch - len(images)), (0, 0), (0, 0), (0, 0)])
  return np.asarray(embed(tower, padded))[: len(images)]


def _read_picture(file, size):
  """Shorter side to `size` and the centre of it, as preprocess.clip_pixels does it; uint8 [S, S, 3]."""
  try:
    with Image.open(file) as opened:
      image = pictures_lib.to_rgb(opened)
  except (OSError, ValueError, Image.DecompressionBombError) as error:
    raise ValueError(f"folder: {str(file)!r} is no picture ({error}). Take it out.") from error
  shorter = min(image.size)
  width, height = (int(size * side / shorter) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size)))
