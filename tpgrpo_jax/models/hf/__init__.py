"""Weights in diffusers' and transformers' layout: the only place that knows foreign tensor names.

One table for each model (`names` of sd3.py and its neighbours) gives, for every tensor of ours, its
foreign name and the change of layout; loading, saving and adapters all read it. ARCHITECTURES lists
the tables. Only safetensors are read; nothing is ever unpickled.
"""

from tpgrpo_jax.models.hf.adapters import Adapter, load_lora, merge_lora, save_lora
from tpgrpo_jax.models.hf.architectures import (
  ARCHITECTURES,
  class_name,
  load_config,
  module_names,
  names,
)
from tpgrpo_jax.models.hf.files import CONFIG_FILE, WEIGHTS_FILE, fingerprint, resolve
from tpgrpo_jax.models.hf.load import load_params, load_transformer
from tpgrpo_jax.models.hf.save import save_transformer
from tpgrpo_jax.models.hf.table import Architecture, Entry, flatten, unflatten

__all__ = [
  "ARCHITECTURES",
  "CONFIG_FILE",
  "WEIGHTS_FILE",
  "Adapter",
  "Architecture",
  "Entry",
  "class_name",
  "fingerprint",
  "flatten",
  "load_config",
  "load_lora",
  "load_params",
  "load_transformer",
  "merge_lora",
  "module_names",
  "names",
  "resolve",
  "save_lora",
  "save_transformer",
  "unflatten",
]
