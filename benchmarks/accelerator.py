"""SD3.5-Medium and FLUX.1-dev at 512 x 512 on an accelerator: python benchmarks/accelerator.py

True sizes, random weights in bfloat16, LoRA rank 32, text of the recipe's length, latents (no VAE, no
text encoder). Prints one JSON line for each figure; --small does everything with a few narrow blocks,
on a CPU too.

matmul_peak   The fastest of some square bfloat16 matrix products: what this device can do.
evaluation    One evaluation of the velocity (two forward passes where guidance is on), and with torch and
              diffusers installed and on the same device the same by diffusers, eager and compiled,
              taken in turn. Weights are random on both sides, not the same; only ours has adapters.
rollout       T steps and all exact completions, guidance on (SD3.5) or told (FLUX): samples/s, and
              images/s of the W + 1 latents that each sample ends in.
update        One optimizer update of one microbatch with all its W steps: gradients of the adapters,
              AdamW, EMA; every block is rematerialised.

of_peak is the operations of tpgrpo_jax/cost/flops.py (matrix products and convolutions, those of
rematerialised blocks twice, attention by its plain formula) a second, over matmul_peak times the
devices. peak_gib is the most device memory in use since the start, where the device tells.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import numpy as np
import timing
import true_models

from tpgrpo_jax import types
from tpgrpo_jax.cost import flops
from tpgrpo_jax.flow import completion, sampler
from tpgrpo_jax.models import flux, mmdit
from tpgrpo_jax.training import batches
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib

GIB = 2**30


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--model", choices=sorted(true_models.TRUE_MODELS), default="sd35_medium")
  parser.add_argument("--batch", type=int, default=8, help="samples in one call, of all devices")
  parser.add_argument("--lanes", type=int, default=0, help="completion lanes at once; 0 is all")
  parser.add_argument("--remat", choices=("none", "full", "dots"), default="full")
  parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
  parser.add_argument("--no-torch", action="store_true", help="leave torch and diffusers out")
  parser.add_argument("--small", action="store_true", help="few narrow blocks, few steps")
  args = parser.parse_args()
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some of it
  model = true_models.TRUE_MODELS[args.model]
  if args.small:
    model = dataclasses.replace(true_models.shrink(model, 2), num_steps=3)
  subject = open_subject(model, args)
  with jax.set_mesh(subject.mesh):
    measure_evaluation(subject)
    measure_update(subject, measure_rollout(subject))


@dataclasses.dataclass(frozen=True)
class Subject:
  """One model on all devices.

  Attributes:
    args: of the command line.
    model: sizes.
    run: functions and shapes.
    mesh: of all devices.
    peak: measured operations per second of one device.
    params: random weights.
    x: latents.
    condition: of x.
  """

  args: argparse.Namespace
  model: true_models.TrueModel
  run: true_models.Run
  mesh: jax.sharding.Mesh
  peak: float
  params: dict[str, Any]
  x: jax.Array
  condition: Any


def open_subject(model: true_models.TrueModel, args: argparse.Namespace) -> Subject:
  """Measures the device, then draws the model's weights and inputs."""
  peak = report_peak(args)
  run = true_models.open_run(model, batch=args.batch, remat=args.remat)
  mesh = mesh_lib.make_mesh(run.config.mesh)
  shapes = {"frozen": run.frozen, "trainable": run.trainable}
  params = jax.tree.map(draw_weight, shapes, mesh_lib.param_shardings(mesh, shapes))
  spread = lambda leaf: draw(leaf, mesh_lib.batch_sharding(mesh))
  x = spread(jax.ShapeDtypeStruct((args.batch, *model.latent), jnp.float32))
  condition = true_models.draw_condition(model, true_models.conditions(model, args.batch), spread)
  return Subject(args, model, run, mesh, peak, params, x, condition)


def report_peak(args: argparse.Namespace) -> float:
  """Measures and reports what one device can do."""
  peak = matmul_peak(512 if args.small else 8192, args.repeats)
  report("matmul_peak", tflops=round(peak / 1e12, 3))
  return peak


def draw(leaf: jax.ShapeDtypeStruct, place: Any = None, scale: float = 1.0) -> jax.Array:
  """Normal numbers."""
  normal = lambda: (scale * jax.random.normal(jax.random.key(0), leaf.shape)).astype(leaf.dtype)
  return jax.jit(normal, out_shardings=place)()


def draw_weight(leaf: jax.ShapeDtypeStruct, place: Any) -> jax.Array:
  """Normal numbers, those of a matrix over the root of its rows, so that activations stay finite."""
  return draw(leaf, place, leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0)


def matmul_peak(largest: int, repeats: int) -> float:
  """Operations per second of the fastest of three square bfloat16 products, on the first device."""
  rates, count = [], 16
  for size in (largest // 4, largest // 2, largest):
    a = draw(jax.ShapeDtypeStruct((size, size), jnp.bfloat16), scale=size**-0.5)
    chain = jax.jit(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=count)[0])
    seconds = timing.interleave({"chain": functools.partial(chain, a)}, repeats=repeats)["chain"]
    rates.append(count * 2 * size**3 / float(seconds.min()))
  return max(rates)


def measure_evaluation(subject: Subject) -> None:
  """Reports the velocity, and diffusers' beside it where that can be had."""
  args, velocity = subject.args, subject.run.method.velocity_fn
  inputs = (subject.params, subject.x, jnp.full(args.batch, 0.6), subject.condition)
  passes = args.batch * (1 if subject.model.guidance_scale == 1.0 else 2)
  functions = {"jax": functools.partial(jax.jit(velocity), *inputs)}
  functions |= {} if args.no_torch else torch_functions(subject.model, passes)
  seconds = timing.interleave(functions, repeats=args.repeats)
  work = count(velocity, *inputs)
  for name, rounds in seconds.items():
    report_time(f"evaluation_{name}", subject, rounds, work, forward_passes=passes)
  for name in [name for name in functions if name != "jax"]:
    figure, threads = f"evaluation_jax_over_{name}", timing.limit_threads(0)
    timing.report_ratio(figure, seconds, of="jax", over=name, threads=threads)


def measure_rollout(subject: Subject) -> types.Transitions:
  """Reports the trajectory with its completions, and returns it."""
  args, method = subject.args, subject.run.method
  place = np.arange(method.window)
  plan = method_lib.build_plan(subject.run.config, method, place)

  def rollout(params, key, x, condition):
    trajectory = sampler.sample_trajectory(
      method.velocity_fn,
      method.step_fn,
      method.log_prob_fn,
      params,
      key,
      x,
      condition,
      sigmas=method.sigmas,
      start=0,
      window=method.window,
    )
    completed = completion.complete(
      method.velocity_fn, params, trajectory, condition, plan, lanes_per_chunk=args.lanes
    )
    return trajectory, completed

  inputs = (subject.params, jax.random.key(0), subject.x, subject.condition)
  call = functools.partial(jax.jit(rollout), *inputs)
  seconds = timing.interleave({"rollout": call}, repeats=args.repeats, warmup=1)["rollout"]
  rate = args.batch / float(np.median(seconds))
  report_time(
    "rollout",
    subject,
    seconds,
    count(rollout, *inputs),
    samples_per_second=round(rate, 4),
    images_per_second=round(rate * (method.window + 1), 4),
    evaluations_per_sample=method_lib.evaluations_per_sample(
      subject.run.config, method, plan, place
    ),
  )
  return call()[0]


def measure_update(subject: Subject, trajectory: types.Transitions) -> Callable[[], Any]:
  """Reports the train step on the trajectory, with random advantages, and returns one of them as a call."""
  args, run = subject.args, subject.run
  train_step, shapes = true_models.update(subject.model, run, batch=args.batch)
  advantage = draw(shapes[-1].advantage)
  batch = batches.Batch([trajectory], [subject.condition], advantage, jnp.ones(advantage.shape))
  batch = batches.stacked(run.config, batch)
  create = functools.partial(state_lib.init_state, optimizer=run.method.optimizer)
  state = [jax.jit(create)(subject.params["trainable"])]  # donated to each call, which replaces it

  def call():
    state[0], metrics = train_step(state[0], subject.params["frozen"], {}, batch)
    return metrics

  seconds = timing.interleave({"update": call}, repeats=args.repeats, warmup=1)["update"]
  details = dict(steps=run.method.window, remat=args.remat)
  report_time("update", subject, seconds, count(train_step, *shapes), **details)
  return call


def count(function, *inputs) -> flops.Flops:
  """The operations, counted as for a CPU, where attention is its plain formula and no kernel."""
  shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if hasattr(a, "shape") else a
  device = AbstractDevice("cpu", None, "cpu")
  kinds = (AxisType.Auto,) * len(mesh_lib.AXES)
  mesh = AbstractMesh((1,) * len(kinds), mesh_lib.AXES, axis_types=kinds, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return flops.count(function, *jax.tree.map(shape, inputs))


def report_time(figure, subject, seconds, work, **details) -> None:
  """One JSON line of seconds, and of the work that was done in them."""
  median = float(np.median(seconds))
  devices = math.prod(subject.mesh.shape.values())
  report(
    figure,
    seconds=round(median, 4),
    seconds_min=round(float(seconds.min()), 4),
    seconds_max=round(float(seconds.max()), 4),
    repeats=len(seconds),
    tflop=round(work.total / 1e12, 4),
    of_peak=round(work.total / median / (subject.peak * devices), 4),
    uncounted=work.uncounted,
    peak_gib=peak_gib(),
    model=subject.args.model,
    small=subject.args.small,
    batch=subject.args.batch,
    devices=devices,
    **details,
  )


def peak_gib() -> float | None:
  """The most memory of the first device in use so far, where it tells."""
  memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return memory and round(memory / GIB, 2)


def report(figure, **values) -> None:
  """One JSON line, with all cores."""
  timing.report(figure, threads=timing.limit_threads(0), **values)


def torch_functions(model: true_models.TrueModel, batch: int) -> dict[str, Any]:
  """Name -> forward pass of diffusers' model with random weights; empty with a message without one."""
  try:
    import diffusers
    import torch
  except ImportError as error:
    print(f"torch is left out: {error}. pip install -e '.[parity]'", flush=True)
    return {}
  device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), "")
  if not device or (device == "cuda" and not torch.cuda.is_available()):
    print(f"torch is left out: it has no {jax.default_backend()} here.", flush=True)
    return {}
  if not isinstance(model.config, flux.FluxConfig | mmdit.MMDiTConfig):
    print("torch is left out: it is measured for SD3 and FLUX.1 alone.", flush=True)
    return {}
  is_flux = isinstance(model.config, flux.FluxConfig)
  kind = diffusers.FluxTransformer2DModel if is_flux else diffusers.SD3Transformer2DModel
  torch.set_default_dtype(torch.bfloat16)
  with torch.device(device):
    theirs = kind(**dataclasses.asdict(model.config)).eval()
    inputs = torch_inputs(torch, model, batch, is_flux)
  torch.set_default_dtype(torch.float32)

  def evaluate(module):
    with torch.inference_mode():
      velocity = module(**inputs, return_dict=False)[0]
    if device == "cuda":
      torch.cuda.synchronize()
    return velocity

  modules = {"diffusers_eager": theirs, "diffusers_compiled": torch.compile(theirs)}
  return {name: functools.partial(evaluate, module) for name, module in modules.items()}


def torch_inputs(torch, model: true_models.TrueModel, batch: int, is_flux: bool) -> dict[str, Any]:
  """Random arguments of diffusers' model, on torch's default device."""
  height, width, channels = model.latent
  sigma = torch.full((batch,), 0.6)
  inputs = dict(
    encoder_hidden_states=torch.randn(batch, model.tokens, model.config.joint_attention_dim),
    pooled_projections=torch.randn(batch, model.config.pooled_projection_dim),
  )
  if not is_flux:
    return inputs | dict(
      hidden_states=torch.randn(batch, channels, height, width), timestep=1000 * sigma
    )
  tokens = height * width // flux.PACK**2
  return inputs | dict(
    hidden_states=torch.randn(batch, tokens, model.config.in_channels),
    timestep=sigma,
    guidance=torch.full((batch,), model.guidance),
    txt_ids=torch.zeros(model.tokens, 3),
    img_ids=torch.zeros(tokens, 3),
  )


if __name__ == "__main__":
  main()
