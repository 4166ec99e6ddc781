"""Host memory while a checkpoint of several shards is read onto eight devices; prints one JSON line.

  python benchmarks/load_memory.py --gigabytes 4

A random SD3 transformer is written to a temporary folder, and a fresh process loads it onto eight
virtual CPU devices. There the device arrays lie in host memory: `peak_over_arrays_gib` is the peak
resident memory during the load less what the process took before and less the arrays themselves. It
must stay below the largest file plus 1 GiB.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

SHARDS = 4
GIB = 2**30


def main():
  """Parses and runs."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights, GiB in float32")
  parser.add_argument("--mesh", default="1,8,1", help="data, fsdp and tensor; eight in all")
  parser.add_argument("--dtype", default="float32", help="of the arrays")
  parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the child process: what it loads
  args = parser.parse_args()
  if args.folder:
    measure(args)
    return
  os.environ["JAX_PLATFORMS"] = "cpu"
  with tempfile.TemporaryDirectory() as folder:
    write(folder, args.gigabytes)
    child = [sys.executable, __file__, "--folder", folder, "--mesh", args.mesh]
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
      [*child, "--dtype", args.dtype], env=os.environ | {"XLA_FLAGS": flags}, check=True
    )


def sizes(gigabytes):
  """SD3.5-Medium's shape at half its width, with as many blocks as fill `gigabytes`."""
  from tpgrpo_jax.models import mmdit

  width = 768
  block = 4 * (2 * 6 + 2 * 4 + 2 * 8) * width * width  # two streams: modulation, attention, MLP
  return mmdit.MMDiTConfig(
    num_layers=max(2, round(gigabytes * GIB / block)),
    attention_head_dim=64,
    num_attention_heads=width // 64,
    caption_projection_dim=width,
    qk_norm="rms_norm",
  )


def abstract(config):
  """The shapes of all weights."""
  import jax

  from tpgrpo_jax import models
  from tpgrpo_jax.models import lora

  create = models.build_transformer(config)
  split = lambda key: lora.split_trainable(create(key), rank=0)[1:]
  return lora.merge_trees(*jax.eval_shape(split, jax.random.key(0)))


def write(folder, gigabytes):
  """The random checkpoint; every block of a stack is the same numbers."""
  import jax
  import numpy as np

  from tpgrpo_jax.models import hf

  config = sizes(gigabytes)
  rng = np.random.default_rng(0)

  def draw(leaf):
    numbers = rng.standard_normal(leaf.shape[1:], np.float32)
    return np.broadcast_to(numbers, leaf.shape)

  params = jax.tree.map(draw, abstract(config))
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  hf.save_transformer(folder, config, params, max_shard_bytes=total // SHARDS + 1)


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
  from tpgrpo_jax.training import mesh as mesh_lib

  mesh = mesh_lib.make_mesh(config_lib.Mesh(*map(int, args.mesh.split(","))))
  config = hf.load_config(args.folder)
  wanted = abstract(config)
  jax.block_until_ready(jnp.zeros(8))
  before, began = status("VmRSS"), time.perf_counter()
  params = hf.load_params(
    args.folder, wanted, shardings=mesh_lib.param_shardings(mesh, wanted), dtype=args.dtype
  )
  seconds, peak = time.perf_counter() - began, status("VmHWM")
  parts = [s.data for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
  arrays = sum({p.unsafe_buffer_pointer(): p.nbytes for p in parts}.values())
  files = [path.stat().st_size for path in pathlib.Path(args.folder).glob("*.safetensors")]
  gib = lambda x: round(x / GIB, 3)
  timing.report(
    "load_memory",
    threads=len(os.sched_getaffinity(0)),
    peak_over_arrays_gib=gib(peak - before - arrays),
    limit_gib=gib(max(files) + GIB),
    arrays_gib=gib(arrays),
    peak_gib=gib(peak),
    before_gib=gib(before),
    files_gib=[gib(size) for size in sorted(files)],
    weights_gib=gib(sum(leaf.nbytes for leaf in jax.tree.leaves(params))),
    tensors=len(hf.names(config, {k: v.shape for k, v in hf.flatten(wanted).items()})),
    seconds=round(seconds, 2),
    mesh=json.dumps(dict(mesh.shape)),
    dtype=args.dtype,
  )


if __name__ == "__main__":
  main()
