"""The sizes of the image autoencoders, as diffusers' config.json has them."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any, ClassVar

# What diffusers offers and this module does not: field -> the one value it knows.
_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# Of diffusers' own tiling and upcasting: they say nothing about the weights.
_UNUSED = ("sample_size", "force_upcast")


def read_fields(
  cls: Any, config: Mapping[str, Any], *, fixed: Mapping[str, Any], unused: Collection[str]
) -> dict[str, Any]:
  """Of diffusers' config.json, the fields that a config class has.

  Args:
    cls: the class.
    config: the file; fields that start with "_" describe it, and not the model.
    fixed: field -> the one value that is known here.
    unused: fields that say nothing here.

  Raises:
    ValueError: a field that is in none of these, or a fixed one of another value.
  """
  names = {f.name for f in dataclasses.fields(cls)}
  known = names.union(fixed, unused)
  unknown = sorted(k for k in config if not k.startswith("_") and k not in known)
  if unknown:
    raise ValueError(f"{', '.join(unknown)}: not fields of {cls.CLASS}.")
  for field, value in fixed.items():
    if config.get(field, value) != value:
      raise ValueError(f"{field}={config[field]!r}: must be {value!r}; no other kind is known.")
  return {k: v for k, v in config.items() if k in names}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes, under the names (and with the defaults) of diffusers' config.json.

  Attributes:
    block_out_channels: channels at each resolution, the image's own first.
    layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
    scaling_factor: scaled latent = (latent - shift_factor) x scaling_factor.
    shift_factor: None is 0.
    use_quant_conv: a 1 x 1 convolution after the encoder; SD3 and FLUX.1 have none.
    use_post_quant_conv: a 1 x 1 convolution before the decoder; likewise.
  """

  CLASS: ClassVar[str] = "AutoencoderKL"

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  @property
  def downscale(self) -> int:
    """Pixels a scaled latent, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)

  @property
  def decoder(self) -> "VAEConfig":
    """The sizes of the decoder."""
    return self

  @property
  def scaled_channels(self) -> int:
    """Of a scaled latent."""
    return self.latent_channels

  def __post_init__(self):
    self._check_widths("block_out_channels")

  def _check_widths(self, field):
    widths = getattr(self, field)
    if not widths or any(c < 1 or c % self.norm_num_groups for c in widths):
      raise ValueError(
        f"{field}={widths}: must be one or more multiples of norm_num_groups={self.norm_num_groups}. "
        "Change either."
      )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model.

    Raises:
      ValueError: a field that the class lacks, or a kind of block that is not known here.
    """
    known = read_fields(cls, config, fixed=_FIXED, unused=(*_BLOCK_TYPES, *_UNUSED))
    if "block_out_channels" in known:
      known["block_out_channels"] = tuple(known["block_out_channels"])
    made = cls(**known)
    for field, kind in _BLOCK_TYPES.items():
      wanted = (kind,) * len(made.block_out_channels)
      found = config.get(field, wanted)
      if not isinstance(found, list | tuple) or tuple(found) != wanted:
        raise ValueError(
          f"{field}={config[field]!r}: must be {kind!r} for each of block_out_channels="
          f"{made.block_out_channels}; no other kind is known. Fetch the file again."
        )
    return made
