"""Prompt embeddings on disk, so that the text encoders are loaded only for prompts that are new.

One file a prompt, below a folder named after all that decides an embedding: the encoders' and
tokenizers' files, the length, the dtype. So a prompt is found again by every set that holds it. With the
sizes of SD3 a file has 2.7 MB in bfloat16, with those of FLUX.1 4.2 MB, of FLUX.2-klein-4B 7.9 MB, and of
Z-Image 2.6 MB.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple
import uuid

import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from tpgrpo_jax import caches, types
from tpgrpo_jax.models import prompt_embedding, text_source
from tpgrpo_jax.models.hf import encoder as hf_encoder
from tpgrpo_jax.models.hf import files as hf_files

WHAT, FIELD = "prompt embeddings", "text.cache"
FORMAT = 1  # raise it when embeddings of the same files change


class EmbeddedPrompts(NamedTuple):
  """A prompt set whose embeddings are on disk.

  Attributes:
    embed: prompts of the set -> Condition of NumPy arrays, read from disk.
    computed: how many had to be computed.
    truncated: {encoder, by its folder: how many of the set's prompts are too long for it}.
  """

  embed: Callable[[Sequence[str]], types.Condition]
  computed: int
  truncated: Mapping[str, int]


def embed_prompts(
  source: text_source.TextSource,
  prompts: Sequence[str],
  *,
  cache: str | os.PathLike[str],
  shardings: prompt_embedding.Shardings | None = None,
  batch_size: int = prompt_embedding.BATCH_SIZE,
) -> EmbeddedPrompts:
  """Makes sure that the embeddings of all prompts are on disk, and opens them.

  The encoders are loaded only when one is missing, and freed before this returns. An interrupted
  call loses at most a batch. Processes may share the cache; each computes what it misses.

  Args:
    source: the text encoders.
    prompts: all that will be asked for, "" among them where guidance is on.
    cache: a folder, made when it does not exist.
    shardings: as of load_text_encoders.
    batch_size: prompts at once.

  Raises:
    ValueError: a wrong or partial folder, or weights that do not fit; the file is named.
  """
  folder = pathlib.Path(cache) / identity(source)
  cut = {prompt: _load_cut(_path(folder, prompt)) for prompt in dict.fromkeys(prompts)}
  missing = [prompt for prompt, mark in cut.items() if mark is None]
  if missing:
    caches.check_writable(WHAT, folder, FIELD)  # before the encoders are loaded
    with prompt_embedding.load_text_encoders(source, shardings=shardings) as encoders:
      steps = range(0, len(missing), batch_size)
      for start in tqdm.tqdm(steps, desc="embed prompts", mininterval=2, disable=None):
        batch = missing[start : start + batch_size]
        tokens = encoders.tokenize(batch)
        condition = encoders.encode(tokens, batch_size=batch_size)
        cut |= zip(batch, tokens.cut)
        with caches.writing(WHAT, folder, FIELD):
          _save(folder, batch, tokens.cut, condition)
  # Of the prompts that a user gave: "" is the empty negative one.
  counts = prompt_embedding.count_truncated([mark or {} for prompt, mark in cut.items() if prompt])
  return EmbeddedPrompts(functools.partial(_load, folder), len(missing), counts)


def identity(source: text_source.TextSource) -> str:
  """Names all that decides an embedding, the prompt aside: 32 hex digits.

  As `hf.files.fingerprint`: a copy of the folder has the same identity.

  Raises:
    ValueError: a wrong or partial folder.
  """
  folder, parts = pathlib.Path(source.folder), source.parts()
  is_whole = len(parts) == len(text_source.FAMILIES[source.family].parts)
  facts = [FORMAT, source.family, source.length, source.dtype, is_whole]
  names = [name for part in parts for name in (part.tokenizer, part.encoder)]
  if not is_whole:
    facts.append(hf_encoder.load_json(folder / "transformer").get("joint_attention_dim"))
  for name in names:
    if not (folder / name).is_dir():
      raise ValueError(
        f"{str(folder)!r}: no {name} in it. Point it at a complete folder of the hub."
      )
  return hf_files.fingerprint(folder, json.dumps(facts).encode(), names)


def _path(folder, prompt):
  name = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]
  return folder / name[:2] / f"{name}.safetensors"


def _load_cut(path):
  """The encoders that did not see the prompt's end; None when there is no readable file."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return json.loads(file.metadata()["cut"])
  except (OSError, safetensors.SafetensorError):
    return None


def _save(folder, prompts, cuts, condition):
  """Writes each prompt's file whole or not at all."""
  given = {name: value for name, value in vars(condition).items() if value is not None}
  for i, (prompt, cut) in enumerate(zip(prompts, cuts)):
    path = _path(folder, prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.array(value[i], order="C") for name, value in given.items()}
    content = safetensors.numpy.save(tensors, metadata={"cut": json.dumps(cut)})
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _load(folder, prompts):
  rows = {}
  for prompt in dict.fromkeys(prompts):
    path = _path(folder, prompt)
    try:
      rows[prompt] = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(
        f"prompt {prompt!r}: its embedding is not in {folder} ({error}). Pass every prompt that you "
        "will use to embed_prompts."
      ) from error
  stack = lambda name: np.stack([rows[prompt][name] for prompt in prompts])
  given: dict[str, Any] = {name: stack(name) for name in rows[prompts[0]]}
  return types.Condition(**given)
