"""A small decoder of latents, as diffusers' AutoencoderTiny: TAESD3 and TAEF1 (github.com/madebyollin/taesd).

Only its decoder is here. It paints what credit alone looks at, the completions: 1.2 M weights, no norms and
no attention. The decoder of SD3 has 50 M, and takes eighteen times its operations.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import layers, vae, vae_config

# What diffusers offers and this module does not: field -> the one value it knows.
_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
# Of the encoder, of how latents are stored as bytes, and the decoder's widths under a second name.
_UNUSED = (
  "in_channels", "encoder_block_out_channels", "num_encoder_blocks", "latent_magnitude", "latent_shift",
  "force_upcast", "block_out_channels",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
  """Sizes, under the names (and with the defaults) of diffusers' config.json.

  Attributes:
    decoder_block_out_channels: channels at each resolution, that of the latents first.
    num_decoder_blocks: residual blocks at each resolution.
    latent_channels: of a latent; 16 for SD3 and FLUX.1.
    scaling_factor: as of vae.VAEConfig; TAESD takes scaled latents as they are.
    shift_factor: likewise.
  """

  CLASS: ClassVar[str] = "AutoencoderTiny"

  out_channels: int = 3
  decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
  num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
  latent_channels: int = 4
  scaling_factor: float = 1.0
  shift_factor: float = 0.0

  def __post_init__(self):
    widths, blocks = self.decoder_block_out_channels, self.num_decoder_blocks
    if not widths or len(widths) != len(blocks):
      raise ValueError(
        f"num_decoder_blocks={blocks}: must be one number for each of decoder_block_out_channels={widths}. "
        "Fetch the file again."
      )
    if min(blocks) < 1:
      raise ValueError(
        f"num_decoder_blocks={blocks}: must be at least 1 each. Fetch the file again."
      )
    if len({*widths}) > 1 or widths[0] < 1:
      raise ValueError(
        f"decoder_block_out_channels={widths}: must be one number of at least 1, again and again, since "
        "nothing changes the width between them. Fetch the file again."
      )

  @property
  def downscale(self) -> int:
    """Pixels a latent, along each side."""
    return 2 ** (len(self.num_decoder_blocks) - 1)

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "TinyVAEConfig":
    """Reads diffusers' config.json; fields that start with "_" describe the file, not the model.

    Raises:
      ValueError: a field that the class lacks, or a kind of layer that is not known here.
    """
    known = vae_config.read_fields(cls, config, fixed=_FIXED, unused=_UNUSED)
    for field in ("decoder_block_out_channels", "num_decoder_blocks"):
      if field in known:
        known[field] = tuple(known[field])
    return cls(**known)


class Relu(nnx.Module):
  """max(x, 0); it has a number of its own among the layers."""

  def __call__(self, x):
    return jax.nn.relu(x)


class Double(nnx.Module):
  """Twice the sides, by repetition."""

  def __call__(self, x):
    return vae.double(x)


class Block(nnx.Module):
  """relu(x + three convolutions of x), as wide as x."""

  def __init__(self, dim, *, dtype, rngs):
    conv = lambda: vae.Conv(dim, dim, dtype=dtype, rngs=rngs)
    self.conv = nnx.List([conv(), Relu(), conv(), Relu(), conv()])

  def __call__(self, x):
    return jax.nn.relu(vae.chain(x, *self.conv) + x)


class Decoder(nnx.Module):
  """Latents [N, h, w, latent_channels] -> [N, H, W, out_channels], about [0, 1]."""

  def __init__(self, config: TinyVAEConfig, *, dtype, rngs):
    kw = dict(dtype=dtype, rngs=rngs)
    widths, last = config.decoder_block_out_channels, len(config.num_decoder_blocks) - 1
    found = [vae.Conv(config.latent_channels, widths[0], **kw), Relu()]
    for i, (width, count) in enumerate(zip(widths, config.num_decoder_blocks)):
      found += [Block(width, **kw) for _ in range(count)]
      if i < last:
        found += [Double(), vae.Conv(width, width, biased=False, **kw)]
    self.layers = nnx.List([*found, vae.Conv(widths[-1], config.out_channels, **kw)])

  def __call__(self, x):
    return vae.chain(jnp.tanh(x / 3) * 3, *self.layers)


class AutoencoderTiny(nnx.Module):
  """Latents -> images, with the methods that vae.decode calls."""

  def __init__(self, config: TinyVAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.config, self.dtype = config, dtype
    self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

  def pixels(self, x: jax.Array) -> jax.Array:
    """Latents [N, h, w, c] -> pixels [N, H, W, c], about [-1, 1]."""
    return self.decoder(layers.lay_out(x.astype(self.dtype))).astype(jnp.float32) * 2.0 - 1.0

  def unscale(self, latents: jax.Array) -> jax.Array:
    """Latents as the diffusion model makes them -> as the decoder takes them."""
    return latents / self.config.scaling_factor + self.config.shift_factor
