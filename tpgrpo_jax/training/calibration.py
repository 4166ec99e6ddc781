"""Noise levels that are found before the first epoch (DenseGRPO, arXiv 2601.20218)."""

import dataclasses
import functools
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from tpgrpo_jax.cost import utilisation
from tpgrpo_jax.credit import calibration, stepwise
from tpgrpo_jax.runs import preemption, processes, run_folder
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import rollout
from tpgrpo_jax.training import session as session_lib

FILE = "noise_levels.json"
_STREAM = 2**31 - 1  # of the keys, beside those of the epochs


def calibrated(
  session: session_lib.Session, on_chunk: preemption.OnChunk = preemption.go_on
) -> session_lib.Session:
  """The session with the noise levels of its run folder, which are found first where there are none yet.

  They depend on config, weights and prompts alone: a run that is cut on the way finds the same ones.

  Args:
    session: of a run whose config asks for a calibration; any other stays as it is.
    on_chunk: called between microbatches with a scoring to wait for; raises to end.
  """
  if not session.config.sampler.calibration:
    return session
  stored = _stored(session)
  if not stored:
    stored = find_levels(session, on_chunk)
    if processes.is_first():
      run_folder.write(_path(session), (json.dumps(stored, indent=1) + "\n").encode())
  return session_lib.with_noise_levels(session, tuple(stored["noise_levels"]))


def spent(session: session_lib.Session) -> dict[str, Any]:
  """What the calibration of a run took, zeros without one.

  Returns:
    "evaluations" and "flops" of the model, pictures "scored", and "reward_flops", None where a reward does
    not say it.
  """
  nothing = {"evaluations": 0, "flops": 0.0, "scored": 0, "reward_flops": 0.0}
  stored = _stored(session) if session.config.sampler.calibration else {}
  found = {name: stored.get(name, none) for name, none in nothing.items()}
  return found | {"evaluations": round(found["evaluations"])}


def _path(session):
  return epath.Path(session.config.run.dir) / FILE


def _stored(session):
  """What the run folder holds of this config, for all processes; {} for nothing.

  Before the first checkpoint a folder binds nobody, and another config may have left its levels there.
  """
  path = _path(session)
  is_there = processes.is_first() and path.exists()
  stored = processes.from_first(json.loads(path.read_text()) if is_there else {})
  return stored if stored.get("config") == run_folder.fingerprint(session.config) else {}


def find_levels(
  session: session_lib.Session, on_chunk: preemption.OnChunk = preemption.go_on
) -> dict[str, Any]:
  """Rounds of sampling with the base weights, after each of which every step's level moves.

  Returns:
    {"config": its fingerprint, "noise_levels": [W], as of `spent` what all rounds took, "rounds": of
    {"noise_levels", "positive", "negative": [W] counts of increments}}.
  """
  config, method = session.config, session.method
  sampler = config.sampler
  levels = np.full(method.window, sampler.noise_level)
  indices = session_lib.epoch_indices(config, 0, len(session.train_prompts))
  count = sampler.calibration * config.train.microbatch
  prompts = [session.train_prompts[int(i)] for i in np.resize(indices, count)]
  params = session.model.params(session.model.trainable)
  place = np.arange(*sampler.window, dtype=np.int32)
  plan = method_lib.build_plan(config, method, place)
  each = method_lib.evaluations_per_sample(config, method, plan, place)
  probe = jax.jit(functools.partial(_sample, session))
  sigmas = np.asarray(method.sigmas, np.float32)
  rounds: list[dict[str, Any]] = []
  meter = utilisation.Meter({"calibration": probe})
  base_key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
  bar = tqdm.trange(
    sampler.calibration_rounds, desc="noise levels", disable=None if processes.is_first() else True
  )
  for number in bar:
    key = jax.random.fold_in(base_key, number)
    held = jnp.asarray(levels, jnp.float32)

    def sample(chunk, group, condition, key=key, held=held):
      args = (held, params, key, chunk, group, condition, place, plan, sigmas)
      meter.count("calibration", sampler.calibration * sampler.calibration_rounds, *args)
      return probe(*args)

    rolled = rollout.collect(
      config,
      session.model,
      method,
      session.mesh,
      sample,
      session.reward_fn,
      prompts,
      on_chunk=lambda done, scoring: on_chunk(scoring),
    )
    increments = np.asarray(stepwise.increments(jnp.asarray(rolled.completion_reward[0])))
    signs = lambda which, d=increments: [int(n) for n in which(d).sum(axis=1)]
    rounds.append(
      {
        "noise_levels": [float(a) for a in levels],
        "positive": signs(lambda d: d > 0),
        "negative": signs(lambda d: d < 0),
      }
    )
    levels = np.minimum(calibration.adjust(levels, increments), _highest(sampler))
  scored = rolled.scored * sampler.calibration_rounds
  return {
    "config": run_folder.fingerprint(config),
    "noise_levels": [float(a) for a in levels],
    "evaluations": each * count * sampler.calibration_rounds,
    "flops": meter.total(),
    "scored": scored,
    "reward_flops": session.reward_fn.flops(scored, rolled.images.shape[1:3]),
    "rounds": rounds,
  }


def _highest(sampler):
  """cps has no more noise than 1."""
  return 1.0 if sampler.dynamics == "cps" else np.inf


def _sample(session, noise_levels, params, key, chunk, group, condition, place, plan, sigmas):
  """One microbatch with levels that are an argument, so that all rounds are one program."""
  config = session.config
  step_fn, log_prob_fn = method_lib.bind_dynamics(
    config.sampler, session.method.sigmas, noise_levels
  )
  method = dataclasses.replace(session.method, step_fn=step_fn, log_prob_fn=log_prob_fn)
  return rollout.sample_microbatch(
    config,
    session.model,
    method,
    params,
    key,
    chunk,
    group,
    condition,
    place,
    plan,
    sigmas=sigmas,
  )
