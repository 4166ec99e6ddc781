"""Prompt embeddings as diffusers' pipelines build them.

SD3 (StableDiffusion3Pipeline.encode_prompt): the penultimate states of CLIP-L and CLIP-G side by side,
padded with zeros to T5's width, then T5's tokens after them; pooled: both projections side by side.
FLUX.1 and FLUX.1-Kontext (FluxPipeline.encode_prompt): T5's tokens; pooled: CLIP-L's, without a projection.
FLUX.2 (Flux2KleinPipeline.encode_prompt): three states of Qwen3 side by side, those of padding too.
Z-Image (ZImagePipeline.encode_prompt): one state of Qwen3, and how many tokens are the prompt's.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import math
import pathlib
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.models.hf import architectures as hf_architectures
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf import encoder as hf_encoder
from tpgrpo_jax.models.hf import qwen3 as hf_qwen3
from tpgrpo_jax.models.hf import t5 as hf_t5
from tpgrpo_jax.models.hf import tokenizer as hf_tokenizer
from tpgrpo_jax.models.text_source import DTYPES, FAMILIES, Part, TextSource

BATCH_SIZE = 8
"""Prompts at once; T5-XXL's attention takes 64 MiB of float32 for each at 512 tokens."""

Shardings = Callable[[Any], Any]
"""Tree of shapes -> tree of NamedShardings on one mesh."""


class Kind(NamedTuple):
  """What a kind of text encoder does.

  Attributes:
    load: (folder, dtype, shardings, part) -> encoder.
    tokenize: (opened, prompts) -> (inputs of `run` with leading axis N, tokens of each whole prompt).
    run: (graphdef, weights, inputs) -> a tree of outputs with leading axis N.
  """

  load: Callable[..., hf_encoder.Encoder]
  tokenize: Callable[..., tuple[Any, list[int]]]
  run: Callable[[Any, Any, Any], Any]


class _Opened(NamedTuple):
  """A tokenizer and its encoder."""

  part: Part
  tokenizer: Any
  length: int
  encoder: hf_encoder.Encoder

  @property
  def name(self) -> str:
    return self.part.encoder


class Tokens(NamedTuple):
  """Tokenized prompts.

  Attributes:
    inputs: for each encoder by its folder, what it reads: arrays with leading axis N.
    cut: for each prompt, {encoder that does not see its end: tokens that this encoder reads}.
  """

  inputs: Mapping[str, Any]
  cut: Sequence[Mapping[str, int]]


class TextEncoders:
  """A pipeline's text encoders while they are loaded; leaving the `with` block frees their memory.

  Attributes:
    truncated: for each encoder by its folder, how many of the prompts embedded so far were too long.
  """

  def __init__(self, source: TextSource, opened: list[_Opened], t5_width: int = 0):
    self.source, self._opened, self._t5_width = source, opened, t5_width
    self.truncated = {part.name: 0 for part in opened}

  def __enter__(self) -> "TextEncoders":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Frees the weights on the devices at once; the encoders cannot be used afterwards."""
    for opened in self._opened:
      for leaf in jax.tree.leaves(opened.encoder.weights):
        leaf.delete()
    self._opened = []

  def embed(self, prompts: Sequence[str], *, batch_size: int = BATCH_SIZE) -> types.Condition:
    """Embeds prompts as encode_prompt of the pipeline does; "" is the empty negative prompt.

    Prompts beyond an encoder's limit lose their end there, with a warning and a count.

    Args:
      prompts: N of them.
      batch_size: prompts at once, rounded up to what the mesh divides; fewer are padded to it.

    Returns:
      Condition of NumPy arrays in the source's dtype: SD3 text [N, 77 + length, 4096] and pooled
      [N, 2048]; FLUX.1 text [N, length, 4096] and pooled [N, 768]; FLUX.2 text [N, length, 3 D] and Z-Image
      text [N, length, D], D being Qwen3's width, the latter with its own length [N] int32.

    Raises:
      ValueError: no prompts, closed encoders, or a tokenizer that does not belong to its encoder.
    """
    tokens = self.tokenize(prompts)
    for name, count in count_truncated(tokens.cut).items():
      self.truncated[name] += count
    return self.encode(tokens, batch_size=batch_size)

  def tokenize(self, prompts: Sequence[str]) -> Tokens:
    """Prompts -> the ids that each encoder reads; raises as `embed`."""
    if not self._opened:
      raise ValueError("these text encoders are closed. Open them again with load_text_encoders.")
    if not prompts:
      raise ValueError("prompts=[]: must be at least one.")
    inputs, cut = {}, [{} for _ in prompts]
    for opened in self._opened:
      inputs[opened.name], whole = KINDS[opened.part.kind].tokenize(opened, list(prompts))
      for mark, tokens in zip(cut, whole):
        if tokens > opened.length:
          mark[opened.name] = opened.length
    return Tokens(inputs, cut)

  def encode(self, tokens: Tokens, *, batch_size: int = BATCH_SIZE) -> types.Condition:
    """Tokens -> what `embed` returns."""
    outputs = {o.name: _run(o, tokens.inputs[o.name], batch_size) for o in self._opened}
    if not FAMILIES[self.source.family].needs_t5:
      shape = (len(tokens.cut), self.source.length, self._t5_width)
      outputs.setdefault("text_encoder_3", np.zeros(shape, DTYPES[self.source.dtype]))
    return _COMBINE[self.source.family](outputs, tokens.inputs)


def _combine_sd3(outputs, inputs):
  del inputs
  clips, t5 = [outputs[n] for n in ("text_encoder", "text_encoder_2")], outputs["text_encoder_3"]
  side_by_side = np.concatenate([output["penultimate"] for output in clips], axis=-1)
  missing = t5.shape[-1] - side_by_side.shape[-1]
  padded = np.pad(side_by_side, ((0, 0), (0, 0), (0, missing)))
  pooled = np.concatenate([output["projected"] for output in clips], axis=-1)
  text = np.concatenate([padded, t5], axis=1)
  return types.Condition(text, pooled)  # pyright: ignore[reportArgumentType]


def _combine_flux(outputs, inputs):
  del inputs
  return types.Condition(outputs["text_encoder_2"], outputs["text_encoder"]["pooled"])


def _combine_flux2(outputs, inputs):
  del inputs  # padding is read too
  return types.Condition(outputs["text_encoder"])


def _combine_z_image(outputs, inputs):
  _, length = inputs["text_encoder"]
  return types.Condition(outputs["text_encoder"], length=length)


_COMBINE = {
  "sd3": _combine_sd3,
  "flux": _combine_flux,
  "flux_kontext": _combine_flux,
  "flux2": _combine_flux2,
  "z_image": _combine_z_image,
}


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
  folder, dtype, opened = pathlib.Path(source.folder), DTYPES[source.dtype], []
  parts = source.parts()
  for part in parts:
    tokenizer = hf_tokenizer.load_tokenizer(part.kind, folder / part.tokenizer)
    encoder = KINDS[part.kind].load(folder / part.encoder, dtype, shardings, part)
    length = source.length
    if part.kind == "clip":
      # Both pipelines cut every CLIP's prompts to the length of the first tokenizer.
      length = opened[0].length if opened else tokenizer.model_max_length
      length = min(length, encoder.config.max_position_embeddings)
    opened.append(_Opened(part, tokenizer, length, encoder))
  width = 0
  if len(parts) < len(FAMILIES[source.family].parts):  # zeros in T5's place
    width = hf_architectures.load_config(folder / "transformer").joint_attention_dim
  return TextEncoders(source, opened, width)


def on_cpu(tree: Any) -> Any:
  """Shardings that put every weight into the host's memory, for encoders that run on the CPU."""
  kinds = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ("data",), axis_types=kinds, devices=jax.devices("cpu")[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.tree.map(lambda _: place, tree)


def _tokenize(opened, prompts):
  """(ids int32 [N, length], how many tokens each whole prompt has)."""
  options = dict(padding="max_length", max_length=opened.length, truncation=True)
  ids = _check_ids(opened, opened.tokenizer(prompts, **options)["input_ids"])
  return ids, [len(row) for row in opened.tokenizer(prompts, verbose=False)["input_ids"]]


def _tokenize_chat(opened, prompts):
  """((ids int32 [N, length], the prompt's share of them int32 [N]), tokens of each whole prompt)."""
  thinking = opened.part.options["thinking"]
  chats = [hf_tokenizer.render_chat(opened.tokenizer, p, thinking=thinking) for p in prompts]
  ids, whole = _tokenize(opened, chats)
  return (ids, np.minimum(whole, opened.length).astype(np.int32)), whole


def _check_ids(opened, ids):
  ids, size = np.asarray(ids, np.int32), opened.encoder.config.vocab_size
  if ids.max() >= size:
    raise ValueError(
      f"{opened.name}: its tokenizer gives id {ids.max()}, but vocab_size={size}. The tokenizer is "
      "another model's: fetch the folder again."
    )
  return ids


def _run(opened, inputs, batch_size):
  """The encoder's output of all inputs, as NumPy arrays.

  Every batch has the same size: one compilation serves all, and an embedding has the same bits
  whichever prompts are beside it.
  """
  leaf = jax.tree.leaves(opened.encoder.weights)[0]
  mesh = getattr(leaf.sharding, "mesh", None)
  shards = 1 if mesh is None else math.prod(n for a, n in mesh.shape.items() if a != "tensor")
  size = -(-batch_size // shards) * shards
  count = len(jax.tree.leaves(inputs)[0])
  run = functools.partial(
    KINDS[opened.part.kind].run, opened.encoder.graphdef, opened.encoder.weights
  )
  pad = lambda x: np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1), mode="edge")
  outputs = []
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    for start in range(0, count, size):
      batch = jax.tree.map(lambda x, i=start: pad(x[i : i + size]), inputs)
      output = jax.device_get(run(batch))
      outputs.append(jax.tree.map(lambda x, n=count - start: x[:n], output))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


# Compiled once for all encoders of one structure; weights are arguments, so none is kept alive.
@functools.partial(jax.jit, static_argnums=0)
def _run_clip(graphdef, weights, ids):
  output = nnx.merge(graphdef, weights)(ids)
  return {k: v for k, v in output._asdict().items() if v is not None and k != "last_hidden_state"}


@functools.partial(jax.jit, static_argnums=0)
def _run_t5(graphdef, weights, ids):
  return nnx.merge(graphdef, weights)(ids)


@functools.partial(jax.jit, static_argnums=0)
def _run_qwen3(graphdef, weights, inputs):
  return nnx.merge(graphdef, weights)(*inputs)


def _load_clip(folder, dtype, shardings, part):
  projected = part.options["projected"]
  return hf_clip.load_text(folder, projected=projected, dtype=dtype, shardings=shardings)


def _load_t5(folder, dtype, shardings, part):
  del part
  return hf_t5.load_t5(folder, dtype=dtype, shardings=shardings)


def _load_qwen3(folder, dtype, shardings, part):
  states = part.options["states"]
  return hf_qwen3.load_qwen3(folder, states, dtype=dtype, shardings=shardings)


KINDS = {
  "clip": Kind(_load_clip, _tokenize, _run_clip),
  "t5": Kind(_load_t5, _tokenize, _run_t5),
  "qwen3": Kind(_load_qwen3, _tokenize_chat, _run_qwen3),
}
