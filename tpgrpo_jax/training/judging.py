"""What a run has learned, on prompts that no evaluation of it has seen: base, last and best weights."""

from collections.abc import Callable, Sequence
import sys
from typing import Any, NamedTuple

import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.reporting import tables
from tpgrpo_jax.training import evaluation


class Estimate(NamedTuple):
  """A mean over prompts and its standard error."""

  mean: float
  standard_error: float

  def __str__(self) -> str:
    interval = "" if np.isnan(self.standard_error) else f" ± {1.96 * self.standard_error:.3f}"
    return f"{self.mean:.3f}{interval}"


def choose_prompts(prompts: Any, settings: config_lib.Eval) -> list[types.Prompt]:
  """The held-out prompts that judge: those after the eval.prompts that evaluations see; perhaps none.

  Args:
    prompts: sequence of all held-out ones.
    settings: how many.
  """
  first = min(settings.prompts, len(prompts))
  return [prompts[i] for i in range(first, min(first + settings.judge_prompts, len(prompts)))]


def count_evaluated(prompts: Sequence[types.Prompt], held_out: Sequence[types.Prompt]) -> int:
  """How many of the prompts that judge are evaluated too: a file may hold one twice, and `shapes` has few.

  Args:
    prompts: as of `choose_prompts`.
    held_out: those of evaluations.
  """
  seen = {*types.texts_of(held_out)}
  return sum(text in seen for text in types.texts_of(prompts))


def noise_seed(prompts: Sequence[types.Prompt], held_out: Sequence[types.Prompt]) -> int:
  """That of evaluations; another where a prompt is evaluated too, since its picture would be the same.

  Args:
    prompts: as of `choose_prompts`.
    held_out: those of evaluations.
  """
  return evaluation.NOISE_SEED + (count_evaluated(prompts, held_out) > 0)


def judge(
  evaluate: Callable[..., evaluation.Evaluation], weights: dict[str, Any], *args: Any
) -> dict[str, float]:
  """A row of metrics: each weights' scores, and their gain over the base's, prompt by prompt.

  Of each label, NAME/reward/LABEL/mean and /standard_error. Of all but the base also NAME/gain/LABEL/mean and
  /standard_error, of the paired differences: prompts and noise are the same. And NAME/image/... of the
  images.

  Args:
    evaluate: (params, *args) -> Evaluation on the prompts that judge.
    weights: name -> params, "base" first; one that is given twice is evaluated once.
    args: of evaluate.
  """
  row, scores, known = {}, {}, {}
  for name, params in weights.items():
    if id(params) not in known:
      known[id(params)] = evaluate(params, *args)
    result = known[id(params)]
    row["prompts"] = len(result.prompts)
    scores[name] = result.scores
    row |= {f"{name}/{key}": v for key, v in result.row.items() if key.startswith("image/")}
    for label, each in result.scores.items():
      row |= _named(f"{name}/reward/{label}", estimate(each))
      if name != "base":
        row |= _named(f"{name}/gain/{label}", estimate(each - scores["base"][label]))
  return row


def estimate(values: np.ndarray) -> Estimate:
  """Of one value a prompt."""
  error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
  return Estimate(float(values.mean()), float(error))


def _named(prefix, found):
  return {f"{prefix}/{field}": value for field, value in found._asdict().items()}


def summary(run_dir: str, row: dict[str, Any]) -> str:
  """What a row of `judge` says, in lines for people, with the commands that come next.

  Args:
    run_dir: of the run.
    row: with "epoch", "prompts", "prompts_evaluated" and, where best weights are kept, "best/epoch".
  """
  read = lambda key: Estimate(row[f"{key}/mean"], row[f"{key}/standard_error"])
  labels = [
    key.split("/")[2] for key in row if key.startswith("base/reward/") and key.endswith("/mean")
  ]
  lines = [f"On {row['prompts']} {tables.of_judge([row])} (mean and 95 % interval):"]
  epoch = row.get("best/epoch")
  for label in labels:
    base, last = read(f"base/reward/{label}"), read(f"last/reward/{label}")
    lines += [f"  {label}: {base} -> {last}, a gain of {read(f'last/gain/{label}')}"]
    if epoch and epoch != row["epoch"]:
      best, gain = read(f"best/reward/{label}"), read(f"best/gain/{label}")
      lines += [f"  the best weights, after epoch {epoch}: {best}, a gain of {gain}"]
  if epoch == 0:
    lines += ["No evaluation was better than the base model's."]
  elif epoch:
    lines += [f"Best weights: {run_dir.rstrip('/')}/best/{epoch}"]
  weights = " --weights best" if epoch and epoch != row["epoch"] else ""
  return "\n".join([*lines, *_next(run_dir, f"--split judge{weights}")])


def summary_of_evaluations(run_dir: str, rows: Sequence[dict[str, Any]], best: int | None) -> str:
  """As `summary`, of a run that has no prompts left to judge it: what its own evaluations say.

  Args:
    run_dir: of the run.
    rows: of its evaluations; perhaps none.
    best: epoch of the best weights; None where none are kept.
  """
  lines = []
  read = lambda row, label: Estimate(
    row[f"reward/{label}/mean"], row.get(f"reward/{label}/standard_error", np.nan)
  )
  if rows and rows[0]["epoch"] == 0:
    keys = [
      key.split("/") for key in rows[-1] if key.startswith("reward/") and key.endswith("/mean")
    ]
    lines += ["On the held-out prompts of its evaluations (mean and 95 % interval):"]
    for label in [key[1] for key in keys if len(key) == 3]:
      base, last = read(rows[0], label), read(rows[-1], label)
      lines += [f"  {label}: {base} -> {last}, a gain of {last.mean - base.mean:.3f}"]
  if best:
    lines += [f"Best weights: {run_dir.rstrip('/')}/best/{best}"]
  elif best == 0:
    lines += ["No evaluation was better than the base model's."]
  behind = rows and best and best != rows[-1]["epoch"]
  return "\n".join([*lines, *_next(run_dir, "--weights best" if behind else "")])


def _next(run_dir, flags):
  python = sys.orig_argv[0]  # as the user called it, in an environment that may not be active
  return [
    "To see it:",
    f"  {python} -m tpgrpo_jax.report --output report {run_dir}",
    f"  {python} -m tpgrpo_jax.evaluate --run {run_dir} {flags}".rstrip(),
  ]
