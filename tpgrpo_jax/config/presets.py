"""What recipes are made of: tasks x methods.

A task (tasks.py) says what is trained on what; a method is a row of METHODS, the few
fields that it sets. `recipe(task, method)` is the config of both. A row's value may be a function of the
task's config, where a method asks for a share of it.
"""

import dataclasses
from typing import Any

from tpgrpo_jax import registry
from tpgrpo_jax.config import names
from tpgrpo_jax.config.fields import Config, Sampler
from tpgrpo_jax.config.tasks import TASKS


def _all_steps(task: Config) -> tuple[int, int]:
  return (0, task.sampler.num_steps)


def _noisy_steps(task: Config) -> tuple[int, int]:
  """All steps but the last, in which cps has no noise."""
  return (0, task.sampler.num_steps - 1)


def _half_of_the_steps(task: Config) -> tuple[int, int]:
  return (0, task.sampler.num_steps // 2)


def _two_steps(task: Config) -> tuple[int, int]:
  return (0, min(2, task.sampler.num_steps - 1))


def _first_steps(task: Config) -> tuple[int, int]:
  return (0, min(5, task.sampler.num_steps - 1))


def _steps_in_a_fifth(task: Config) -> tuple[int, int]:
  """MixGRPO's 4 of 25 steps, at least two."""
  return (0, max(2, 4 * task.sampler.num_steps // 25))


def _whole_group(task: Config) -> int:
  return task.train.group_size


def _whole_anchors(task: Config) -> int:
  """The members of at most eight anchors: an update evaluates anchors, and few make a poor batch."""
  train = task.train
  anchors = train.prompts_per_epoch // train.updates_per_epoch
  return train.group_size * max(n for n in range(1, 9) if anchors % n == 0)


def _lanes(task: Config) -> int:
  """One at a time where so many members fill the devices anyway; latents of pixels are small."""
  return 0 if task.model.variant in names.BUILT_IN_VARIANTS else 1


def _clip_of_branches(task: Config) -> float:
  """The task's; five times it for small latents, where the mean over fewer numbers is as much noisier."""
  return task.loss.clip_range * (5 if task.model.variant in names.BUILT_IN_VARIANTS else 1)


def _rate_of_forward(task: Config) -> float:
  """The task's; 5e-5 for the built-in models: at 1.5e-4 diffusion_nft learns, then falls."""
  return 5e-5 if task.model.variant in names.BUILT_IN_VARIANTS else task.optimizer.learning_rate


def _chunks(task: Config) -> tuple[int, ...]:
  """GCPO's fixed lengths [2, 3, 4, 7] of 16, scaled to the steps that have noise."""
  steps = task.sampler.num_steps - 1
  bounds = [round(steps * share / 16) for share in (0, 2, 5, 9, 16)]
  return tuple(b - a for a, b in zip(bounds, bounds[1:]) if b > a)


def _half_of_the_chunks(task: Config) -> int:
  return max(1, len(_chunks(task)) // 2)


def _no_guidance(task: Config) -> float:
  """1, but for models that are told a scale and know no other way."""
  return task.sampler.guidance_scale if task.model.variant in names.TOLD_VARIANTS else 1.0


_FORWARD = {
  "sampler.rollout": "ode",
  "sampler.noise_level": Sampler.noise_level,  # it has none
  "credit.method": "flow_grpo",
  "advantage.normalization": "global_std",
  "loss.clip_range": 0.0,
  "sampler.guidance_scale": _no_guidance,
  "optimizer.learning_rate": _rate_of_forward,
}
_BRANCH = {
  "sampler.rollout": "branch",
  "sampler.branches": _whole_group,
  "credit.method": "branch",
  "advantage.group": "state",
  "train.microbatch": _whole_anchors,
  "completion.lanes_per_chunk": _lanes,
  "loss.clip_range": _clip_of_branches,
}

METHODS: dict[str, dict[str, Any]] = {
  "flow_grpo": {"credit.method": "flow_grpo"},
  "flow_grpo_fast": {
    "credit.method": "flow_grpo",
    "sampler.window": _two_steps,
    "sampler.window_range": _noisy_steps,
    "sampler.window_draw": "microbatch",
    "sampler.noise_level": 0.8,
    "sampler.guidance_scale": _no_guidance,
    "advantage.normalization": "global_std",
  },
  "mixgrpo": {
    "credit.method": "flow_grpo",
    "sampler.window": _steps_in_a_fifth,
    "sampler.window_every": 25,
    "sampler.dynamics": "sde",
    "sampler.same_latent": True,
    "advantage.per_reward": True,
    "loss.clip_range": 1e-4,
  },
  "tp_grpo": {"credit.method": "tp_grpo"},
  "tp_grpo_consistent": {"credit.method": "tp_grpo_consistent"},
  "tp_grpo_fast": {"credit.method": "tp_grpo", "completion.steps": 2},
  "increments": {"credit.method": "increments"},
  "aggregation": {"credit.method": "aggregation"},
  "densegrpo": {
    "credit.method": "increments",
    "sampler.dynamics": "dance",
    "sampler.noise_level": 0.7,
    "sampler.calibration": 1,
    "loss.clip_range": 1e-4,
  },
  "stepwise": {
    "credit.method": "increments",
    "completion.steps": 5,
    "advantage.normalization": "group_joint",
  },
  "vgpo": {
    "credit.method": "vgpo",
    "completion.steps": 1,
    "sampler.window": _first_steps,
    "advantage.normalization": "value",
  },
  "coca": {"credit.method": "coca"},
  "branch": _BRANCH,
  "tempflow": {**_BRANCH, "loss.step_weight": "std"},
  "g2rpo": {
    **_BRANCH,
    "completion.strides": (1, 2),
    "sampler.dynamics": "sde",
    "sampler.window": _half_of_the_steps,
    "train.updates_by": "steps",
    "train.updates_per_epoch": lambda task: task.sampler.num_steps // 2,
    "loss.clip_range": 1e-4,
  },
  "grpo_guard": {
    "credit.method": "flow_grpo",
    "sampler.dynamics": "sde",
    "loss.ratio": "normalized",
    "loss.step_weight": "inverse_dt",
    "loss.clip_range": 2e-6,
  },
  "flow_dppo": {"credit.method": "flow_grpo", "loss.trust_region": "dppo", "loss.clip_range": 1e-5},
  "gcpo": {
    "credit.method": "flow_grpo",
    "sampler.dynamics": "sde",
    "sampler.same_latent": True,
    "loss.chunks": _chunks,
    "loss.chunks_per_sample": _half_of_the_chunks,
    "loss.clip_range": 5e-5,
  },
  "diffusion_nft": {
    **_FORWARD,
    "sampler.window": _all_steps,
    "loss.objective": "nft",
    "loss.levels": lambda task: task.sampler.num_steps - 1,
    "loss.kl_coef": 1e-4,
  },
  "awm": {
    **_FORWARD,
    "sampler.window": _noisy_steps,
    "loss.objective": "awm",
    "loss.levels": lambda task: min(6, task.sampler.num_steps - 1),
    "loss.level_draw": "stratified",
    "loss.kl_coef": 1e-3,
    "loss.old_coef": 1.0,
    "loss.old_decay": (0.0, 0.001, 0.3),
    "train.updates_per_epoch": 1,
  },
}
"""Name -> the fields that a method sets."""

OF_LATENTS: dict[str, dict[str, Any]] = {
  "latent_increments": {"credit.method": "latent_increments"},
}
"""The same of methods that only go with tasks whose rewards take latents."""

PAPERS = {
  "flow_grpo": "2505.05470",
  "flow_grpo_fast": "2505.05470",
  "mixgrpo": "2507.21802",
  "tp_grpo": "2602.06422",
  "tp_grpo_consistent": "2602.06422",
  "tp_grpo_fast": "2602.06422",
  "increments": "2602.06422",
  "aggregation": "2602.06422",
  "densegrpo": "2601.20218",
  "stepwise": "2603.28718",
  "vgpo": "2512.12387",
  "coca": "2505.19196",
  "branch": "2508.04324",
  "tempflow": "2508.04324",
  "g2rpo": "2510.01982",
  "grpo_guard": "2510.22319",
  "flow_dppo": "",
  "gcpo": "2510.21583",
  "diffusion_nft": "2509.16117",
  "awm": "2509.25050",
  "latent_increments": "2602.11146",
}
"""Name -> the arXiv number of its paper; empty where only code was found."""

READINGS = {
  "flow_grpo_fast": "Two steps, of the one to three that their code takes.",
  "mixgrpo": "The last window is a whole one; their code cuts it short, and makes 4 updates an epoch.",
  "tp_grpo": "R[0] has the sample's own noise, and balancing takes the whole epoch.",
  "tp_grpo_consistent": "As tp_grpo.",
  "tp_grpo_fast": "Ours: tp_grpo on completions of two steps.",
  "increments": "Ours: tp_grpo without turning points.",
  "aggregation": "Ours: tp_grpo without increments.",
  "densegrpo": "Start, rounds, trajectories and tolerance of the noise levels are ours.",
  "vgpo": "The formula, gamma .9 and bonus .1 could not be checked.",
  "coca": "Of the latents themselves, gains alone; their code compares one-step images, with their sign.",
  "branch": "Ours: tempflow without step weights.",
  "tempflow": "The task's cps for their SDE; the whole group leaves one anchor, theirs has 4 anchors of 6.",
  "g2rpo": "Half of T steps, of any T; strides of their scripts (the paper has 3 as well).",
  "grpo_guard": "Every sample has its own quadratic term; their code averages it over the microbatch.",
  "flow_dppo": "After Tencent-Hunyuan/UniRL, its code; no paper was found.",
  "gcpo": "Their chunks of 2, 3, 4, 7 of 16 steps, scaled to T; drawn evenly.",
  "diffusion_nft": "The rollout is Euler's; theirs is DPM-Solver++(2M).",
  "awm": "The rollout is Euler's ODE; theirs is SA-Solver, in part stochastic.",
  "latent_increments": "Ours: DiNa-LRM on the trajectory's own noisy states; the paper noises finished ones.",
}
"""Name -> where a method is our reading or differs from the paper or its code, in one sentence."""


def recipe(task: str, method: str) -> Config:
  """The config of a task trained by a method; its run folder is runs/<task>_<method>, with the seed.

  Args:
    task: a name of TASKS.
    method: a name of METHODS or OF_LATENTS.

  Raises:
    ValueError: an unknown name, with the nearest one.
  """
  base = registry.lookup(TASKS, task, field="task")()
  known = METHODS | OF_LATENTS
  registry.check(method, known, field="method")
  changes = {"run.dir": f"runs/{task}_{method}{{seed}}", "run.label": method, **known[method]}
  return apply(base, changes)


def apply(config: Config, changes: dict[str, Any]) -> Config:
  """The config with some dotted fields changed; a callable value is given the config as it was."""
  changed = config
  for name, value in changes.items():
    group, _, field = name.partition(".")
    value = value(config) if callable(value) else value
    part = dataclasses.replace(getattr(changed, group), **{field: value})
    changed = dataclasses.replace(changed, **{group: part})
  return changed
