"""The names of ImageReward's BLIP, as its authors' file has them and as transformers' BLIP models do."""

from collections.abc import Iterable, Mapping
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import blip, clip
from tpgrpo_jax.models.hf import encoder, files
from tpgrpo_jax.models.hf.table import Entry, make_entry

_VISION = "blip.visual_encoder"
# (pattern of our path, replacement), applied in order; the towers' own names first.
RENAMES = (
  (r"^vision_model\.blocks_0\.", f"{_VISION}.blocks."),
  (r"^vision_model\.class_embedding$", f"{_VISION}.cls_token"),
  (r"^vision_model\.position_embedding$", f"{_VISION}.pos_embed"),
  (r"^vision_model\.patch_embedding\b", f"{_VISION}.patch_embed.proj"),
  (r"^vision_model\.post_layernorm\b", f"{_VISION}.norm"),
  (r"\blayer_norm(1|2)\b", r"norm\1"),
  (r"\bself_attn\.to_out\b", "attn.proj"),
  (r"\bself_attn\.to_[qkv]\b", "attn.qkv"),
  (r"^text_encoder\.blocks_0\.", "blip.text_encoder.encoder.layer."),
  (r"^text_encoder\.norm\b", "blip.text_encoder.embeddings.LayerNorm"),
  (r"^text_encoder\.token_embedding$", "blip.text_encoder.embeddings.word_embeddings.weight"),
  (
    r"^text_encoder\.position_embedding$",
    "blip.text_encoder.embeddings.position_embeddings.weight",
  ),
  (r"\b(cross)?attention\.to_q\b", r"\1attention.self.query"),
  (r"\b(cross)?attention\.to_k\b", r"\1attention.self.key"),
  (r"\b(cross)?attention\.to_v\b", r"\1attention.self.value"),
  (r"\b(cross)?attention\.to_out\b", r"\1attention.output.dense"),
  (r"\b(cross)?attention\.norm\b", r"\1attention.output.LayerNorm"),
  (r"^(blip\.text_encoder\.encoder\.layer\.)norm\b", r"\1output.LayerNorm"),
  (r"^(blip\.text_encoder\.encoder\.layer\.)mlp\.linear_1\b", r"\1intermediate.dense"),
  (r"^(blip\.text_encoder\.encoder\.layer\.)mlp\.linear_2\b", r"\1output.dense"),
  (r"\bmlp\.linear_", "mlp.fc"),
  (r"\.(kernel|scale)$", ".weight"),
)
# (pattern of transformers' name, that of the authors), of the image tower; the text tower's are the same.
FROM_TRANSFORMERS = (
  (r"^blip\.vision_model\.embeddings\.class_embedding$", f"{_VISION}.cls_token"),
  (r"^blip\.vision_model\.embeddings\.position_embedding$", f"{_VISION}.pos_embed"),
  (r"^blip\.vision_model\.embeddings\.patch_embedding\.", f"{_VISION}.patch_embed.proj."),
  (r"^blip\.vision_model\.post_layernorm\.", f"{_VISION}.norm."),
  (r"^blip\.vision_model\.encoder\.layers\.(\d+)\.layer_norm", rf"{_VISION}.blocks.\1.norm"),
  (r"^blip\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv", rf"{_VISION}.blocks.\1.attn.qkv"),
  (r"^blip\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection",
   rf"{_VISION}.blocks.\1.attn.proj"),
  (r"^blip\.vision_model\.encoder\.layers\.(\d+)\.mlp\.", rf"{_VISION}.blocks.\1.mlp."),
)  # fmt: skip
# Parts of BLIP that ImageReward does not use, its head, which is read apart, and a count from 0.
_BESIDES = r"^(blip\.(vision_proj|text_proj|itm_head|temp)\b|mlp\.|.*\.position_ids$)"


def names(config: blip.BLIPConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a blip.BLIP: our tensors {dotted path: shape} -> those of ImageReward.pt.

  Queries, keys and values of the image tower are one tensor there: three entries have its name.
  """
  entries = []
  for path, shape in sorted(shapes.items()):
    if ".blocks_0." not in path:
      entries.append(_entry(config, path, None, rename(path), shape))
      continue
    for i in range(shape[0]):
      name = re.sub(r"\.(blocks|layer)\.", rf".\1.{i}.", rename(path), count=1)
      entries.append(_entry(config, path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> the name in ImageReward.pt, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def _entry(config, path, block, name, shape):
  if path == "vision_model.patch_embedding.kernel":
    p, c, d = config.vision.patch_size, config.vision.num_channels, config.vision.hidden_size
    return Entry(
        path, block, name, (d, c, p, p),
        lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
    )  # fmt: skip
  if name in (f"{_VISION}.cls_token", f"{_VISION}.pos_embed"):
    foreign = (1, *((1,) if len(shape) == 1 else ()), *shape)
    return Entry(
      path, block, name, foreign, lambda x: x.reshape(foreign), lambda x: x.reshape(shape)
    )
  third = re.search(r"\bself_attn\.to_([qkv])\.\w+$", path)
  if not third:
    return make_entry(path, block, name, shape)
  width, first = shape[-1], "qkv".index(third[1]) * shape[-1]
  margins = [(first, 2 * width - first), *[(0, 0)] * (len(shape) - 1)]
  return Entry(
      path, block, name, (3 * width, *shape[:-1]),
      lambda x: np.pad(x.T, margins),
      lambda x: x[first : first + width].T,
  )  # fmt: skip


def bare(name: str) -> str:
  """A tensor's name in ImageReward.pt, from any of the layouts that are read."""
  name = name.removeprefix("module.")
  for pattern, replacement in FROM_TRANSFORMERS:
    name = re.sub(pattern, replacement, name)
  return name


def aliases(found: Iterable[str]) -> dict[str, str]:
  """{the table's name: the file's name} of the tensors in a file."""
  named = {bare(name): name for name in found}
  return {name: file for name, file in named.items() if not re.match(_BESIDES, name)}


TABLE = encoder.Table(names, aliases)


def read_config(tensors: Mapping[str, files.Tensor], where: str) -> blip.BLIPConfig:
  """Both towers' sizes, from their tensors; every attention has heads of blip.HEAD_DIM.

  Raises:
    ValueError: not the tensors of ImageReward.
  """
  shapes = {bare(name): tensor.shape for name, tensor in tensors.items()}
  text, layer = "blip.text_encoder.embeddings", "blip.text_encoder.encoder.layer"
  count = lambda stem: len(
    {name[len(stem) :].split(".")[1] for name in shapes if name.startswith(f"{stem}.")}
  )
  try:
    width, channels, patch, _ = shapes[f"{_VISION}.patch_embed.proj.weight"]
    vision = clip.CLIPVisionConfig(
      hidden_size=width,
      intermediate_size=shapes[f"{_VISION}.blocks.0.mlp.fc1.weight"][0],
      num_hidden_layers=count(f"{_VISION}.blocks"),
      num_attention_heads=width // blip.HEAD_DIM,
      num_channels=channels,
      image_size=patch * round((shapes[f"{_VISION}.pos_embed"][1] - 1) ** 0.5),
      patch_size=patch,
      hidden_act="gelu",
      layer_norm_eps=1e-6,
    )
    vocabulary, width = shapes[f"{text}.word_embeddings.weight"]
    bert = blip.BERTConfig(
      vocab_size=vocabulary,
      hidden_size=width,
      intermediate_size=shapes[f"{layer}.0.intermediate.dense.weight"][0],
      num_hidden_layers=count(layer),
      max_position_embeddings=shapes[f"{text}.position_embeddings.weight"][0],
    )
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(
      f"{where}: holds {', '.join(sorted(tensors)[:4])} ...: must hold ImageReward's BLIP, with names such "
      f"as {_VISION}.pos_embed and {text}.word_embeddings.weight."
    ) from error
  if bert.hidden_size % blip.HEAD_DIM or vision.hidden_size % blip.HEAD_DIM:
    raise ValueError(
      f"{where}: towers of widths {vision.hidden_size} and {bert.hidden_size}: must be multiples of "
      f"{blip.HEAD_DIM}, as BLIP's are."
    )
  return blip.BLIPConfig(vision, bert)


def load_blip(
  folder: str | os.PathLike[str], *, file: str = "", dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """Loads a blip.BLIP from a file of ImageReward's tensors.

  Args:
    folder: holds the weights.
    file: of the weights; by default transformers' usual names are tried.
    dtype: float32 or bfloat16, of the weights and of the computation.
    shardings: as of encoder.load_encoder.

  Raises:
    ValueError: another kind of model, or weights that do not fit.
  """
  tensors = files.find_tensors(pathlib.Path(folder), file=file, field="path")
  config = read_config(tensors, f"path={str(folder)!r}")
  create = lambda rngs: blip.BLIP(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(
    folder, TABLE, config, create, file=file, dtype=dtype, shardings=shardings, rule="ImageReward"
  )
