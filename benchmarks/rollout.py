"""What a rollout costs beyond its model evaluations: python benchmarks/rollout.py

Prints one JSON line for each figure. Times that are compared were taken in turn in one run (A B A B).

rollout_over_bare        The jitted rollout of training (noise, trajectory, log-probs, completions,
                         uint8 images) over the bare jitted velocity function called as often as the
                         rollout calls it, at the same batches: T times at B samples for the
                         trajectory, L times at lanes x B for the packed completions. Each bare call
                         is dispatched and waited for on its own.
rollout_over_bare_at_b   The same rollout over (evaluations a sample) x (one bare call at B samples).
                         Differs from the first by what a call gains or loses by being lanes times
                         larger.
packed_over_loop         All completions packed into one scan, over one completion after the other
                         with the same number of evaluations (both start from the trajectory's own
                         velocities).
packed_over_reevaluating The same, over the loop that evaluates the first velocity of every
                         completion again.
compilations             Whole epochs of training: how often each jitted function was compiled, and
                         how many compilations of anything there were after the first epoch; with the
                         window fixed, and drawn anew every epoch.
"""

import argparse
import dataclasses
import functools

import jax
import numpy as np
import timing

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.flow import completion, sampler, steps
from tpgrpo_jax.runs import processes
from tpgrpo_jax.training import build, rollout
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import session as session_lib

# (T, W): SD3.5-Medium's in the paper, FLUX.1-dev's, and that of the built-in recipes.
SHAPES = ((10, 9), (6, 5), (4, 3))


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=15, help="rounds of A B A B")
  parser.add_argument("--batch", type=int, default=64, help="samples in one device call")
  parser.add_argument("--threads", type=int, default=2, help="CPU cores; 0 is all")
  parser.add_argument("--epochs", type=int, default=4, help="of which compilations are counted")
  args = parser.parse_args()
  threads = timing.limit_threads(args.threads)
  for num_steps, window in SHAPES:
    config = make_config(num_steps, window, args.batch)
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      measure_rollout(config, mesh, args.repeats, threads)
  for window_range in ((), (0, 5)):
    count_compilations(window_range, args.epochs, threads)


def make_config(num_steps: int, window: int, batch: int) -> config_lib.Config:
  """The built-in model with T steps, the first W of them stochastic."""
  config = config_lib.Config()
  return dataclasses.replace(
    config,
    sampler=dataclasses.replace(config.sampler, num_steps=num_steps, window=(0, window)),
    train=dataclasses.replace(config.train, microbatch=batch),
    loss=dataclasses.replace(
      config.loss, ratio="normalized"
    ),  # so that the rollout keeps velocities
  )


def measure_rollout(config: config_lib.Config, mesh, repeats: int, threads: int) -> None:
  """Reports the four ratios for one (T, W)."""
  batch = config.train.microbatch
  texts = [f"W{i % 1000:03d}" for i in range(batch)]
  model = build.build_model(config, mesh, texts)
  method = method_lib.build_method(config, model)
  place = method_lib.draw_place(config, 0, 0).astype(np.int32)
  plan = method_lib.build_plan(config, method, place)
  length, lanes = plan.load.shape
  num_steps, window = config.sampler.num_steps, method.window
  params = model.params(model.trainable)
  group = np.stack([np.arange(batch), np.zeros(batch)], axis=1).astype(np.int32)
  placed = (group, method_lib.build_condition(config, model, texts))
  group, condition = processes.put_batch(mesh, placed)
  key = rollout.epoch_key(0, 0)
  sample = functools.partial(
    rollout.make_rollout_fn(config, model, method), params, key, 0, group, condition, place, plan
  )
  trajectory, _ = sample()

  velocity = jax.jit(method.velocity_fn)
  wide = jax.device_put(
    jax.tree.map(lambda c: np.repeat(c, lanes, axis=0), jax.device_get(condition)),
    mesh_lib.batch_sharding(mesh),
  )
  narrow_call = bare_call(velocity, params, trajectory.x[0], condition)
  wide_call = bare_call(velocity, params, np.repeat(trajectory.x[0], lanes, axis=0), wide)

  def bare():
    for _ in range(num_steps):
      jax.block_until_ready(narrow_call())
    for _ in range(length):
      jax.block_until_ready(wide_call())

  packed = jax.jit(
    lambda trajectory, condition, plan: completion.complete(
      method.velocity_fn, params, trajectory, condition, plan
    )
  )
  packed_call = functools.partial(packed, trajectory, condition, plan)
  loops = {
    name: functools.partial(make_loop(method, window, shared), params, trajectory, condition)
    for name, shared in (("loop", True), ("reevaluating", False))
  }
  seconds = timing.interleave(
    {
      "rollout": sample,
      "bare": bare,
      "bare_at_b": narrow_call,
      "packed": packed_call,
      **loops,
    },
    repeats=repeats,
  )
  difference = np.abs(np.asarray(packed_call()) - np.stack(loops["loop"]())).max()
  evaluations = method_lib.evaluations_per_sample(config, method, plan, place)
  sizes = dict(
    num_steps=num_steps,
    window=window,
    batch=batch,
    lanes=lanes,
    scan_length=length,
    evaluations_per_sample=evaluations,
  )
  line = functools.partial(timing.report_ratio, seconds=seconds, threads=threads, **sizes)
  line("rollout_over_bare", of="rollout", over="bare")
  line("rollout_over_bare_at_b", of="rollout", over="bare_at_b", scale=evaluations)
  line("packed_over_loop", of="packed", over="loop", max_difference=float(difference))
  line("packed_over_reevaluating", of="packed", over="reevaluating")


def bare_call(velocity, params, x, condition):
  """One call of the jitted velocity function, with its arguments already on the device."""
  x = jax.device_put(np.asarray(x))
  sigma = jax.device_put(np.full(len(x), 0.5, np.float32))
  return functools.partial(velocity, params, x, sigma, condition)


def make_loop(method: method_lib.Method, window: int, shared: bool):
  """Returns (params, trajectory, condition) -> W completed latents, each by a program of its own.

  Args:
    method: of the run.
    window: W, states that are completed; the first is that before any step.
    shared: start with the trajectory's own velocity.
  """
  sigmas = np.asarray(method.sigmas, np.float32)

  def complete_one(k, params, x, first_velocity, condition):
    grid = sigmas[k:]
    if shared:
      x, grid = steps.ode_step(x, first_velocity, grid[0], grid[1]).mean, grid[1:]
    return sampler.sample_ode(method.velocity_fn, params, x, condition, sigmas=grid)

  programs = [jax.jit(functools.partial(complete_one, k)) for k in range(window)]

  def run(params, trajectory, condition):
    return [
      jax.block_until_ready(program(params, x, v, condition))
      for program, x, v in zip(programs, trajectory.x, trajectory.velocity)
    ]

  return run


def count_compilations(window_range: tuple[int, ...], epochs: int, threads: int) -> None:
  """Trains a few small epochs and reports what was compiled."""
  base = config_lib.Config()
  config = dataclasses.replace(
    base,
    rewards={"jpeg_compressibility": 1.0},
    sampler=dataclasses.replace(
      base.sampler, num_steps=6, window=(0, 3), window_range=window_range
    ),
    train=dataclasses.replace(
      base.train, prompts_per_epoch=4, group_size=4, microbatch=4, updates_per_epoch=2
    ),
    log=dataclasses.replace(base.log, tensorboard=False, images_every=0),
  )
  compiled = []

  def listen(event, _, fun_name="", **unused):
    if event.endswith("backend_compile_duration"):
      compiled.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  session = session_lib.open_session(config)
  ends = []
  with jax.set_mesh(session.mesh):
    state = session_lib.init_state(session)
    for epoch in range(epochs):
      sampled = epoch_lib.sample_epoch(session, state, epoch)
      state, _ = epoch_lib.update_epoch(session, state, epoch, sampled)
      ends.append(len(compiled))
  names = {
    "rollout": "jit(sample_microbatch)",
    "credit": "jit(assign)",
    "train_step": "jit(train_step)",
  }
  timing.report(
    "compilations",
    threads=threads,
    window="drawn" if window_range else "fixed",
    epochs=epochs,
    **{name: compiled.count(function) for name, function in names.items()},
    anything_after_first_epoch=ends[-1] - ends[0],
  )


if __name__ == "__main__":
  main()
