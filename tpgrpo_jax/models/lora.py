"""Low-rank adapters on chosen Linear layers, and the split into trainable and frozen weights."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from tpgrpo_jax.models import adapter_layers, hf, layers


def add_lora(
  model: nnx.Module, key: jax.Array, *, rank: int, alpha: float, init: str, targets: Sequence[str]
) -> None:
  """Puts an adapter beside every Linear whose diffusers name ends with one of `targets`, in place.

  A ~ N(0, 1 / rank^2) for init "gaussian" (as peft's init_lora_weights="gaussian"), or
  U(-1 / sqrt(in), 1 / sqrt(in)) for "kaiming" (peft's default); B = 0, so that the model's output is
  unchanged at first.

  Args:
    model: with a `config` of a class in hf.ARCHITECTURES.
    key: for A.
    rank: of every adapter.
    alpha: the output is scaled by alpha / rank.
    init: of A.
    targets: ends of diffusers' names.

  Raises:
    ValueError: a target that names no layer or not all blocks of a stack, or an unknown init.
  """
  linears = [(p, m) for p, m in nnx.iter_modules(model) if type(m) is layers.Linear]
  kernel = lambda path: ".".join([*map(str, path), "kernel"])
  kernels = {kernel(path): module.kernel.shape for path, module in linears}
  names = hf.module_names(model.config, kernels)  # pyright: ignore[reportAttributeAccessIssue]
  used: set[str] = set()
  for path, module in linears:
    blocks = [_matching(name, targets) for name in names[kernel(path)]]
    if not any(blocks):
      continue
    used.update(*blocks)
    if not all(blocks):
      left = [name for name, matched in zip(names[kernel(path)], blocks) if not matched]
      raise ValueError(
        f"lora.targets: {', '.join(sorted(set().union(*blocks)))}: name some blocks only. Blocks of "
        f"one kind are trained together: add {', '.join(left[:3])}, or give the end of the name."
      )
    key, subkey = jax.random.split(key)
    *stack, d_in, d_out = module.kernel.shape
    lora_a = _init_a(subkey, (*stack, d_in, rank), init)
    layer = adapter_layers.LoraLinear(
      module, lora_a, jnp.zeros((*stack, rank, d_out)), alpha / rank
    )
    parent = model
    for part in path[:-1]:
      parent = getattr(parent, str(part))
    setattr(parent, str(path[-1]), layer)
  unused = [target for target in targets if target not in used]
  if unused:
    raise ValueError(
      f"lora.targets: {', '.join(unused)}: no layer's name ends so. Names are diffusers' own, "
      "such as 'attn.to_q', 'attn.to_out.0' or 'ff.net.0.proj'."
    )


def _matching(name, targets):
  return {t for t in targets if name == t or name.endswith("." + t)}


def _init_a(key, shape, init):
  d_in, rank = shape[-2:]
  if init == "gaussian":
    return jax.random.normal(key, shape) / rank
  if init == "kaiming":
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / d_in**0.5
  raise ValueError(f"lora.init={init!r}: must be 'gaussian' or 'kaiming'.")


def scale(adapters: Any, factor: float) -> Any:
  """The adapters with their outputs multiplied: of A and B, B alone.

  Args:
    adapters: the trainable tree of a model with adapters.
    factor: 1 leaves them as they are, 0 is the model without them.
  """

  def scaled(path, leaf):
    return leaf * factor if path[-1].key == "lora_b" else leaf

  return jax.tree_util.tree_map_with_path(scaled, adapters)


def merge_trees(a: Any, b: Any) -> Any:
  """The union of two nested dicts that share no leaf."""
  if not isinstance(a, dict) or not isinstance(b, dict):
    raise ValueError("the two trees share a leaf")
  both = a.keys() & b.keys()
  return {**a, **b, **{k: merge_trees(a[k], b[k]) for k in both}}


def split_trainable(model: nnx.Module, *, rank: int) -> tuple[Any, Any, Any]:
  """(graphdef, trainable, frozen): adapters against the rest, or all weights against buffers.

  Args:
    model: with adapters when rank > 0.
    rank: 0 trains every weight.
  """
  kind = adapter_layers.LoraParam if rank else nnx.Param
  graphdef, trainable, frozen = nnx.split(model, kind, ...)
  return graphdef, nnx.to_pure_dict(trainable), nnx.to_pure_dict(frozen)
