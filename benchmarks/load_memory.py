"""Host memory while a checkpoint of several shards is read onto eight devices; prints one JSON line.

  python benchmarks/load_memory.py --gigabytes 4
  python benchmarks/load_memory.py --model z_image --dtype bfloat16 --gigabytes 8

Random weights are written to a temporary folder, and a fresh process loads them onto eight virtual CPU
devices: a transformer, and before it its Qwen3 encoder where it has one, each half of the gigabytes. There
the device arrays lie in host memory: `peak_over_arrays_gib` is the peak resident memory during the load
less what the process took before and less the arrays themselves. It must stay below the largest file plus
1 GiB. Widths are the released models' (SD3.5-Medium's is halved), with as many blocks as fill the gigabytes.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SHARDS = 4
GIB = 2**30
ENCODER = "text_encoder"
# Of Qwen3-4B, and which states the pipeline reads of a deeper one.
QWEN3 = dict(
  hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8, rope_theta=1e6,
)  # fmt: skip


def main():
  """Parses and runs."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", choices=("sd3", "flux2_klein", "z_image"), default="sd3")
  parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights, GiB in the dtype")
  parser.add_argument("--mesh", default="1,8,1", help="data, fsdp and tensor; eight in all")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the child process: what it loads
  args = parser.parse_args()
  if args.folder:
    measure(args)
    return
  os.environ["JAX_PLATFORMS"] = "cpu"
  with tempfile.TemporaryDirectory() as folder:
    write(folder, args)
    child = [sys.executable, __file__, "--folder", folder, "--mesh", args.mesh]
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
      [*child, "--model", args.model, "--dtype", args.dtype],
      env=os.environ | {"XLA_FLAGS": flags},
      check=True,
    )


def sizes(model, count):
  """The transformer's, with `count` blocks."""
  from tpgrpo_jax.forecasting import lowering
  from tpgrpo_jax.models import mmdit

  if model == "z_image":
    return dataclasses.replace(lowering.HUB_SIZES["Tongyi-MAI/Z-Image"][0], n_layers=count)
  if model == "flux2_klein":
    found = lowering.HUB_SIZES["black-forest-labs/FLUX.2-klein-base-4B"][0]
    return dataclasses.replace(found, num_single_layers=count)
  width = 768
  return mmdit.MMDiTConfig(
    num_layers=count,
    attention_head_dim=64,
    num_attention_heads=width // 64,
    caption_projection_dim=width,
    qk_norm="rms_norm",
  )


def encoder_sizes(count):
  """Qwen3's, with `count` blocks that are read."""
  from tpgrpo_jax.models import qwen3

  return qwen3.Qwen3Config(num_hidden_layers=count + 1, **QWEN3)


def fill(make, shapes_of, limit):
  """(sizes, shapes) with as many blocks as `limit` bytes hold; `make` takes their number."""
  import jax

  count = lambda n: sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes_of(make(n)))
  )
  few, more = count(2), count(3)
  found = make(max(2, 2 + round((limit - few) / (more - few))))
  return found, shapes_of(found)


def abstract(config, dtype):
  """The shapes of all weights of a transformer, in a dtype."""
  import jax

  from tpgrpo_jax import models
  from tpgrpo_jax.models import lora

  create = models.build_transformer(config)
  split = lambda key: lora.split_trainable(create(key), rank=0)[1:]
  tree = lora.merge_trees(*jax.eval_shape(split, jax.random.key(0)))
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def encoder_abstract(config, dtype):
  """The same of a Qwen3 encoder, without the last block."""
  from tpgrpo_jax.models import qwen3
  from tpgrpo_jax.models.hf import encoder

  states = (config.num_hidden_layers - 1,)
  return encoder.outline(lambda r: qwen3.Qwen3Encoder(config, states, dtype=dtype, rngs=r), dtype)[
    1
  ]


def write(folder, args):
  """The random checkpoint; every block of a stack is the same numbers."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from tpgrpo_jax.models import hf
  from tpgrpo_jax.models.hf import files, save
  from tpgrpo_jax.models.hf import qwen3 as hf_qwen3

  dtype, rng = jnp.dtype(args.dtype), np.random.default_rng(0)
  limit = args.gigabytes * GIB / (1 if args.model == "sd3" else 2)

  def draw(leaf):
    numbers = rng.standard_normal(leaf.shape[1:], np.float32).astype(leaf.dtype)
    return np.broadcast_to(numbers, leaf.shape)

  shard = int(limit) // SHARDS + 1
  make = functools.partial(sizes, args.model)
  config, shapes = fill(make, functools.partial(abstract, dtype=dtype), limit)
  hf.save_transformer(folder, config, jax.tree.map(draw, shapes), max_shard_bytes=shard)
  if args.model == "sd3":
    return
  config, shapes = fill(encoder_sizes, functools.partial(encoder_abstract, dtype=dtype), limit)
  tree = hf.flatten(jax.tree.map(draw, shapes))
  entries = hf_qwen3.names(config, {path: leaf.shape for path, leaf in tree.items()})
  take = lambda e: e.to_foreign(save.to_host(tree[e.path], e.block))
  pending = [
    save.Pending(e.name, e.shape, tree[e.path].dtype, functools.partial(take, e)) for e in entries
  ]
  save.write_shards(pathlib.Path(folder, ENCODER), pending, files.STEMS[1], shard)
  text = {"model_type": "qwen3"} | dataclasses.asdict(config)
  pathlib.Path(folder, ENCODER, files.CONFIG_FILE).write_text(json.dumps(text))


def status(field):
  """A line of /proc/self/status in bytes; of this process alone, unlike getrusage."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{field}:"):
      return int(line.split()[1]) * 1024
  raise ValueError(f"/proc/self/status: has no {field}.")


def measure(args):
  """Loads the folder and prints the figure."""
  import jax
  import jax.numpy as jnp
  import timing

  from tpgrpo_jax import config as config_lib
  from tpgrpo_jax.models import hf
  from tpgrpo_jax.models.hf import qwen3 as hf_qwen3
  from tpgrpo_jax.training import mesh as mesh_lib

  mesh = mesh_lib.make_mesh(config_lib.Mesh(*map(int, args.mesh.split(","))))
  layouts = functools.partial(mesh_lib.param_shardings, mesh)
  wanted = abstract(hf.load_config(args.folder), args.dtype)
  folder = pathlib.Path(args.folder)
  files = sorted(path.stat().st_size for path in folder.rglob("*.safetensors"))
  jax.block_until_ready(jnp.zeros(8))
  before, began, params = status("VmRSS"), time.perf_counter(), {}
  if (folder / ENCODER).is_dir():
    loaded = hf_qwen3.load_qwen3(folder / ENCODER, (-2,), dtype=args.dtype, shardings=layouts)
    params["encoder"] = loaded.weights
  params["transformer"] = hf.load_params(folder, wanted, shardings=layouts(wanted))
  seconds, peak = time.perf_counter() - began, status("VmHWM")
  parts = [s.data for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
  arrays = sum({p.unsafe_buffer_pointer(): p.nbytes for p in parts}.values())
  gib = lambda x: round(x / GIB, 3)
  size = lambda tree: gib(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
  timing.report(
    "load_memory",
    threads=len(os.sched_getaffinity(0)),
    peak_over_arrays_gib=gib(peak - before - arrays),
    limit_gib=gib(max(files) + GIB),
    arrays_gib=gib(arrays),
    peak_gib=gib(peak),
    before_gib=gib(before),
    files_gib=[gib(size) for size in files],
    weights_gib={name: size(tree) for name, tree in params.items()},
    seconds=round(seconds, 2),
    mesh=json.dumps(dict(mesh.shape)),
    dtype=args.dtype,
    model=args.model,
  )


if __name__ == "__main__":
  main()
