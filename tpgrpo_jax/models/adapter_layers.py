"""Linear layers with a low-rank adapter beside them."""

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import layers


class LoraParam(nnx.Param):
  """A weight of a low-rank adapter."""


class LoraLinear(layers.Linear):
  """A Linear with an adapter beside it: y + (alpha / rank) x A B (arXiv 2106.09685).

  Takes over the weights of `base`, so that their place in the tree stays the same. A kernel
  with leading axes (stacked blocks) gets an adapter for each of them.
  """

  def __init__(self, base: layers.Linear, lora_a: jax.Array, lora_b: jax.Array, scale: float):
    self.dtype, self.kernel, self.bias, self.scale = base.dtype, base.kernel, base.bias, scale
    self.lora_a, self.lora_b = LoraParam(lora_a), LoraParam(lora_b)

  def __call__(self, x):
    return together(x, self)[0]

  def add(self, x, low_rank):
    """x kernel + bias, and the adapter's part from x A."""
    b = self.lora_b[...].astype(self.dtype)
    zeros = jnp.zeros(b.shape[-1], self.dtype)
    return layers.kept(
      layers.fence(self._apply(x) + self.scale * layers.linear(low_rank, b, zeros))
    )


def together(x: jax.Array, *linears: layers.Linear) -> list[jax.Array]:
  """Each Linear of x. Of adapters x A is one product: each alone is much narrower than a matrix unit."""
  adapted = [each for each in linears if isinstance(each, LoraLinear)]
  if not adapted:
    return [each(x) for each in linears]
  cast = lambda a: a.astype(adapted[0].dtype)
  a = jnp.concatenate([cast(each.lora_a[...]) for each in adapted], axis=-1)
  low_rank = layers.kept(layers.linear(cast(x), a, jnp.zeros(a.shape[-1], a.dtype)))
  parts = iter(jnp.split(low_rank, len(adapted), axis=-1))
  return [each.add(x, next(parts)) if isinstance(each, LoraLinear) else each(x) for each in linears]
