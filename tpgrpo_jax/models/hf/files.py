"""Finding and reading safetensors files: single, sharded, in any precision, from a folder or the hub."""

from collections.abc import Iterator, Sequence
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = ("", ".bf16", ".fp16")  # the first that is there is read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
# safetensors' names of the number formats that NumPy (with ml_dtypes) holds.
DTYPES = {
  "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
  "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_REMAP_BYTES = 256 * 2**20
STRIDE, SAMPLE = 2**24, 2**16
"""Of a large file, `SAMPLE` bytes out of every `STRIDE` count for its fingerprint."""


def is_floating(dtype: Any) -> bool:
  """Whether a dtype, or the name of one in DTYPES, is of floating-point numbers."""
  return str(dtype) in _EXPONENTS


class Tensor(NamedTuple):
  """Where a tensor lies, and its shape and dtype by name, as the file's header says."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def resolve(
  path: str | os.PathLike[str],
  *,
  subfolder: str = "",
  field: str = "model.path",
  weights: bool = True,
) -> pathlib.Path:
  """The local folder of a model: the folder itself, a pipeline's subfolder, or fetched from the hub.

  Args:
    path: a folder, or a hub id "owner/name".
    subfolder: the part of a pipeline; not used where there is no such subfolder.
    field: the config field that holds `path`, for messages.
    weights: False fetches no weights, as for a tokenizer.

  Raises:
    ValueError: a hub id that cannot be fetched.
  """
  folder = pathlib.Path(path)
  if is_hub_id(path):
    folder = _fetch(str(path), subfolder, field, weights)
  return folder / subfolder if (folder / subfolder).is_dir() else folder


def is_hub_id(path: str | os.PathLike[str]) -> bool:
  """Whether it is "owner/name", and not a folder that is here."""
  is_id = isinstance(path, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
  return bool(is_id) and not os.path.exists(path)


def _fetch(repo, subfolder, field, with_weights):
  import huggingface_hub

  def snapshot(allow, ignore=()):
    found = huggingface_hub.snapshot_download(
      repo, allow_patterns=allow, ignore_patterns=list(ignore)
    )
    return pathlib.Path(found)

  try:
    folder = snapshot(["*.json", "*.txt", "*.model"])
    if not with_weights:
      return folder
    inside = bool(subfolder) and (folder / subfolder).is_dir()
    weights = [f"{subfolder}/*.safetensors" if inside else "*.safetensors"]
    others = () if inside else ("*/*",)
    # Copies in half precision only where there is no other.
    folder = snapshot(weights, (*others, "*.fp16*", "*.bf16*"))
    if not any((folder / subfolder if inside else folder).glob("*.safetensors")):
      folder = snapshot(weights, others)
  except Exception as error:  # offline, no such repository, a gated one: other classes each version
    raise ValueError(
      f"{field}={repo!r}: no such folder, and it could not be fetched from the hub as a model's id "
      f"({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}). Check the "
      "spelling, log in with `hf auth login` if the model is gated, or fetch it on a machine with a "
      "network (`hf download`) and give the folder."
    ) from error
  return folder


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; ValueError with the path when it is none."""
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error}). Fetch it again.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: must hold a JSON object, holds a {type(content).__name__}.")
  return content


def find_tensors(
  folder: pathlib.Path, *, file: str = "", field: str = "model.path"
) -> dict[str, Tensor]:
  """All tensors of a model's folder by name; reads headers alone.

  Args:
    folder: of the model.
    file: a safetensors file or index in it; by default the usual names are tried.
    field: the config field that holds `folder`, for messages; "" when none does.

  Raises:
    ValueError: no safetensors in it, an index that names files that are not there, a broken file.
  """
  first = _find_first(folder, file, field)
  if first.suffix == ".safetensors":
    return dict(_headers(first))
  index = read_json(first).get("weight_map")
  if not isinstance(index, dict) or not index:
    raise ValueError(f"{first}: has no weight_map. Fetch it again.")
  for name, shard in index.items():
    if not isinstance(shard, str):
      raise ValueError(
        f"{first}: weight_map: {name}={shard!r}: must be the name of a file. Fetch it again."
      )
  shards = [folder / name for name in sorted(set(index.values()))]
  absent = [shard.name for shard in shards if not shard.is_file()]
  if absent:
    raise ValueError(
      f"{str(folder)!r}: no {', '.join(absent)} in it, which {first.name} names. Fetch it again."
    )
  return {name: tensor for shard in shards for name, tensor in _headers(shard)}


def _find_first(folder, file, field):
  if file:
    candidates = [file]
  else:
    candidates = [
      name
      for variant in VARIANTS
      for stem in STEMS
      for name in (
        f"{stem}.safetensors.index{variant}.json",
        f"{stem}{variant}.safetensors.index.json",
        f"{stem}{variant}.safetensors",
      )
    ]
  for name in candidates:
    if (folder / name).is_file():
      return folder / name
  where = f"{field}={str(folder)!r}" if field else repr(str(folder))
  pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
  if pickles:
    raise ValueError(
      f"{where}: holds {', '.join(pickles[:3])} and no safetensors. Such files can "
      "run any code when they are opened, so they are not read: convert to safetensors, for "
      "example with model.save_pretrained(folder, safe_serialization=True)."
    )
  tried = file or f"{WEIGHTS_FILE} and no model.safetensors in it, nor an index of shards"
  raise ValueError(f"{where}: no {tried}. Point it at a complete folder of the hub.")


def _headers(path) -> Iterator[tuple[str, Tensor]]:
  with open_safetensors(path) as handle:
    for name in handle.keys():
      part = handle.get_slice(name)
      dtype = part.get_dtype()
      if dtype not in DTYPES:
        raise ValueError(
          f"{path}: {name} is stored as {dtype}; must be one of {', '.join(DTYPES)}. Use the model's "
          "bf16 or fp16 files instead."
        )
      yield name, Tensor(path, tuple(part.get_shape()), DTYPES[dtype])


def fingerprint(folder: pathlib.Path, seed: bytes = b"", subfolders: Sequence[str] = (".",)) -> str:
  """Names the content of model folders: 32 hex digits.

  Files count by name, size and content, not by place or age: a copy of the folder has the same
  fingerprint. Of files above 16 MiB one 64 KiB sample in each 16 MiB is read, which takes a second for
  10 GB and sees every change that training makes.

  Args:
    folder: of the models.
    seed: facts that count too.
    subfolders: whose files count, those of deeper folders not.
  """
  digest = hashlib.sha256(seed)
  for name in subfolders:
    for path in sorted(path for path in (folder / name).iterdir() if path.is_file()):
      digest.update(f"\n{name}/{path.name} {path.stat().st_size} ".encode())
      _update(digest, path)
  return digest.hexdigest()[:32]


def _update(digest, path):
  size = path.stat().st_size
  with path.open("rb") as file:
    if size <= STRIDE:
      digest.update(file.read())
      return
    for start in [*range(0, size, STRIDE), size - SAMPLE]:
      file.seek(start)
      digest.update(file.read(SAMPLE))


def open_safetensors(path: pathlib.Path) -> Any:
  """safetensors.safe_open for NumPy; ValueError with the path when the file is broken."""
  try:
    return safetensors.safe_open(path, framework="numpy")
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{path}: not a readable safetensors file ({error}). Fetch it again."
    ) from error


# Bits of a float's exponent: all of them are set in infinities and NaN, and in nothing else.
_EXPONENTS = {
  "float64": (np.uint64, 0x7FF << 52), "float32": (np.uint32, 0xFF << 23),
  "float16": (np.uint16, 0x1F << 10), "bfloat16": (np.uint16, 0xFF << 7),
}  # fmt: skip


def check_finite(value: np.ndarray, name: str, path: os.PathLike[str]) -> None:
  """Raises ValueError with the tensor's name where it holds NaN or infinity; bits alone are looked at."""
  if str(value.dtype) not in _EXPONENTS or not value.size:
    return
  kind, exponent = _EXPONENTS[str(value.dtype)]
  mask = kind(exponent)
  if ((np.ascontiguousarray(value).view(kind) & mask) == mask).any():
    raise ValueError(
      f"{path}: the tensor {name} holds NaN or infinity: weights must be finite. Fetch the file again, or "
      "take a checkpoint from before the training that made it fell apart."
    )


class Reader:
  """Reads tensors of one file.

  The file is mapped into memory, and pages that were read count as resident until it is closed: it
  is opened again after every 256 MiB, so that memory does not grow to the size of the file.
  """

  def __init__(self, path: pathlib.Path):
    self.path, self._read = path, 0
    self._handle = open_safetensors(path)

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *unused) -> None:
    self._handle.__exit__(None, None, None)

  def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """A tensor, or a part of it, as a NumPy array."""
    if self._read > _REMAP_BYTES:
      self.__exit__()
      self._read, self._handle = 0, open_safetensors(self.path)
    value = self._handle.get_slice(name)[index] if index else self._handle.get_tensor(name)
    self._read += value.nbytes
    return value
