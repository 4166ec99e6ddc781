"""Prompt embeddings of Stable Diffusion 3 and FLUX.1, as diffusers' two pipelines build them.

SD3 (StableDiffusion3Pipeline.encode_prompt): the penultimate states of CLIP-L and CLIP-G side by side,
padded with zeros to T5's width, then T5's tokens after them; pooled: both projections side by side.
FLUX (FluxPipeline.encode_prompt): T5's tokens; pooled: CLIP-L's, without a projection.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import registry, types
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf import encoder as hf_encoder
from tpgrpo_jax.models.hf import t5 as hf_t5
from tpgrpo_jax.models.hf import tokenizer as hf_tokenizer

MAX_LENGTH = 512  # diffusers refuses more
INDEX_FILE = "model_index.json"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
BATCH_SIZE = 8
"""Prompts at once; T5-XXL's attention takes 64 MiB of float32 for each at 512 tokens."""

Shardings = Callable[[Any], Any]
"""Tree of shapes -> tree of NamedShardings on one mesh."""


class Family(NamedTuple):
  """Where a pipeline keeps its encoders.

  Attributes:
    pipeline: what the class name in model_index.json starts with.
    clips: (tokenizer's folder, encoder's folder) of each CLIP.
    t5: the same of T5.
    projected: whether the pooled embedding is CLIP's projection.
    max_sequence_length: T5 tokens a prompt, unless told otherwise.
  """

  pipeline: str
  clips: tuple[tuple[str, str], ...]
  t5: tuple[str, str]
  projected: bool
  max_sequence_length: int


FAMILIES = {
  "sd3": Family(
    "StableDiffusion3",
    (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
    ("tokenizer_3", "text_encoder_3"),
    True,
    256,
  ),
  "flux": Family(
    "Flux", (("tokenizer", "text_encoder"),), ("tokenizer_2", "text_encoder_2"), False, 512
  ),
}


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Which text encoders, and what decides their output.

  Attributes:
    folder: a pipeline as the hub stores it, with model_index.json.
    family: "sd3" or "flux".
    max_sequence_length: T5 tokens a prompt; None for the pipeline's default (SD3 256, FLUX 512; FLUX
      schnell was made for 256).
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
    if self.family == "flux" and not self.use_t5:
      raise ValueError("use_t5=False: FLUX reads nothing but T5's tokens. Set it to True.")
    if not 1 <= self.length <= MAX_LENGTH:
      raise ValueError(
        f"max_sequence_length={self.length}: must be 1 to {MAX_LENGTH}, as in diffusers."
      )

  @property
  def length(self) -> int:
    """T5 tokens a prompt."""
    default = FAMILIES[self.family].max_sequence_length
    return default if self.max_sequence_length is None else self.max_sequence_length

  def has_t5(self) -> bool:
    """Reads from model_index.json whether T5 is to be used.

    Raises:
      ValueError: no pipeline folder, one of another family, or a FLUX pipeline without T5.
    """
    index = hf_encoder.load_json(self.folder, INDEX_FILE)
    family, found = FAMILIES[self.family], index.get("_class_name", "")
    if not found.startswith(family.pipeline):
      raise ValueError(
        f"{str(self.folder)!r}: holds a {found}, but family={self.family!r} reads a "
        f"{family.pipeline}Pipeline. Set family to what the folder holds."
      )
    stored = bool((index.get(family.t5[1]) or [None])[-1])
    if self.family == "flux" and not stored:
      raise ValueError(f"{str(self.folder)!r}: FLUX needs {family.t5[1]}, which it has not.")
    return stored and self.use_t5


class _Opened(NamedTuple):
  """A tokenizer and its encoder; `run` is (graphdef, weights, ids) -> the encoder's output."""

  name: str
  tokenizer: Any
  length: int
  encoder: hf_encoder.Encoder
  run: Callable[[Any, Any, Any], Any]


class Tokens(NamedTuple):
  """Tokenized prompts.

  Attributes:
    ids: for each encoder by its folder, int32 [N, length].
    cut: for each prompt, {encoder that does not see its end: tokens that this encoder reads}.
  """

  ids: Mapping[str, np.ndarray]
  cut: Sequence[Mapping[str, int]]


class TextEncoders:
  """A pipeline's text encoders while they are loaded; leaving the `with` block frees their memory.

  Attributes:
    truncated: for each encoder by its folder, how many of the prompts embedded so far were too long.
  """

  def __init__(self, source: TextSource, clips: list[_Opened], t5: _Opened | None, t5_width: int):
    self.source, self._clips, self._t5, self._t5_width = source, clips, t5, t5_width
    self.truncated = {opened.name: 0 for opened in self._all()}

  def __enter__(self) -> "TextEncoders":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Frees the weights on the devices at once; the encoders cannot be used afterwards."""
    for opened in self._all():
      for leaf in jax.tree.leaves(opened.encoder.weights):
        leaf.delete()
    self._clips, self._t5 = [], None

  def embed(self, prompts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> types.Condition:
    """Embeds prompts as encode_prompt of the pipeline does; "" is the empty negative prompt.

    Prompts beyond an encoder's limit lose their end there, with a warning and a count.

    Args:
      prompts: N of them.
      batch_size: prompts at once, rounded up to what the mesh divides; fewer are padded to it.

    Returns:
      Condition of NumPy arrays in the source's dtype: SD3 text [N, 77 + length, 4096] and pooled
      [N, 2048]; FLUX text [N, length, 4096] and pooled [N, 768].

    Raises:
      ValueError: no prompts, closed encoders, or a tokenizer that does not belong to its encoder.
    """
    tokens = self.tokenize(prompts)
    for name, count in count_truncated(tokens.cut).items():
      self.truncated[name] += count
    return self.encode(tokens, batch_size=batch_size)

  def tokenize(self, prompts: Sequence[str]) -> Tokens:
    """Prompts -> the ids that each encoder reads; raises as `embed`."""
    if not self._clips:
      raise ValueError("these text encoders are closed. Open them again with load_text_encoders.")
    if not prompts:
      raise ValueError("prompts=[]: must be at least one.")
    ids, cut = {}, [{} for _ in prompts]
    for opened in self._all():
      ids[opened.name], whole = _tokenize(opened, list(prompts))
      for mark, tokens in zip(cut, whole):
        if tokens > opened.length:
          mark[opened.name] = opened.length
    return Tokens(ids, cut)

  def encode(self, tokens: Tokens, *, batch_size: int = BATCH_SIZE) -> types.Condition:
    """Tokens -> what `embed` returns."""
    combine = {"sd3": _combine_sd3, "flux": _combine_flux}[self.source.family]
    run = lambda opened: _run(opened, tokens.ids[opened.name], batch_size)
    clips = [run(opened) for opened in self._clips]
    if self._t5 is not None:
      return combine(clips, run(self._t5))
    shape = (len(tokens.cut), self.source.length, self._t5_width)
    return combine(clips, np.zeros(shape, DTYPES[self.source.dtype]))

  def _all(self):
    return [*self._clips, *([self._t5] if self._t5 else [])]


def _combine_sd3(clips, t5):
  side_by_side = np.concatenate([output["penultimate"] for output in clips], axis=-1)
  missing = t5.shape[-1] - side_by_side.shape[-1]
  padded = np.pad(side_by_side, ((0, 0), (0, 0), (0, missing)))
  pooled = np.concatenate([output["projected"] for output in clips], axis=-1)
  text = np.concatenate([padded, t5], axis=1)
  return types.Condition(text, pooled)  # pyright: ignore[reportArgumentType]


def _combine_flux(clips, t5):
  return types.Condition(t5, clips[0]["pooled"])


def count_truncated(cut: Sequence[Mapping[str, int]]) -> dict[str, int]:
  """{encoder: how many prompts are too long for it}, and one warning for each encoder with any.

  Args:
    cut: for each prompt, {encoder that does not see its end: tokens that this encoder reads}.
  """
  limits = {name: limit for mark in cut for name, limit in mark.items()}
  counts = {name: sum(name in mark for mark in cut) for name in sorted(limits)}
  for name, count in counts.items():
    warnings.warn(
      f"{count} of {len(cut)} prompts have more than the {limits[name]} tokens that {name} reads: "
      "it does not see their end.",
      stacklevel=3,
    )
  return counts


def load_text_encoders(source: TextSource, *, shardings: Shardings | None = None) -> TextEncoders:
  """Loads the tokenizers and text encoders of a pipeline folder.

  Args:
    source: the folder and what decides the embeddings.
    shardings: where the weights go, such as training.mesh.param_shardings of a mesh, or
      `on_cpu`; by default the default device.

  Raises:
    ValueError: a wrong or partial folder, or weights that do not fit; the file is named.
  """
  family, folder, dtype = FAMILIES[source.family], pathlib.Path(source.folder), DTYPES[source.dtype]
  kw = dict(dtype=dtype, shardings=shardings)
  has_t5 = source.has_t5()
  clips = []
  for tokenizer_name, name in family.clips:
    encoder = hf_clip.load_text(folder / name, projected=family.projected, **kw)
    tokenizer = hf_tokenizer.load_tokenizer("clip", folder / tokenizer_name)
    # Both pipelines cut every CLIP's prompts to the length of the first tokenizer.
    length = clips[0].length if clips else tokenizer.model_max_length
    length = min(length, encoder.config.max_position_embeddings)
    clips.append(_Opened(name, tokenizer, length, encoder, _run_clip))
  if not has_t5:
    transformer = hf_encoder.load_json(folder / "transformer")
    return TextEncoders(source, clips, None, transformer["joint_attention_dim"])
  tokenizer_name, name = family.t5
  tokenizer = hf_tokenizer.load_tokenizer("t5", folder / tokenizer_name)
  encoder = hf_t5.load_t5(folder / name, **kw)
  t5 = _Opened(name, tokenizer, source.length, encoder, _run_t5)
  return TextEncoders(source, clips, t5, encoder.config.d_model)


def on_cpu(tree: Any) -> Any:
  """Shardings that put every weight into the host's memory, for encoders that run on the CPU."""
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("data",), axis_types=kinds, devices=jax.devices("cpu")[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda _: place, tree)


def _tokenize(opened, prompts):
  """(ids int32 [N, length], how many tokens each whole prompt has)."""
  options = dict(padding="max_length", max_length=opened.length, truncation=True)
  ids = np.asarray(opened.tokenizer(prompts, **options)["input_ids"], np.int32)
  size = opened.encoder.config.vocab_size
  if ids.max() >= size:
    raise ValueError(
      f"{opened.name}: its tokenizer gives id {ids.max()}, but vocab_size={size}. The tokenizer is "
      "another model's: fetch the folder again."
    )
  return ids, [len(row) for row in opened.tokenizer(prompts, verbose=False)["input_ids"]]


def _run(opened, ids, batch_size):
  """The encoder's output of all ids, as NumPy arrays.

  Every batch has the same size: one compilation serves all, and an embedding has the same bits
  whichever prompts are beside it.
  """
  leaf = jax.tree.leaves(opened.encoder.weights)[0]
  mesh = getattr(leaf.sharding, "mesh", None)
  shards = 1 if mesh is None else math.prod(n for a, n in mesh.shape.items() if a != "tensor")
  size = -(-batch_size // shards) * shards
  outputs = []
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    for start in range(0, len(ids), size):
      batch = ids[start : start + size]
      padded = np.pad(batch, ((0, size - len(batch)), (0, 0)), mode="edge")
      output = jax.device_get(opened.run(opened.encoder.graphdef, opened.encoder.weights, padded))
      outputs.append(jax.tree.map(lambda x, n=len(batch): x[:n], output))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


# Compiled once for all encoders of one structure; weights are arguments, so none is kept alive.
@functools.partial(jax.jit, static_argnums=0)
def _run_clip(graphdef, weights, ids):
  output = nnx.merge(graphdef, weights)(ids)
  return {k: v for k, v in output._asdict().items() if v is not None and k != "last_hidden_state"}


@functools.partial(jax.jit, static_argnums=0)
def _run_t5(graphdef, weights, ids):
  return nnx.merge(graphdef, weights)(ids)
