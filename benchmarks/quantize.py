"""What quantised frozen weights save and cost: python benchmarks/quantize.py

Prints one JSON line for int8 and one for nf4.

gib            Frozen weights of the true model, from shapes alone; bfloat16 and quantised.
weight_error   |restored - w| / |w| of the kernels of a model of the true width with few blocks and
               normal weights.
output_error   The same of this model's velocity, in float32 with quantised against true weights.
bfloat16_error The velocity's error when nothing is quantised but the model computes in bfloat16.

Weights that were trained have larger extremes than normal ones, so expect more error of them.
"""

import argparse
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import timing
import true_models

from tpgrpo_jax import models
from tpgrpo_jax.models import mmdit, quantize, z_image

GIB = 2**30
KINDS = ("int8", "nf4")


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=sorted(true_models.TRUE_MODELS), default="sd35_medium")
  parser.add_argument(
    "--blocks", type=int, default=3, help="of each kind, where errors are measured"
  )
  parser.add_argument("--small", action="store_true", help="narrow blocks")
  args = parser.parse_args()
  true = true_models.TRUE_MODELS[args.model]
  if args.small:
    true = true_models.shrink(true, 2)
  latent = (16, 16, true.latent[-1])
  model = dataclasses.replace(true, config=few_blocks(true.config, args.blocks), latent=latent)
  _, *shapes = model.shapes()
  weights = [jax.tree.map(lambda w: draw(w.shape), tree) for tree in shapes]
  wanted, half = (velocity(model, *weights, dtype) for dtype in (jnp.float32, jnp.bfloat16))
  frozen = true.shapes()[2]
  for kind in KINDS:
    quantized = quantize.quantize(jax.tree.map(jnp.copy, weights[1]), kind)
    leaves = zip(jax.tree.leaves(quantized, is_leaf=is_quantized), jax.tree.leaves(weights[1]))
    kernels = [(q.astype(jnp.float32), w) for q, w in leaves if is_quantized(q)]
    timing.report(
      "quantize",
      threads=timing.limit_threads(0),
      kind=kind,
      gib={"bfloat16": gib(frozen), kind: gib(quantize.quantize(frozen, kind))},
      weight_error=error(*zip(*kernels)),
      output_error=error(velocity(model, weights[0], quantized, jnp.float32), wanted),
      bfloat16_error=error(half, wanted),
      model=args.model,
      blocks=args.blocks,
      width=getattr(true.config, "width", 0) or true.config.dim,
    )


def few_blocks(config, count: int):
  """The sizes with `count` blocks of each kind."""
  if isinstance(config, z_image.ZImageConfig):
    return dataclasses.replace(config, n_layers=count, n_refiner_layers=count)
  if not isinstance(config, mmdit.MMDiTConfig):
    return dataclasses.replace(config, num_layers=count, num_single_layers=count)
  dual = tuple(range(count))
  return dataclasses.replace(config, num_layers=2 * count, dual_attention_layers=dual)


def draw(shape) -> jax.Array:
  """Normal numbers, those of a matrix over the root of its rows."""
  scale = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
  return scale * jax.random.normal(jax.random.key(math.prod(shape)), shape)


def velocity(model: true_models.TrueModel, trainable, frozen, dtype) -> jax.Array:
  """The model's output for one sample, computed in `dtype`."""
  graphdef = model.shapes(dtype=dtype)[0]
  normal = lambda leaf: draw(leaf.shape).astype(leaf.dtype)
  condition = true_models.draw_condition(model, model.condition(1), normal)
  inputs = (draw((1, *model.latent)), jnp.full(1, 0.6), condition)
  params = {"frozen": frozen, "trainable": trainable}
  return jax.jit(functools.partial(models.velocity_fn, graphdef))(params, *inputs)


def is_quantized(leaf) -> bool:
  """Whether a leaf takes the place of a kernel."""
  return isinstance(leaf, quantize.Quantized)


def error(found, wanted) -> float:
  """|found - wanted| / |wanted| over all arrays."""
  square = lambda tree: sum(float(jnp.sum(a**2)) for a in jax.tree.leaves(tree))
  difference = jax.tree.map(jnp.subtract, found, wanted)
  return float(f"{(square(difference) / square(wanted)) ** 0.5:.3g}")


def gib(tree) -> float:
  """Memory of arrays of these shapes; two uint4 are a byte."""
  bits = lambda a: 4 if a.dtype == jnp.uint4 else 8 * a.dtype.itemsize
  return round(sum(math.prod(a.shape) * bits(a) for a in jax.tree.leaves(tree)) / 8 / GIB, 3)


if __name__ == "__main__":
  main()
