"""Which foreign models can be read: one line each."""

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from tpgrpo_jax.models import clip, dina, flux, flux2, flux2_vae, mmdit, t5, tiny_vae, vae, z_image
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf import dina as hf_dina
from tpgrpo_jax.models.hf import files, sd3
from tpgrpo_jax.models.hf import flux as hf_flux
from tpgrpo_jax.models.hf import flux2 as hf_flux2
from tpgrpo_jax.models.hf import t5 as hf_t5
from tpgrpo_jax.models.hf import vae as hf_vae
from tpgrpo_jax.models.hf import z_image as hf_z_image
from tpgrpo_jax.models.hf.table import Architecture, Entry, read_sizes

_CLIP_TEXT = Architecture(
  clip.CLIPTextConfig, clip.CLIPTextConfig.from_transformers, hf_clip.names, hf_clip.aliases
)
# What config.json calls the model ("_class_name" in diffusers, "architectures" in transformers).
ARCHITECTURES = {
  "SD3Transformer2DModel": Architecture(
    mmdit.MMDiTConfig, mmdit.MMDiTConfig.from_diffusers, sd3.names
  ),
  # No file says so: what a reward reads of the transformer above, for adapters on it.
  "DiNaBackbone": Architecture(
    dina.BackboneConfig, dina.BackboneConfig.from_diffusers, hf_dina.names
  ),
  "FluxTransformer2DModel": Architecture(
    flux.FluxConfig,
    flux.FluxConfig.from_diffusers,
    hf_flux.names,
    adapters=hf_flux.rename_adapters,
  ),
  "Flux2Transformer2DModel": Architecture(
    flux2.Flux2Config,
    flux2.Flux2Config.from_diffusers,
    hf_flux2.names,
    adapters=hf_flux2.rename_adapters,
    containers=hf_flux2.CONTAINERS,
  ),
  "ZImageTransformer2DModel": Architecture(
    z_image.ZImageConfig,
    z_image.ZImageConfig.from_diffusers,
    hf_z_image.names,
    adapters=hf_z_image.rename_adapters,
  ),
  "AutoencoderKLFlux2": Architecture(
    flux2_vae.Flux2VAEConfig, flux2_vae.Flux2VAEConfig.from_diffusers, hf_vae.names, hf_vae.aliases
  ),
  "AutoencoderKL": Architecture(
    vae.VAEConfig, vae.VAEConfig.from_diffusers, hf_vae.names, hf_vae.aliases
  ),
  "AutoencoderTiny": Architecture(
    tiny_vae.TinyVAEConfig,
    tiny_vae.TinyVAEConfig.from_diffusers,
    hf_vae.names,
    hf_vae.decoder_aliases,
  ),
  "CLIPTextModel": _CLIP_TEXT,
  "CLIPTextModelWithProjection": _CLIP_TEXT,
  "CLIPVisionModelWithProjection": Architecture(
    clip.CLIPVisionConfig, clip.CLIPVisionConfig.from_transformers, hf_clip.names, hf_clip.aliases
  ),
  "CLIPModel": Architecture(
    clip.CLIPConfig, clip.CLIPConfig.from_transformers, hf_clip.names, hf_clip.aliases
  ),
  "T5EncoderModel": Architecture(
    t5.T5Config, t5.T5Config.from_transformers, hf_t5.names, hf_t5.aliases
  ),
}
_DEFAULT = "SD3Transformer2DModel"  # of a config.json that names no class


def load_config(
  folder: str | os.PathLike[str], *, subfolder: str = "", field: str = "model.path"
) -> Any:
  """Reads config.json into the config class of its architecture.

  Args:
    folder: of one model, of a pipeline, or a hub id "owner/name".
    subfolder: the part of a pipeline; not used where there is no such subfolder.
    field: the config field that holds `folder`, for messages.

  Raises:
    ValueError: no such folder or file, broken JSON, or a model that is not in ARCHITECTURES.
  """
  return read_architecture(files.resolve(folder, subfolder=subfolder, field=field), field)[1]


def read_architecture(folder: pathlib.Path, field: str) -> tuple[Architecture, Any]:
  """(line of the table, sizes) of the config.json in a local folder; raises as `load_config`."""
  path = folder / files.CONFIG_FILE
  if not path.is_file():
    raise ValueError(
      f"{field}={str(folder)!r}: no {files.CONFIG_FILE} in it. Point it at a model's folder in "
      "diffusers' layout."
    )
  raw = files.read_json(path)
  found = raw.get("architectures") or [_DEFAULT]
  found = [raw["_class_name"]] if "_class_name" in raw else found
  if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
    key, rule = ("_class_name", "a") if "_class_name" in raw else ("architectures", "a list of")
    raise ValueError(
      f"{path}: {key}={raw[key]!r}: must be {rule} class by name. Fetch the file again."
    )
  known = [name for name in found if name in ARCHITECTURES]
  if not known:
    raise ValueError(
      f"{path}: is a {' or '.join(found)}; this loader reads {', '.join(ARCHITECTURES)}."
    )
  architecture = ARCHITECTURES[known[0]]
  return architecture, read_sizes(architecture.config, architecture.read_config, raw, path)


def class_name(config: Any) -> str:
  """The foreign class whose sizes `config` holds; of several, the first in the table."""
  for name, architecture in ARCHITECTURES.items():
    if type(config) is architecture.config:
      return name
  raise TypeError(f"{type(config).__name__}: no architecture in the table has such a config.")


def names(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
  """The table of a model: our tensors {dotted path: shape} -> foreign tensors.

  Args:
    config: sizes, of a class in ARCHITECTURES.
    shapes: of all our tensors or of some, by dotted path.
  """
  return ARCHITECTURES[class_name(config)].names(config, shapes)


def module_names(config: Any, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
  """{path of a kernel: foreign names of its modules}, one name for each block of a stack."""
  modules: dict[str, list[str]] = {}
  for entry in names(config, kernels):
    modules.setdefault(entry.path, []).append(entry.name.removesuffix(".weight"))
  return modules


def config_text(config: Any) -> str:
  """The content of config.json."""
  return json.dumps({"_class_name": class_name(config), **config.__dict__}, indent=2) + "\n"
