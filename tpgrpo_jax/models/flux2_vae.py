"""The image autoencoder of FLUX.2, as diffusers' AutoencoderKLFlux2.

An AutoencoderKL whose scaled latents are squares of 2 x 2 latents, packed into the channels, and normalised
channel by channel with the statistics of a BatchNorm that the file holds.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import flux, layers, vae


@dataclasses.dataclass(frozen=True)
class Flux2VAEConfig(vae.VAEConfig):
  """Sizes, under the names (and with the defaults) of diffusers' config.json.

  Attributes:
    decoder_block_out_channels: those of the decoder, where they differ (FLUX.2's small decoder).
    batch_norm_eps: added to the variance of a channel.
  """

  CLASS: ClassVar[str] = "AutoencoderKLFlux2"

  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 32
  decoder_block_out_channels: tuple[int, ...] | None = None
  batch_norm_eps: float = 1e-4

  @property
  def downscale(self) -> int:
    return super().downscale * flux.PACK

  @property
  def scaled_channels(self) -> int:
    return self.latent_channels * flux.PACK**2

  @property
  def decoder(self) -> vae.VAEConfig:
    widths = self.decoder_block_out_channels or self.block_out_channels
    return dataclasses.replace(self, block_out_channels=widths)

  def __post_init__(self):
    super().__post_init__()
    if self.decoder_block_out_channels is not None:
      self._check_widths("decoder_block_out_channels")
      if len(self.decoder_block_out_channels) != len(self.block_out_channels):
        raise ValueError(
          f"decoder_block_out_channels={self.decoder_block_out_channels}: must be as many as "
          f"block_out_channels={self.block_out_channels}. Fetch the file again."
        )

  @classmethod
  def from_diffusers(cls, config: Mapping[str, Any]) -> "Flux2VAEConfig":
    patch = config.get("patch_size", (flux.PACK, flux.PACK))
    if not isinstance(patch, list | tuple) or tuple(patch) != (flux.PACK, flux.PACK):
      raise ValueError(
        f"patch_size={patch!r}: must be [2, 2]; no other is known. Fetch the file again."
      )
    unused = ("patch_size", "batch_norm_momentum")
    rest = {k: v for k, v in config.items() if k not in unused}
    if rest.get("decoder_block_out_channels") is not None:
      rest["decoder_block_out_channels"] = tuple(rest["decoder_block_out_channels"])
    made = super().from_diffusers(rest)
    assert isinstance(made, cls)
    return made


class Statistics(nnx.Module):
  """Mean and variance of each channel of a packed latent, in float32."""

  def __init__(self, channels: int):
    self.running_mean = layers.Buffer(jnp.zeros((channels,), jnp.float32))
    self.running_var = layers.Buffer(jnp.ones((channels,), jnp.float32))


class AutoencoderKLFlux2(vae.AutoencoderKL):
  """Images <-> latents, as AutoencoderKL; scaled latents are packed and normalised."""

  def __init__(self, config: Flux2VAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
    super().__init__(config, dtype=dtype, rngs=rngs)
    self.bn, self.eps = Statistics(config.scaled_channels), config.batch_norm_eps

  def scale(self, latents: jax.Array) -> jax.Array:
    """Latents [N, 2 h, 2 w, c] -> packed and normalised [N, h, w, 4 c]."""
    n, height, width, _ = latents.shape
    packed = flux.pack_latents(latents).reshape(n, height // flux.PACK, width // flux.PACK, -1)
    mean, std = self._moments()
    return (packed - mean) / std

  def unscale(self, latents: jax.Array) -> jax.Array:
    n, height, width, channels = latents.shape
    mean, std = self._moments()
    packed = (latents * std + mean).reshape(n, -1, channels)
    return flux.unpack_latents(packed, height * flux.PACK, width * flux.PACK)

  def _moments(self):
    mean, variance = (
      x[...].astype(jnp.float32) for x in (self.bn.running_mean, self.bn.running_var)
    )
    return mean, jnp.sqrt(variance + self.eps)
