"""The names of transformers' CLIPModel, CLIPTextModel and CLIPVisionModel, with projections or without."""

from collections.abc import Iterable, Mapping
import dataclasses
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from tpgrpo_jax.models import clip
from tpgrpo_jax.models.hf import encoder
from tpgrpo_jax.models.hf.table import Entry, make_entry

# (pattern of our path, replacement), applied in order.
RENAMES = (
  (r"\b(token_embedding|position_embedding)$", r"embeddings.\1.weight"),
  (r"\b(class_embedding|patch_embedding)\b", r"embeddings.\1"),
  (r"\bpre_layernorm\b", "pre_layrnorm"),  # sic
  (r"\bto_(q|k|v|out)\b", r"\1_proj"),
  (r"\bmlp\.linear_", "mlp.fc"),
  (r"\.(kernel|scale)$", ".weight"),
)


def names(
  config: clip.CLIPTextConfig | clip.CLIPVisionConfig | clip.CLIPConfig,
  shapes: Mapping[str, tuple[int, ...]],
) -> list[Entry]:
  """The table for a CLIPText, a CLIPVision or a CLIP: our tensors {dotted path: shape} -> theirs.

  Args:
    config: sizes.
    shapes: shape of every tensor of ours by dotted path.
  """
  entries = []
  for path, shape in sorted(shapes.items()):
    tower, in_stack, rest = path.partition(".blocks_0.")
    if not in_stack:
      entries.append(_entry(config, path, shape))
      continue
    for i in range(shape[0]):
      name = rename(f"{tower}.encoder.layers.{i}.{rest}")
      entries.append(make_entry(path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> transformers' name, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def aliases(found: Iterable[str]) -> dict[str, str]:
  """{the table's name: the file's name} of the tensors in a file.

  transformers 5 saves a CLIPTextModel without the "text_model." that every older file has, and
  files from before 4.31 hold position_ids, a count from 0, which nothing needs.
  """
  renamed = {}
  for name in found:
    if name.endswith("embeddings.position_ids"):
      continue
    bare = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    renamed[f"text_model.{name}" if bare else name] = name
  return renamed


def _entry(config, path, shape):
  name = rename(path)
  if not path.endswith("patch_embedding.kernel"):
    return make_entry(path, None, name, shape)
  vision = config.vision if isinstance(config, clip.CLIPConfig) else config
  p, c, d = vision.patch_size, vision.num_channels, vision.hidden_size
  return Entry(
      path, None, name, (d, c, p, p),
      lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
      lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
  )  # fmt: skip


TABLE = encoder.Table(names, aliases)


def load_text(
  folder: str | os.PathLike[str],
  *,
  projected: bool,
  dtype: Any = jnp.float32,
  shardings: Any = None,
) -> encoder.Encoder:
  """Loads a clip.CLIPText from the folder of a CLIPTextModelWithProjection, or of a CLIPTextModel.

  Args:
    folder: holds config.json and the weights.
    projected: whether there is a projection.
    dtype: float32 or bfloat16, of the weights and of the computation.
    shardings: as of encoder.load_encoder.

  Raises:
    ValueError: another kind of model, or weights that do not fit.
  """
  config = encoder.read_config(clip.CLIPTextConfig, folder)
  create = lambda rngs: clip.CLIPText(config, projected=projected, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(folder, TABLE, config, create, dtype=dtype, shardings=shardings)


def load_vision(
  folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """Loads a clip.CLIPVision from the folder of a CLIPVisionModelWithProjection; as `load_text`.

  Of the folder of a CLIPModel, the image tower alone is read.
  """
  raw = encoder.load_json(folder)
  config = _vision_config(raw)
  is_alone = raw.get("model_type", "clip_vision_model") == "clip_vision_model"
  table = TABLE if is_alone else encoder.Table(names, _vision_aliases)
  create = lambda rngs: clip.CLIPVision(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(folder, table, config, create, dtype=dtype, shardings=shardings)


def _vision_config(raw, wrapped=False):
  """Of an image tower's config.json, or of a whole CLIP's; one that is wrapped may have any model_type."""
  if wrapped and "vision_config" not in raw:
    raw = {**raw, "model_type": "clip_vision_model"}
  if raw.get("model_type", "clip_vision_model") == "clip_vision_model":
    return clip.CLIPVisionConfig.from_transformers(raw)
  both = clip.CLIPConfig.from_transformers(raw)
  return dataclasses.replace(both.vision, projection_dim=both.projection_dim)


def bare(name: str) -> str:
  """A tensor's name without the wrappers that files of a tower and a head put before it."""
  return re.sub(r"^((module|model|aesthetic_model|aesthetics_predictor|predictor)\.)+", "", name)


def load_wrapped_vision(
  folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """`load_vision` of a file that holds a head beside the tower, as DiffSynth-Studio/ImageMetrics has it.

  Names may have a wrapper before them. Without a config.json the tower is taken for CLIP-L/14's.
  """
  config = clip.VIT_L_14.vision
  if (pathlib.Path(folder) / encoder.CONFIG_FILE).is_file():
    config = _vision_config(encoder.load_json(folder), wrapped=True)

  def towers_own(found):
    names = {bare(name): name for name in found}
    return {name: names[theirs] for name, theirs in _vision_aliases(names).items()}

  create = lambda rngs: clip.CLIPVision(config, dtype=dtype, rngs=rngs)
  table = encoder.Table(names, towers_own)
  rule = "its config.json, or without one CLIP-L/14"
  return encoder.load_encoder(
    folder, table, config, create, dtype=dtype, shardings=shardings, rule=rule
  )


def _vision_aliases(found):
  return {k: v for k, v in aliases(found).items() if k.startswith(("vision_model.", "visual_"))}


def load_clip(
  folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """Loads a clip.CLIP from the folder of a CLIPModel; as `load_text`."""
  config = encoder.read_config(clip.CLIPConfig, folder)
  create = lambda rngs: clip.CLIP(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(folder, TABLE, config, create, dtype=dtype, shardings=shardings)
