"""Where the pipelines keep their text encoders, and what decides the embeddings."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp

from tpgrpo_jax import registry
from tpgrpo_jax.models.hf import encoder as hf_encoder

MAX_LENGTH = 512  # diffusers refuses more
INDEX_FILE = "model_index.json"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Part(NamedTuple):
  """A text encoder of a pipeline.

  Attributes:
    kind: a name of prompt_embedding.KINDS.
    tokenizer: its folder.
    encoder: likewise.
    options: of the kind's own functions.
  """

  kind: str
  tokenizer: str
  encoder: str
  options: Mapping[str, Any] = {}


class Family(NamedTuple):
  """The text encoders of a kind of pipeline.

  Attributes:
    pipeline: the class name in model_index.json without its end, "Pipeline".
    parts: its encoders.
    max_sequence_length: tokens a prompt (CLIP's aside, which are fixed), unless told otherwise.
    needs_t5: a pipeline that may do without T5 says False.
    gives: fields of the Condition that they make.
  """

  pipeline: str
  parts: tuple[Part, ...]
  max_sequence_length: int
  needs_t5: bool = True
  gives: tuple[str, ...] = ("text", "pooled")


# FLUX.2 reads the states after 9, 18 and 27 layers, and Z-Image the one before the last layer; the chat
# template opens the answer, which for FLUX.2 has thought already.
_FLUX2 = {"states": (9, 18, 27), "thinking": False}
_Z_IMAGE = {"states": (-2,), "thinking": True}

FAMILIES = {
  "sd3": Family(
    "StableDiffusion3",
    (
      Part("clip", "tokenizer", "text_encoder", {"projected": True}),
      Part("clip", "tokenizer_2", "text_encoder_2", {"projected": True}),
      Part("t5", "tokenizer_3", "text_encoder_3"),
    ),
    256,
    needs_t5=False,
  ),
  "flux": Family(
    "Flux",
    (
      Part("clip", "tokenizer", "text_encoder", {"projected": False}),
      Part("t5", "tokenizer_2", "text_encoder_2"),
    ),
    512,
  ),
  "flux2": Family(
    "Flux2Klein", (Part("qwen3", "tokenizer", "text_encoder", _FLUX2),), 512, gives=("text",)
  ),
  "z_image": Family(
    "ZImage",
    (Part("qwen3", "tokenizer", "text_encoder", _Z_IMAGE),),
    512,
    gives=("text", "length"),
  ),
}

FAMILIES["flux_kontext"] = FAMILIES["flux"]._replace(pipeline="FluxKontext")

# Pipelines of a family's classes that need more than text: how model_index.json calls them, what they do.
NOT_FROM_TEXT = (
  ("ControlNet", "a ControlNet, which follows a control picture"),
  ("FluxFill", "FLUX.1-Fill, which paints inside a mask of a picture"),
  ("FluxControl", "FLUX.1-Depth or FLUX.1-Canny, which follows a control picture"),
  ("Inpaint", "a pipeline that paints inside a mask of a picture"),
  ("FluxKontext", "FLUX.1-Kontext, which edits a picture (model.variant='flux_kontext')"),
  ("FluxPriorRedux", "FLUX.1-Redux, which varies a picture"),
  ("Flux2KleinKV", "FLUX.2-klein-KV, which edits pictures and keeps their keys and values"),
  ("ZImageOmni", "Z-Image-Omni, which edits pictures"),
  ("PAG", "a pipeline that perturbs attention for its guidance"),
)
_PARTS = sorted({part.encoder for family in FAMILIES.values() for part in family.parts})


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """model_index.json of a pipeline; ValueError where a field that is read is of another type."""
  index = hf_encoder.load_json(folder, INDEX_FILE)

  def check(field, fits, rule):
    if not fits(index.get(field)):
      raise ValueError(
        f"{pathlib.Path(folder) / INDEX_FILE}: {field}={index.get(field)!r}: must be {rule}. Fetch the file "
        "again."
      )

  def is_part(value):
    fits = lambda name: name is None or isinstance(name, str)
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(fits, value)))

  check("_class_name", lambda value: value and isinstance(value, str), "the class of the pipeline")
  check("is_distilled", lambda value: value is None or isinstance(value, bool), "true or false")
  for part in _PARTS:
    check(part, is_part, "a library and a class, or null for both")
  return index


def check_from_text(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError for a pipeline that paints from more than text."""
  found = read_index(folder)["_class_name"]
  what = [what for part, what in NOT_FROM_TEXT if part in found]
  if what:
    raise ValueError(
      f"model.path={str(folder)!r}: holds a {found}: {what[0]}. It must be a model that paints "
      "from text alone, such as black-forest-labs/FLUX.1-dev."
    )


def check_edits(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError for a pipeline that edits no pictures, or only inside a mask."""
  found = read_index(folder)["_class_name"]
  if found != f"{FAMILIES['flux_kontext'].pipeline}Pipeline":
    raise ValueError(
      f"model.path={str(folder)!r}: holds a {found}, and model.variant='flux_kontext' edits pictures with a "
      "FluxKontextPipeline. Point it at FLUX.1-Kontext, or set model.variant to what the folder holds."
    )


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Which text encoders, and what decides their output.

  Attributes:
    folder: a pipeline as the hub stores it, with model_index.json.
    family: a name of FAMILIES.
    max_sequence_length: T5's or Qwen3's tokens a prompt; None for the pipeline's default (SD3 256, the
      others 512; FLUX.1-schnell was made for 256).
    dtype: "float32" or "bfloat16", of weights, computation and embeddings.
    use_t5: False puts zeros in T5's place, as SD3 allows, even where T5 is in the folder.
  """

  folder: str | os.PathLike[str]
  family: str
  max_sequence_length: int | None = None
  dtype: str = "float32"
  use_t5: bool = True

  def __post_init__(self):
    registry.check(self.family, FAMILIES, field="family")
    registry.check(self.dtype, DTYPES, field="dtype")
    if self.family in ("flux", "flux_kontext") and not self.use_t5:
      raise ValueError("use_t5=False: FLUX reads nothing but T5's tokens. Set it to True.")
    if not 1 <= self.length <= MAX_LENGTH:
      raise ValueError(
        f"max_sequence_length={self.length}: must be 1 to {MAX_LENGTH}, as in diffusers."
      )

  @property
  def length(self) -> int:
    """T5's or Qwen3's tokens a prompt."""
    default = FAMILIES[self.family].max_sequence_length
    return default if self.max_sequence_length is None else self.max_sequence_length

  def parts(self) -> tuple[Part, ...]:
    """The encoders in use, as model_index.json says.

    Raises:
      ValueError: no pipeline folder, one of another family, or one without an encoder that it needs.
    """
    index, family = read_index(self.folder), FAMILIES[self.family]
    found = index["_class_name"]
    if not re.fullmatch(rf"{family.pipeline}(Img2Img)?Pipeline", found):
      raise ValueError(
        f"{str(self.folder)!r}: holds a {found}, but family={self.family!r} reads a "
        f"{family.pipeline}Pipeline. Set family to what the folder holds."
      )
    stored = [bool((index.get(part.encoder) or [None])[-1]) for part in family.parts]
    missing = [part.encoder for part, there in zip(family.parts, stored) if not there]
    if family.needs_t5 and missing:
      raise ValueError(
        f"{str(self.folder)!r}: {family.pipeline} needs {missing[0]}, which it has not. Fetch the folder "
        "again."
      )
    in_use = lambda part, there: part.kind != "t5" or (there and self.use_t5)
    return tuple(part for part, there in zip(family.parts, stored) if in_use(part, there))
