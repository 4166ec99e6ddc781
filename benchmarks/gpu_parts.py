"""The parts of gpu.py, each of which runs in a process of its own and prints its figures as JSON lines."""

import argparse
import collections
from collections.abc import Callable
import dataclasses
import functools
import pathlib
import re
import signal
import threading
import time
from typing import Any
from unittest import mock

import accelerator
import jax
import jax.numpy as jnp
import numpy as np
import timing
import true_models

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.config import presets
from tpgrpo_jax.forecasting import lowering, reward_program
from tpgrpo_jax.models import clip, layers, tiny_vae, vae
from tpgrpo_jax.runs import metrics, preemption
from tpgrpo_jax.training import batches as batches_lib
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import loop, old_scores, pipeline
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib
from tpgrpo_jax.training import state as state_lib

KERNELS = 20  # of a trace
report = accelerator.report


def with_fields(config: config_lib.Config, fields: dict[str, Any]) -> config_lib.Config:
  """The config with fields changed, dotted ones and whole groups."""
  whole = {name: value for name, value in fields.items() if "." not in name}
  dotted = {name: value for name, value in fields.items() if "." in name}
  return presets.apply(dataclasses.replace(config, **whole), dotted)


def left(args: argparse.Namespace) -> float:
  """Seconds that remain for everything."""
  return args.until - time.time()


def correctness(args: argparse.Namespace) -> None:
  """What must agree with what."""
  for dtype in ("float32", "bfloat16"):
    report_on_policy(args, dtype)
  report_attention(args)
  report_blocks(args)


def report_on_policy(args: argparse.Namespace, dtype: str) -> None:
  """First log-ratios of an epoch of the tiny model."""
  config = with_fields(
    presets.recipe("tiny_text", "tp_grpo"),
    {
      "run.dir": str(args.output / "on_policy"),
      "model.dtype": dtype,
      "rewards": {"jpeg_compressibility": 1.0},
      "train.prompts_per_epoch": 2 if args.small else 8,
      "train.group_size": 4 if args.small else 16,
      "train.microbatch": 4 if args.small else 64,
      "eval.prompts": 8,
      "eval.judge_prompts": 0,
    },
  )  # fmt: skip
  session = session_lib.open_session(config)
  with jax.set_mesh(session.mesh):
    for source in ("rollout", "update"):
      asked = with_fields(config, {"loss.old_log_prob": source})
      chosen = dataclasses.replace(session, config=asked, old_scores=old_scores.OldScores(asked))
      state = session_lib.init_state(chosen)
      sampled = epoch_lib.sample_epoch(chosen, state, 0)
      row = epoch_lib.update_epoch(chosen, state, 0, sampled)[1]
      report(
        "on_policy",
        dtype=dtype,
        old_log_prob=source,
        first_log_ratio=row["ratio/first_update_max_abs_log"],
        rollout_off_by=row.get("ratio/rollout_max_abs_log"),
        clip_range=config.loss.clip_range,
        grad_norm=row["grad_norm"],
      )


def report_attention(args: argparse.Namespace) -> None:
  """This device's kernel and its gradients against XLA's in float32, over the largest value."""
  shape = (1, 80, 2, 64) if args.small else (2, 1357, 24, 64)
  q, k, v, w = (jax.random.normal(jax.random.key(n), shape).astype(jnp.bfloat16) for n in range(4))
  exact = functools.partial(jax.nn.dot_product_attention, implementation="xla")
  wide = [a.astype(jnp.float32) for a in (q, k, v, w)]

  def with_gradients(attend, q, k, v, w):
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(w)

  with jax.set_mesh(mesh_lib.make_mesh(config_lib.Mesh())):
    found = jax.jit(functools.partial(with_gradients, layers.attention))(q, k, v, w)
  with jax.default_matmul_precision("highest"):
    wanted = jax.jit(functools.partial(with_gradients, exact))(*wide)
  names = ("out", "dq", "dk", "dv")
  errors = {name: relative_error(a, b) for name, a, b in zip(names, found, wanted)}
  report("attention", shape=shape, dtype="bfloat16", relative_error=errors)


def relative_error(found: Any, wanted: Any) -> float:
  """The largest difference over the largest value."""
  found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def report_blocks(args: argparse.Namespace) -> None:
  """Velocity and adapters' gradients of two blocks of SD3.5-Medium, against the CPU's in float32."""
  model = true_models.TRUE_MODELS["sd35_medium"]
  if args.small:
    model = true_models.shrink(model, 2)
  else:
    sizes = dataclasses.replace(model.config, num_layers=2, dual_attention_layers=(0,))
    model = dataclasses.replace(model, config=sizes, tokens=77, latent=(32, 32, 16))
  _, *shapes = model.shapes()
  weights = jax.tree.map(host_normal, dict(zip(("trainable", "frozen"), shapes)))
  x = host_normal(jax.ShapeDtypeStruct((1, *model.latent), jnp.float32))
  condition = jax.tree.map(host_normal, model.condition(1))

  def run(device, dtype):
    graphdef, *_ = model.shapes(dtype=dtype)
    velocity_fn = models.make_velocity_fn(graphdef)

    def loss(trainable, frozen, x, condition):
      params = {"frozen": frozen, "trainable": trainable}
      velocity = velocity_fn(params, x, jnp.full(1, 0.6), condition)
      return jnp.mean(jnp.square(velocity)), velocity

    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), mesh_lib.AXES, axis_types=axes, devices=[device])
    with jax.set_mesh(mesh):
      place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      inputs = (weights["trainable"], weights["frozen"], x, condition)
      gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
      (_, velocity), grads = jax.device_get(gradient(*jax.device_put(inputs, place)))
    return velocity, np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

  wanted = run(jax.devices("cpu")[0], jnp.float32)
  for dtype in ("float32", "bfloat16"):
    found = run(jax.devices()[0], jnp.dtype(dtype))
    errors = {n: relative_error(a, b) for n, a, b in zip(("velocity", "gradients"), found, wanted)}
    report("blocks", dtype=dtype, small=args.small, relative_error=errors)


def host_normal(leaf: Any) -> np.ndarray:
  """Normal numbers, those of a matrix over the root of its rows; the same on every host."""
  rng = np.random.default_rng(int(np.prod(leaf.shape)))
  scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1.0
  return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)


def sd35(args: argparse.Namespace) -> None:
  """SD3.5-Medium for several batches, and a trace of the first one's update."""
  model = true_models.TRUE_MODELS["sd35_medium"]
  if args.small:
    model = dataclasses.replace(true_models.shrink(model, 2), num_steps=3)
  base = dict(model="sd35_medium", lanes=0, no_torch=True, small=args.small, repeats=args.repeats)
  subject, took = None, 0.0
  for number, batch in enumerate(args.sizes):
    if number and left(args) < 3 * took:
      report("left_out", part=f"sd35 at batch {batch}", why=f"{left(args):.0f} s were left")
      return
    began = time.time()
    asked = argparse.Namespace(**base, batch=batch, remat="full")
    subject = open_at(subject, model, asked)
    with jax.set_mesh(subject.mesh):
      accelerator.measure_evaluation(subject)
      subject.args.repeats = 1
      trajectory = accelerator.measure_rollout(subject)
      subject.args.repeats = args.repeats
      call = accelerator.measure_update(subject, trajectory)
      if not number:
        report_trace(call, args.output)
      plain = argparse.Namespace(**base, batch=batch, remat="none")
      try:
        accelerator.measure_update(open_at(subject, model, plain), trajectory)
      except jax.errors.JaxRuntimeError as error:
        report("update", batch=batch, remat="none", refused=str(error).splitlines()[0][:200])
    took = time.time() - began


def open_at(subject: Any, model: true_models.TrueModel, asked: argparse.Namespace) -> Any:
  """The model at another batch or remat, with the same weights."""
  if subject is None:
    return accelerator.open_subject(model, asked)
  run = true_models.open_run(model, batch=asked.batch, remat=asked.remat)
  spread = lambda leaf: accelerator.draw(leaf, mesh_lib.batch_sharding(subject.mesh))
  x = spread(jax.ShapeDtypeStruct((asked.batch, *model.latent), jnp.float32))
  condition = jax.tree.map(spread, true_models.conditions(model, asked.batch))
  return dataclasses.replace(subject, args=asked, run=run, x=x, condition=condition)


def report_trace(call: Callable[[], Any], output: pathlib.Path) -> None:
  """Traces one call, and writes and reports what most of its time goes to."""
  folder = output / "trace"
  with jax.profiler.trace(str(folder)):
    jax.block_until_ready(call())
  found = slowest_kernels(folder)
  lines = [f"{ms:10.3f} ms  {n:6d} x  {name}" for name, ms, n in found]
  (output / "kernels.txt").write_text("\n".join(lines) + "\n")
  report("trace", kernels=[dict(name=k, milliseconds=round(ms, 3), runs=n) for k, ms, n in found])


def slowest_kernels(folder: pathlib.Path) -> list[tuple[str, float, int]]:
  """(name, milliseconds, runs) of the newest trace; copies of one kernel, told apart by numbers, together."""
  path = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  # Kernels lie on the devices' planes; a CPU has none, and its operations are on its threads.
  on_device = [p for p in planes if p.name.startswith("/device:") and "CUSTOM" not in p.name]
  threads = lambda line: line.name.startswith(("tf_XLA", "tf_xla"))
  keep = (lambda line: "Stream" in line.name or "XLA Ops" in line.name) if on_device else threads
  total, runs = collections.Counter(), collections.Counter()
  for plane in on_device or [p for p in planes if p.name.startswith("/host:CPU")]:
    for line in filter(keep, plane.lines):
      for event in line.events:
        name = re.sub(r"[._]\d+$", "", event.name)
        total[name] += event.duration_ns / 1e6
        runs[name] += 1
  return [(name, ms, runs[name]) for name, ms in total.most_common(KERNELS)]


def torch(args: argparse.Namespace) -> None:
  """diffusers and peft."""
  import torch_parts

  torch_parts.measure(args, left)


def epoch(args: argparse.Namespace) -> None:
  """SD3.5-Medium with its decoder and PickScore: what an epoch does with a microbatch."""
  measure_plan(args, "sd35m_pickscore", "epoch", batch=args.sizes[0])


def flux(args: argparse.Namespace) -> None:
  """FLUX.1-dev in eight bits."""
  measure_plan(args, "flux_pickscore", "flux", batch=2, quantize="int8")


_SMALL_SIZES = {
  "sd35m_pickscore": ("small/sd35", "sd35_medium"),
  "flux_pickscore": ("small/flux", "flux_dev"),
}
_SMALL_VAE = vae.VAEConfig(
  block_out_channels=(32, 32),
  layers_per_block=1,
  latent_channels=16,
  use_quant_conv=False,
  use_post_quant_conv=False,
)
_SMALL_CLIP = clip.CLIPConfig(
  clip.CLIPTextConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    projection_dim=16,
  ),
  clip.CLIPVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    projection_dim=16, patch_size=14,
  ),
  projection_dim=16,
)  # fmt: skip


def recipe(task: str, batch: int, quantize: str, small: bool) -> config_lib.Config:
  """The shipped recipe with one microbatch an epoch."""
  config = with_fields(
    presets.recipe(task, "tp_grpo"),
    {
      "train.prompts_per_epoch": 1,
      "train.group_size": batch,
      "train.microbatch": batch,
      "train.updates_per_epoch": 1,
      "model.quantize": quantize,
    },
  )
  if not small:
    return config
  fields = {"model.path": _SMALL_SIZES[task][0], "text.max_sequence_length": 8}
  fields |= {"sampler.num_steps": 3, "sampler.window": (0, 2)}
  fields |= {"sampler.height": 16, "sampler.width": 16}
  score = config.rewards["pickscore"] | {"path": "small/clip"}
  return with_fields(config, fields | {"rewards": {"pickscore": score}})


def measure_plan(args, task: str, figure: str, *, batch: int, quantize: str = "") -> None:
  """Fills a run's own programs with random weights, and runs an epoch of one microbatch."""
  small, name = _SMALL_SIZES[task]
  sizes = true_models.shrink(true_models.TRUE_MODELS[name], 2).config
  with (
    mock.patch.dict(lowering.HUB_SIZES, {small: (sizes, _SMALL_VAE)}),
    mock.patch.dict(reward_program.HUB_SIZES, {"small/clip": _SMALL_CLIP}),
  ):
    config = recipe(task, batch, quantize, args.small)
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      _measure_plan(args, lowering.open_plan(config, mesh), figure, args.small)


def _measure_plan(args, plan, figure, small):
  peak = accelerator.report_peak(argparse.Namespace(small=small, repeats=args.repeats))
  sample, inputs, keywords = lowering.rollout_program(plan)
  inputs = fill(inputs)
  score, score_inputs, _ = reward_program.program(
    plan, reward_program.on_devices(plan.config)[0][0]
  )
  tower, (_, tokens) = fill(score_inputs[0]), score_inputs[1]
  tokens = fill(tokens)
  update, (_, _, _, pieces), _ = lowering.update_program(plan)
  state = jax.jit(functools.partial(state_lib.init_state, optimizer=plan.method.optimizer))(
    inputs[0]["trainable"]
  )
  advantage = np.random.default_rng(0).normal(size=np.shape(pieces.advantage)).astype(np.float32)
  weight = np.ones_like(advantage)
  seconds: dict[str, list[float]] = collections.defaultdict(list)

  def timed(name, function, *inputs, **keywords):
    began = time.perf_counter()
    result = jax.block_until_ready(function(*inputs, **keywords))
    seconds[name].append(time.perf_counter() - began)
    return result

  for _ in range(2):  # the first one compiles
    transitions, images = timed("rollout", sample, *inputs, **keywords)
    flat = images.reshape(-1, *images.shape[2:])
    timed("pickscore", score, tower, (flat, tokens))
    batch = batches_lib.stacked(
      plan.config, batches_lib.Batch([transitions], [inputs[4]], advantage, weight)
    )
    state, row = timed("update", update, state, inputs[0]["frozen"], {}, batch)
  took = {name: both[-1] for name, both in seconds.items()}
  rate = lambda time: round(plan.images / time, 3)
  shared = dict(batch=plan.config.train.microbatch, images=plan.images, small=small)
  shared |= dict(model=plan.config.model.path, quantize=plan.config.model.quantize)
  latents = jnp.repeat(transitions.final, plan.images // len(transitions.final), axis=0)
  for name, asked in decoders(plan) if figure == "epoch" else [("own", plan.config.vae)]:
    seconds_alone = time_decoder(plan, name, asked, latents)
    report(
      "vae_decode",
      decoder=name,
      dtype=asked.dtype,
      images_per_chunk=asked.images_per_chunk,
      seconds=round(seconds_alone, 4),
      images_per_second=rate(seconds_alone),
      **shared,
    )
  report(
    "pickscore",
    seconds=round(took["pickscore"], 4),
    images_per_second=rate(took["pickscore"]),
    **shared,
  )
  for name, function, given in (
    ("rollout", sample, inputs),
    ("update", update, (state, inputs[0]["frozen"], {}, batch)),
  ):
    work = accelerator.count(
      functools.partial(function, **keywords if name == "rollout" else {}), *given
    )
    devices = plan.mesh.size
    report(
      f"{figure}_{name}",
      seconds=round(took[name], 4),
      of_peak=round(work.total / took[name] / (peak * devices), 4),
      tflop=round(work.total / 1e12, 4),
      compile_seconds=round(seconds[name][0] - took[name], 1),
      **shared,
    )
  total = sum(took.values())
  report(
    figure,
    seconds=round(total, 4),
    images_per_second=rate(total),
    first_log_ratio=float(row["ratio/max_abs_log"]),
    peak_gib=accelerator.peak_gib(),
    **shared,
  )


def decoders(plan: lowering.Plan) -> list[tuple[str, config_lib.Vae]]:
  """("own" autoencoder or "small" decoder, dtype and chunk) of what is timed alone, the recipe's first."""
  ways = [(plan.config.vae.dtype, 8), ("bfloat16", 1), ("bfloat16", 32), ("float32", 8)]
  own = [("own", config_lib.Vae(*way)) for way in dict.fromkeys(ways)]
  return [*own, ("small", config_lib.Vae("bfloat16", 8))]


def time_decoder(plan: lowering.Plan, name: str, asked: config_lib.Vae, latents: Any) -> float:
  """Seconds in which a decoder with random weights paints all latents."""
  _, sizes = lowering.load_sizes(plan.config)
  assert sizes
  if name == "small":
    depth = len(sizes.block_out_channels)
    sizes = tiny_vae.TinyVAEConfig(
      latent_channels=sizes.scaled_channels,
      decoder_block_out_channels=(64,) * depth,
      num_decoder_blocks=(*(3,) * (depth - 1), 1),
    )
  decode, abstract = pipeline.decoder_outline(asked, sizes)
  dtype = jnp.dtype(asked.dtype)
  stored = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
  alone = functools.partial(jax.jit(decode), fill(mesh_lib.abstract(plan.mesh, stored)), latents)
  return float(timing.interleave({"decode": alone}, repeats=1, warmup=1)["decode"][0])


def fill(tree: Any) -> Any:
  """Random numbers in place of shapes; whatever is there already stays."""

  def one(leaf):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      return accelerator.draw_weight(leaf, leaf.sharding)
    if leaf.dtype == jnp.int8:  # codes of a quantised matrix
      codes = lambda: jax.random.randint(jax.random.key(0), leaf.shape, -127, 128, jnp.int8)
      return jax.jit(codes, out_shardings=leaf.sharding)()
    return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

  return jax.tree.map(one, tree)


def tiny_text(args: argparse.Namespace) -> None:
  """The built-in task to its end, or as far as the time goes."""
  config = presets.recipe("tiny_text", "tp_grpo")
  fields: dict[str, Any] = {"run.dir": str(args.output / "tiny_text"), "log.tensorboard": False}
  if args.small:
    fields |= {
      "rewards": {"jpeg_compressibility": 1.0},
      "train": config_lib.Train(epochs=1, prompts_per_epoch=2, group_size=4, microbatch=8),
      "eval": dataclasses.replace(config.eval, prompts=8, batch=8, judge_prompts=0),
    }
    fields["train"] = dataclasses.replace(fields["train"], updates_per_epoch=1)
  config = with_fields(config, fields)
  began = time.time()
  # It saves what it has and ends, a little before the time is over.
  ask = threading.Timer(max(1.0, left(args) - 15), signal.raise_signal, [signal.SIGTERM])
  ask.daemon = True
  ask.start()
  try:
    loop.train(config)
    ended = "to its end"
  except preemption.Preempted:
    ended = "the time was over"
  ask.cancel()
  rows = metrics.read_rows(pathlib.Path(config.run.dir) / "metrics.jsonl")
  held_out = [row["reward/mean"] for row in rows if row["kind"] == "eval"]
  report(
    "tiny_text",
    minutes=round((time.time() - began) / 60, 2),
    ended=ended,
    epochs=max(row["epoch"] for row in rows),
    of_epochs=config.train.epochs,
    held_out_before=round(held_out[0], 4),
    held_out_after=round(held_out[-1], 4),
    seconds_an_epoch=round(
      float(np.median([r["time/epoch"] for r in rows if "time/epoch" in r])), 3
    ),
  )


PARTS = {f.__name__: f for f in (correctness, sd35, torch, epoch, flux, tiny_text)}
