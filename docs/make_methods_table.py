"""Writes the table of docs/methods.md, from the recipes and the functions that count evaluations.

python docs/make_methods_table.py
"""

import pathlib

import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.config import names, presets
from tpgrpo_jax.flow import branching, completion

PAGE = pathlib.Path(__file__).with_name("methods.md")
BEGIN = "<!-- begin: python docs/make_methods_table.py writes this table -->"
END = "<!-- end -->"
TASK = "sd35m_ocr"  # T = 10, W = 9, K = 24
TASK_OF_LATENTS = "sd35m_dina"  # the same but for its reward
HEADER = (
  "method",
  "states",
  "completions",
  "credit",
  "advantage",
  "objective",
  "evaluations",
  "images",
  "update",
  "paper",
  "our reading",
)


def states(config: config_lib.Config) -> str:
  """How states come about."""
  s = config.sampler
  length = s.window[1] - s.window[0]
  parts = [s.rollout if s.branches == 1 else f"{s.rollout}, M = {s.branches}"]
  if s.rollout != "ode":
    parts.append(f"{s.dynamics} {s.noise_level:g}")
    moved = f"moves every {s.window_every} epochs" if s.window_every else "drawn"
    if s.window_every or s.window_range:
      parts.append(f"a window of {length} {moved}")
    elif length != 9:
      parts.append(f"the first {length} steps")
  if s.calibration:
    parts.append("levels calibrated")
  if s.same_latent:
    parts.append("one noise a prompt")
  return ", ".join(parts)


def completes(config: config_lib.Config) -> bool:
  """Whether the credit method needs completions."""
  return kind(config) == "all"


def kind(config: config_lib.Config) -> str:
  """What R[k] is the reward of, as of types.CreditMethod."""
  return credit.CREDIT[config.credit.method].completions


def completions(config: config_lib.Config) -> str:
  """How states are completed."""
  asked = config.completion
  if kind(config) != "all":
    return {"none": "none", "states": "none: the noisy states"}[kind(config)]
  if asked.strides:
    return f"strides {', '.join(map(str, asked.strides))}"
  if not asked.steps:
    return "exact"
  return f"{asked.steps} step{'s' * (asked.steps > 1)}" + (
    f" of {asked.solver}" if asked.solver != "euler" else ""
  )


def advantage(config: config_lib.Config) -> str:
  """How rewards become advantages."""
  a = config.advantage
  parts = [a.normalization if a.group == "prompt" else f"{a.normalization} of the {a.group}"]
  return ", ".join(parts + ["each reward alone"] * a.per_reward)


def objective(config: config_lib.Config) -> str:
  """What is minimised."""
  loss, t = config.loss, config.train
  if loss.objective != "policy":
    count = loss.levels or config.sampler.window[1] - config.sampler.window[0]
    parts = [f"{loss.objective}, {count} levels {loss.level_draw}"]
    if loss.old_coef:
      parts.append(f"old {loss.old_coef:g}")
  else:
    parts = [loss.ratio, f"{loss.trust_region} {small(loss.clip_range)}"]
    if loss.step_weight != "none":
      parts.append(f"weight {loss.step_weight}")
    if loss.chunks:
      parts.append(f"{loss.chunks_per_sample} of the chunks {', '.join(map(str, loss.chunks))}")
  if loss.kl_coef:
    parts.append(f"kl {small(loss.kl_coef)}")
  if t.updates_by != "samples":
    parts.append(f"{t.updates_per_epoch} updates by {t.updates_by}")
  elif t.updates_per_epoch != 2:
    parts.append(f"{t.updates_per_epoch} update an epoch")
  return ", ".join(parts)


def evaluations(config: config_lib.Config) -> float:
  """Evaluations of the model that a sample of the rollout takes, idle lanes too, without guidance."""
  s, asked = config.sampler, config.completion
  count = s.num_steps / s.branches
  if not completes(config):
    return count
  levels = np.linspace(1.0, 0.0, s.num_steps + 1)
  options = dict(steps=asked.steps, strides=asked.strides)
  start, end = s.window
  if s.rollout == "branch":
    plan = branching.plan(levels, range(start, end), **options)
  else:
    plan = completion.plan(levels, start=start, window=end - start, **options)
  return count + completion.num_lane_evaluations(plan, lanes_per_chunk=asked.lanes_per_chunk)


def images(config: config_lib.Config) -> float:
  """Images that are decoded and scored a sample."""
  s = config.sampler
  if set(config.rewards) <= set(names.LATENT_REWARDS):
    return 0
  window = (s.window[1] - s.window[0]) * completes(config)
  return window * max(1, len(config.completion.strides)) + 1 / s.branches


def update(config: config_lib.Config) -> str:
  """Evaluations of an update a sample: with a gradient, and without."""
  s, loss = config.sampler, config.loss
  steps = s.branch_steps or s.window[1] - s.window[0]
  forward = loss.objective != "policy"
  rows = (loss.levels or steps) if forward else steps / s.branches
  reads_old = loss.objective == "nft" or bool(loss.old_coef)
  besides = rows * ((loss.kl_coef > 0) + (forward and reads_old) + bool(loss.chunks))
  return number(rows) + (f" + {number(besides)}" if besides else "")


def small(value: float) -> str:
  """As 2e-6."""
  return f"{value:.0e}".replace("e-0", "e-")


def number(value: float) -> str:
  """Two decimals at most."""
  return f"{value:.2f}".rstrip("0").rstrip(".")


def row(name: str) -> tuple[str, ...]:
  """The cells of one method."""
  config = presets.recipe(TASK if name in presets.METHODS else TASK_OF_LATENTS, name)
  paper = presets.PAPERS[name]
  return (
    f"`{name}`",
    states(config),
    completions(config),
    f"`{config.credit.method}`",
    advantage(config),
    objective(config),
    number(evaluations(config)),
    number(images(config)),
    update(config),
    f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "",
    presets.READINGS.get(name, ""),
  )


def table() -> str:
  """All methods, as Markdown."""
  rows = [HEADER, ("---",) * len(HEADER), *map(row, presets.METHODS | presets.OF_LATENTS)]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def written(page: str) -> str:
  """The page with the table of now between the marks."""
  before, rest = page.split(BEGIN)
  return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
  PAGE.write_text(written(PAGE.read_text()))
