"""Where the pipelines keep their text encoders, and what decides the embeddings."""

from collections.abc import Mapping
import dataclasses
import os
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
    pipeline: what the class name in model_index.json starts with.
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
    "ZImagePipeline",
    (Part("qwen3", "tokenizer", "text_encoder", _Z_IMAGE),),
    512,
    gives=("text", "length"),
  ),
}

FAMILIES["flux_kontext"] = FAMILIES["flux"]._replace(pipeline="FluxKontext")

# Pipelines of a family's classes that need more than text: what model_index.json calls them, what they do.
NOT_FROM_TEXT = {
  "FluxFillPipeline": "FLUX.1-Fill, which paints inside a mask of a picture",
  "FluxControlPipeline": "FLUX.1-Depth or FLUX.1-Canny, which follows a control picture",
  "FluxKontextPipeline": "FLUX.1-Kontext, which edits a picture (model.variant='flux_kontext')",
  "FluxPriorReduxPipeline": "FLUX.1-Redux, which varies a picture",
  "FluxControlNetPipeline": "a ControlNet, which follows a control picture",
  "StableDiffusion3ControlNetPipeline": "a ControlNet, which follows a control picture",
}


def check_from_text(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError for a pipeline that paints from more than text."""
  found = hf_encoder.load_json(folder, INDEX_FILE).get("_class_name", "")
  kind = re.sub(r"(Img2Img|Inpaint)(ing)?(?=Pipeline$)", "", found)
  if kind in NOT_FROM_TEXT:
    raise ValueError(
      f"model.path={str(folder)!r}: holds a {found}: {NOT_FROM_TEXT[kind]}. It must be a model that paints "
      "from text alone, such as black-forest-labs/FLUX.1-dev."
    )


def check_edits(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError for a pipeline that edits no pictures."""
  found = hf_encoder.load_json(folder, INDEX_FILE).get("_class_name", "")
  if not found.startswith(FAMILIES["flux_kontext"].pipeline):
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
    index = hf_encoder.load_json(self.folder, INDEX_FILE)
    family, found = FAMILIES[self.family], index.get("_class_name", "")
    if not re.match(rf"{family.pipeline}(?!\d)", found):
      raise ValueError(
        f"{str(self.folder)!r}: holds a {found}, but family={self.family!r} reads a "
        f"{family.pipeline.removesuffix('Pipeline')}Pipeline. Set family to what the folder holds."
      )
    stored = [bool((index.get(part.encoder) or [None])[-1]) for part in family.parts]
    missing = [part.encoder for part, there in zip(family.parts, stored) if not there]
    if family.needs_t5 and missing:
      raise ValueError(
        f"{str(self.folder)!r}: {family.pipeline.removesuffix('Pipeline')} needs {missing[0]}, which it has "
        "not."
      )
    in_use = lambda part, there: part.kind != "t5" or (there and self.use_t5)
    return tuple(part for part, there in zip(family.parts, stored) if in_use(part, there))
