"""The names of diffusers' AutoencoderKL, AutoencoderKLFlux2 and AutoencoderTiny."""

from collections.abc import Iterable, Mapping
import re

from tpgrpo_jax.models import tiny_vae, vae
from tpgrpo_jax.models.hf.table import Entry, make_entry

# (pattern of our path, replacement); each is applied once.
RENAMES = ((r"\.to_out\.", ".to_out.0."), (r"\.(kernel|scale)$", ".weight"))
# Attention of checkpoints that older versions of diffusers wrote, by its present name.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
UNUSED = ("bn.num_batches_tracked",)  # torch counts what the statistics of FLUX.2 were made of


def names(
  config: vae.VAEConfig | tiny_vae.TinyVAEConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
  """The table for an autoencoder: our tensors {dotted path: shape} -> diffusers' tensors.

  Args:
    config: sizes; the paths alone decide here.
    shapes: shape of every tensor of ours by dotted path.
  """
  del config
  return [_entry(path, shape) for path, shape in sorted(shapes.items())]


def current_name(name: str) -> str:
  """The present name of a tensor in a checkpoint of any age."""
  pattern = rf"\.attentions\.(\d+)\.({'|'.join(OLD_NAMES)})\.(weight|bias)$"
  return re.sub(pattern, lambda m: f".attentions.{m[1]}.{OLD_NAMES[m[2]]}.{m[3]}", name)


def aliases(found: Iterable[str]) -> dict[str, str]:
  """{the table's name: the file's name} of the tensors in a file."""
  return {current_name(name): name for name in found if name not in UNUSED}


def decoder_aliases(found: Iterable[str]) -> dict[str, str]:
  """The same of an AutoencoderTiny, of which the encoder is not read."""
  return {name: name for name in found if not name.startswith("encoder.")}


def _entry(path, shape):
  name = path
  for pattern, replacement in RENAMES:
    name = re.sub(pattern, replacement, name, count=1)
  if len(shape) == 4:
    height, width, d_in, d_out = shape
    return Entry(
      path, None, name, (d_out, d_in, height, width),
      lambda x: x.transpose(3, 2, 0, 1),
      lambda x: x.transpose(2, 3, 1, 0),
    )  # fmt: skip
  return make_entry(path, None, name, shape)
