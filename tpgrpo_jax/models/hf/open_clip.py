"""The names of open_clip's CLIP with a vision transformer, such as ViT-H-14, the model of HPSv2."""

from collections.abc import Iterable, Mapping
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.models import clip
from tpgrpo_jax.models.hf import encoder, files
from tpgrpo_jax.models.hf.table import Entry, make_entry

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
VIT_H_14 = {
  "embed_dim": 1024,
  "vision_cfg": {
    "image_size": 224,
    "layers": 32,
    "width": 1280,
    "head_width": 80,
    "patch_size": 14,
  },
  "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's model_configs/ViT-H-14.json."""

# What changes the computation and is not here (timm, ResNets, attention pools, ...) is refused.
_MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
_VISION_KEYS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}

# (pattern of our path, replacement), applied in order; the towers' own names first.
RENAMES = (
  (r"^text_model\.blocks_0\.", "transformer.resblocks."),
  (r"^vision_model\.blocks_0\.", "visual.transformer.resblocks."),
  (r"^text_model\.final_layer_norm\b", "ln_final"),
  (r"^text_model\.token_embedding$", "token_embedding.weight"),
  (r"^text_model\.position_embedding$", "positional_embedding"),
  (r"^vision_model\.position_embedding$", "visual.positional_embedding"),
  (r"^vision_model\.class_embedding$", "visual.class_embedding"),
  (r"^vision_model\.patch_embedding\b", "visual.conv1"),
  (r"^vision_model\.pre_layernorm\b", "visual.ln_pre"),
  (r"^vision_model\.post_layernorm\b", "visual.ln_post"),
  (r"^visual_projection\.kernel$", "visual.proj"),
  (r"^text_projection\.kernel$", "text_projection"),
  (r"\blayer_norm(1|2)\b", r"ln_\1"),
  (r"\bself_attn\.to_out\b", "attn.out_proj"),
  (r"\bself_attn\.to_[qkv]\.kernel$", "attn.in_proj_weight"),
  (r"\bself_attn\.to_[qkv]\.bias$", "attn.in_proj_bias"),
  (r"\bmlp\.linear_1\b", "mlp.c_fc"),
  (r"\bmlp\.linear_2\b", "mlp.c_proj"),
  (r"\.(kernel|scale)$", ".weight"),
)


def read_config(raw: Mapping[str, Any]) -> clip.CLIPConfig:
  """Sizes of both towers from a model_cfg of open_clip, that of its model_configs/*.json.

  Raises:
    ValueError: something in it that is not a plain vision transformer and a plain text tower.
  """
  vision, text = raw.get("vision_cfg", {}), raw.get("text_cfg", {})
  for part, known, name in (
    (raw, _MODEL_KEYS, "model_cfg"), (vision, _VISION_KEYS, "vision_cfg"), (text, _TEXT_KEYS, "text_cfg"),
  ):  # fmt: skip
    strange = sorted(set(part) - known)
    if strange or not isinstance(part.get("layers", 1), int):
      raise ValueError(
        f"{CONFIG_FILE}: {name} has {', '.join(strange) or 'the layers of a ResNet'}: must be a plain "
        f"vision transformer with a plain text tower, such as ViT-H-14, which has {', '.join(sorted(known))}."
      )
  act, width = "quick_gelu" if raw.get("quick_gelu") else "gelu", vision["width"]
  return clip.CLIPConfig(
    clip.CLIPTextConfig(
      vocab_size=text["vocab_size"],
      hidden_size=text["width"],
      intermediate_size=int(text["width"] * text.get("mlp_ratio", 4.0)),
      projection_dim=raw["embed_dim"],
      num_hidden_layers=text["layers"],
      num_attention_heads=text["heads"],
      max_position_embeddings=text["context_length"],
      hidden_act=act,
      eos_token_id=clip.LEGACY_EOS,  # open_clip, too, takes the largest id as the end
    ),
    clip.CLIPVisionConfig(
      hidden_size=width,
      intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
      projection_dim=raw["embed_dim"],
      num_hidden_layers=vision["layers"],
      num_attention_heads=width // vision.get("head_width", 64),
      image_size=vision["image_size"],
      patch_size=vision["patch_size"],
      hidden_act=act,
    ),
    raw["embed_dim"],
  )


def names(config: clip.CLIPConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table for a clip.CLIP: our tensors {dotted path: shape} -> open_clip's.

  Queries, keys and values are one tensor there: three entries have its name, and their `to_foreign`
  give a third each, zero elsewhere, which add up to it.
  """
  entries = []
  for path, shape in sorted(shapes.items()):
    if ".blocks_0." not in path:
      entries.append(_entry(config, path, None, rename(path), shape))
      continue
    for i in range(shape[0]):
      name = rename(path).replace("resblocks.", f"resblocks.{i}.", 1)
      entries.append(_entry(config, path, i, name, shape[1:]))
  return entries


def rename(path: str) -> str:
  """Our dotted path -> open_clip's name, block numbers aside."""
  for pattern, replacement in RENAMES:
    path = re.sub(pattern, replacement, path, count=1)
  return path


def _entry(config, path, block, name, shape):
  if name == "visual.conv1.weight":
    p, c, d = config.vision.patch_size, config.vision.num_channels, config.vision.hidden_size
    return Entry(
        path, block, name, (d, c, p, p),
        lambda x: x.reshape(p, p, c, d).transpose(3, 2, 0, 1),
        lambda x: x.transpose(2, 3, 1, 0).reshape(p * p * c, d),
    )  # fmt: skip
  if name in ("visual.proj", "text_projection"):  # parameters, laid out as ours and not as a Linear
    return Entry(path, block, name, shape, lambda x: x, lambda x: x, (0, 1))
  third = re.search(r"\bto_([qkv])\.\w+$", path)
  if not third:
    return make_entry(path, block, name, shape)
  width, first = shape[-1], "qkv".index(third[1]) * shape[-1]
  rest = [(0, 0)] * (len(shape) - 1)
  margins = [(first, 2 * width - first), *rest]
  return Entry(
      path, block, name, (3 * width, *shape[:-1]),
      lambda x: np.pad(x.T, margins),
      lambda x: x[first : first + width].T,
  )  # fmt: skip


def aliases(found: Iterable[str]) -> dict[str, str]:
  """{the table's name: the file's name}; an attention mask, which some files hold, is not needed."""
  return {name: name for name in found if name != "attn_mask"}


TABLE = encoder.Table(names, aliases)


def find_weights(folder: pathlib.Path) -> str:
  """The name of a folder's safetensors file, "" for transformers' usual ones.

  Raises:
    ValueError: several files, none of which has a usual name.
  """
  found = sorted(path.name for path in folder.glob("*.safetensors"))
  if encoder.WEIGHTS_FILE in found or any(folder.glob("model*.index*.json")):
    return ""
  usual = [name for name in WEIGHTS_FILES if name in found]
  if usual:
    return usual[0]
  if len(found) > 1:
    raise ValueError(
      f"{str(folder)!r}: holds {', '.join(found)}: must be one file, or one of them model.safetensors. "
      "Rename the one that is to be read."
    )
  return found[0] if found else ""


def is_open_clip(tensors: Iterable[str]) -> bool:
  """Whether tensors are named as open_clip names them, and not as transformers."""
  return any(name.startswith("visual.") for name in tensors)


def load_clip(
  folder: str | os.PathLike[str], *, file: str = "", dtype: Any = jnp.float32, shardings: Any = None
) -> encoder.Encoder:
  """Loads a clip.CLIP from a file of open_clip's tensors.

  Args:
    folder: holds the weights and, unless they are those of a ViT-H-14, open_clip_config.json.
    file: of the weights; by default transformers' usual names are tried.
    dtype: float32 or bfloat16, of the weights and of the computation.
    shardings: as of encoder.load_encoder.

  Raises:
    ValueError: another kind of model, or weights that do not fit.
  """
  path = pathlib.Path(folder) / CONFIG_FILE
  if path.is_file():
    raw, rule = files.read_json(path).get("model_cfg", {}), f"its {CONFIG_FILE}"
  else:
    raw, rule = VIT_H_14, f"ViT-H-14, which is expected where there is no {CONFIG_FILE}"
  try:
    config = read_config(raw)
  except KeyError as error:
    raise ValueError(f"{path}: its model_cfg has no {error}. Fetch it again.") from error
  create = lambda rngs: clip.CLIP(config, dtype=dtype, rngs=rngs)
  return encoder.load_encoder(
    folder, TABLE, config, create, file=file, dtype=dtype, shardings=shardings, rule=rule
  )
