"""The device mesh, and the one table that says how every weight is laid out on it."""

from collections.abc import Callable, Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.config import size_rules
from tpgrpo_jax.runs import processes

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that a batch of samples is divided over

# pattern of a weight's path -> how its LAST dimensions lie on the mesh (leading axes are stacks).
# Optimizer moments and EMA hold the same paths, so the same rules serve them.
# A single block of FLUX projects attention and hidden units together (proj_out of FLUX.1, to_out of FLUX.2);
# each part is divided for itself, so no division of the kernel's rows fits both: its columns are divided.
_BLOCKS = r"\b(blocks_\d+|(single_)?transformer_blocks|layers|noise_refiner|context_refiner)\."
_COLUMNS = r".*(linear_1|linear_in|to_q|to_k|to_v|_proj|linear|proj_mlp|proj_out|w1|w3)"
_ROWS = r"(to_out|to_add_out|linear_2|linear_out|down_proj|w2)"
_BOTH = r"single_transformer_blocks\.attn\.to_out"
_QUANTIZED = r"(\.codes|\.scale)?"  # of models.quantize, in a kernel's place
RULES = (
  (rf"{_BOTH}\.kernel{_QUANTIZED}$", P("fsdp", "tensor")),
  (rf"{_BOTH}\.lora_a$", P("fsdp", None)),
  (rf"{_BOTH}\.lora_b$", P(None, "tensor")),
  (rf"{_ROWS}\.kernel{_QUANTIZED}$", P("tensor", "fsdp")),
  (rf"{_BLOCKS}{_COLUMNS}\.kernel{_QUANTIZED}$", P("fsdp", "tensor")),
  (rf"{_BLOCKS}{_COLUMNS}\.bias$", P("tensor")),
  (rf"{_ROWS}\.lora_a$", P("tensor", None)),
  (rf"{_ROWS}\.lora_b$", P(None, "fsdp")),
  (r"\.lora_a$", P("fsdp", None)),
  (r"\.lora_b$", P(None, "tensor")),
  (rf"\.kernel{_QUANTIZED}$", P("fsdp", None)),
  (r"token_embedding$", P(None, "fsdp")),  # 0.7 GiB of Qwen3's in bfloat16
)


def make_mesh(config: config_lib.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """Makes the (data, fsdp, tensor) mesh over all devices, or those given.

  Where these are several slices (of TPUs; hosts of GPUs without a common NVLink), their slow network
  divides `data` as far as it can, and only then `fsdp` and `tensor`.

  Raises:
    ValueError: axes that do not divide the devices, or a size below 1.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  data, fsdp, tensor = config.data, config.fsdp, config.tensor
  if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
    raise ValueError(
      f"mesh=({data}, {fsdp}, {tensor}): sizes must be at least 1; data=-1 takes the rest."
    )
  if data == -1:
    data = count // (fsdp * tensor)
  if data * fsdp * tensor != count:
    raise ValueError(
      f"mesh=(data={config.data}, fsdp={fsdp}, tensor={tensor}): must multiply to the {count} "
      f"devices there are. Set mesh.data=-1, and fsdp x tensor to a divisor of {count}."
    )
  kinds = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=kinds, devices=devices)
  inner, outer, rest = [], [], slices
  for size in (data, fsdp, tensor):
    outer.append(math.gcd(size, rest))
    inner.append(size // outer[-1])
    rest //= outer[-1]
  grid = mesh_utils.create_hybrid_device_mesh(
    inner, outer, devices, allow_split_physical_axes=devices[0].platform == "tpu"
  )
  return jax.sharding.Mesh(grid, AXES, axis_types=kinds)


def local_mesh() -> jax.sharding.Mesh:
  """The devices of this process alone, as the fsdp axis: for what each process computes for itself."""
  devices, kinds = jax.local_devices(), (AxisType.Auto,) * len(AXES)
  return jax.make_mesh((1, len(devices), 1), AXES, axis_types=kinds, devices=devices)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
  """Into how many parts the mesh divides a batch."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def check_divides(field: str, size: int, mesh: jax.sharding.Mesh, *, total: int = 0) -> None:
  """Raises ValueError unless a batch of `size`, set by the config's `field`, divides over the mesh.

  Args:
    field: for the message.
    size: of the batch.
    mesh: of the run.
    total: what the batch itself must divide, if anything.
  """
  shards = batch_shards(mesh)
  if not size % shards:
    return
  fit = (
    size_rules.nearest_divisors(size, total, of=shards)
    if total
    else str(-(-size // shards) * shards)
  )
  found = f"Set it to {fit}, or change the mesh." if fit else f"{total} has none: change the mesh."
  raise ValueError(
    f"{field}={size}: must be a multiple of mesh.data x mesh.fsdp = {shards}, so that prompts divide over "
    f"the mesh{f', that divides {total}' * bool(total)}. {found}"
  )


def check_microbatch(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError unless the microbatches divide over the mesh; it names some that fit an update."""
  t = config.train
  updates = t.updates_per_epoch if t.updates_by == "samples" else 1
  total = t.prompts_per_epoch * t.group_size // updates
  check_divides("train.microbatch", t.microbatch, mesh, total=total)
  if t.update_microbatch:
    check_divides("train.update_microbatch", t.update_microbatch, mesh, total=t.microbatch)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Divides the leading dimension of an array over the batch axes of the mesh."""
  return NamedSharding(mesh, P(BATCH))


def param_shardings(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, tree: Any) -> Any:
  """A NamedSharding for every leaf of a tree of weights, moments or averages, by RULES.

  Args:
    mesh: as of `make_mesh`.
    tree: leaves with a shape; their paths end as the weights' own do.
  """

  def sharding(path, leaf):
    name = ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return NamedSharding(mesh, _fit(_spec(name), leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def laid_out(tree: Any) -> Any:
  """Inside a jitted function: the tree laid out by RULES on the mesh in use, as it is where there is none.

  A state that leaves a program as it came in does not make the next call another program.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, param_shardings(mesh, tree))


def divided(x: jax.Array, axis: int) -> jax.Array:
  """Inside a jitted function: x, of which the axes of BATCH divide this axis; as it is without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, BATCH))


def by_data(function: Callable[..., Any], *, divided: Any, gives: Any) -> Callable[..., Any]:
  """Inside a jitted function: each part of the "data" axis calls the function on its own samples.

  What the function adds up stays a part's own until it calls `total`; left to the partitioner, a sum of
  gradients in a loop is a collective in every turn. The other axes are divided as outside. Without a
  mesh, or with one part, the function as it is.

  Args:
    function: of as many arguments as `divided` has.
    divided: for each argument a tree of bools, or one for all its leaves: whether axis 1 is divided.
    gives: likewise, for the results; those not divided must be equal in all parts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.shape.get("data", 1) == 1:
    return function
  specs = functools.partial(jax.tree.map, lambda cut: P(None, "data") if cut else P())
  # An axis of one device is taken along: with no other axis left, kernels need no shard_map of their own.
  axes = {name for name, size in mesh.shape.items() if name == "data" or size == 1}
  return jax.shard_map(
    function, in_specs=specs(divided), out_specs=specs(gives), axis_names=axes, check_vma=False
  )


def total(tree: Any, reduce: Callable[..., Any] = jax.lax.psum) -> Any:
  """Over all parts of `by_data`; the tree as it is outside."""
  return reduce(tree, "data") if _is_part() else tree


def normal(key: Any, shape: tuple[int, ...]) -> jax.Array:
  """jax.random.normal, of which a part of `by_data` takes its own rows, `shape` being those."""
  if not _is_part():
    return jax.random.normal(key, shape)
  rows, parts = shape[0], jax.sharding.get_abstract_mesh().shape["data"]
  whole = jax.random.normal(key, (parts * rows, *shape[1:]))
  return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("data") * rows, rows)


def _is_part():
  return "data" in jax.sharding.get_abstract_mesh().manual_axes


def make_placement(mesh: jax.sharding.Mesh) -> types.Placement:
  """How weights and batches of device rewards come onto the mesh: as the transformer's own do."""
  return types.Placement(
    functools.partial(param_shardings, mesh),
    functools.partial(processes.put_batch, mesh),
  )


def abstract(mesh: jax.sharding.Mesh, tree: Any) -> Any:
  """The shapes of a tree of weights, moments or averages, laid out by RULES; nothing is allocated."""
  place = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)
  return jax.tree.map(place, tree, param_shardings(mesh, tree))


def _spec(name):
  return next((spec for pattern, spec in RULES if re.search(pattern, name)), P())


def _fit(spec, shape, mesh):
  """Aligns the spec with the last dimensions, and drops axes that do not divide theirs."""
  if len(spec) > len(shape):
    return P()
  full = (None,) * (len(shape) - len(spec)) + tuple(spec)
  return P(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(full, shape)))
