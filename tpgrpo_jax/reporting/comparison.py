"""What several seeds of several methods say: means with intervals, at equal cost and at the end.

An interval is Student's t over seeds, 95 %: mean +- t(.975, n - 1) s / sqrt(n). With three to five seeds a
percentile bootstrap would be far too narrow. Of one seed there is none.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tpgrpo_jax.reporting import history

Groups = Mapping[str, Sequence[history.Run]]


class Estimate(NamedTuple):
  """A mean over seeds; half is half the width of its 95 % interval, NaN of fewer than two seeds."""

  mean: float
  half: float

  def __str__(self) -> str:
    mean = f"{self.mean:.3f}".replace("0.", ".", 1) if abs(self.mean) < 1 else f"{self.mean:.3g}"
    if np.isnan(self.mean):
      return ""
    return mean if np.isnan(self.half) else f"{mean} ± {self.half:.3f}".replace("± 0.", "± .")


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """Of one value a seed; those that are not finite are left out."""
  from scipy import stats  # slow to import, and JAX brings it

  found = np.asarray(values, float)
  found = found[np.isfinite(found)]
  if not len(found):
    return Estimate(np.nan, np.nan)
  half = np.nan
  if len(found) > 1:
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
  return Estimate(float(found.mean()), float(half))


def curve(run: history.Run, reward: str, against: str) -> tuple[np.ndarray, np.ndarray]:
  """(spent [N], score [N]) of a run's evaluations; `against` is a name of history.TOTALS, or "epoch"."""
  total = history.TOTALS.get(against, against)
  name = f"reward/{reward}/mean"
  pairs = [(history.number(r, total), history.number(r, name)) for r in run.evals]
  pairs = np.array([p for p in pairs if np.all(np.isfinite(p))]).reshape(-1, 2)
  return pairs[:, 0], pairs[:, 1]


def common_budget(groups: Groups, reward: str, against: str) -> float:
  """The most that every run has spent."""
  ends = [curve(run, reward, against)[0] for runs in groups.values() for run in runs]
  return min((float(spent[-1]) if len(spent) else 0.0) for spent in ends)


def score_at(run: history.Run, reward: str, against: str, budget: float) -> float:
  """The held-out score after a budget, between two evaluations by a straight line."""
  spent, score = curve(run, reward, against)
  return float(np.interp(budget, spent, score)) if len(spent) else np.nan


def area_to(run: history.Run, reward: str, against: str, budget: float) -> float:
  """Mean held-out score on the way to a budget: the area under the curve over its length."""
  spent, score = curve(run, reward, against)
  if not len(spent) or not budget:
    return np.nan
  # A calibration is spent before the first evaluation: until its end the base is all that there is.
  spent, score = np.insert(spent, 0, 0.0), np.insert(score, 0, score[0])
  inside = spent < budget
  x = np.append(spent[inside], budget)
  y = np.append(score[inside], np.interp(budget, spent, score))
  return float(np.trapezoid(y, x) / (x[-1] - x[0])) if x[-1] > x[0] else float(y[-1])


def paired(
  runs: Sequence[history.Run],
  others: Sequence[history.Run],
  reward: str,
  against: str,
  budget: float,
) -> Estimate:
  """Difference of scores at a budget, seed by seed, over the seeds that both have."""
  theirs = {run.config.seed: run for run in others}
  return estimate(
    [
      score_at(run, reward, against, budget)
      - score_at(theirs[run.config.seed], reward, against, budget)
      for run in runs
      if run.config.seed in theirs
    ]
  )


COLUMNS: tuple[str, ...] = (
  "method",
  "seeds",
  "final",
  "best",
  "judged",
  "judged, best weights",
  "edge density",
  "evaluations",
  "model TFLOP",
  "TFLOP with rewards",
  "minutes",
  "s an epoch",
  "at equal evaluations",
  "at equal model TFLOP",
  "at equal TFLOP with rewards",
  "at equal minutes",
  "on the way there",
)


def table(
  groups: Groups,
  reward: str,
  baseline: str = "flow_grpo",
  seconds: Mapping[str, float] | None = None,
) -> list[tuple[str, ...]]:
  """Rows of text under COLUMNS, and a last column: the paired difference to the baseline.

  "judged" are the judge's scores, of the last weights and of those that the evaluations chose; where some
  runs have none, with the number of those that do. "s an epoch" is the median epoch of the quickest seed:
  what a busy machine disturbs least. Equal evaluations, TFLOP and minutes are the most that all runs have
  spent, where a minute is of epochs that take so long; "on the way there" is `area_to` the first of them.
  TFLOP with rewards are blank where a run has a reward that does not say what it takes.

  Args:
    groups: as of `history.load_runs`.
    reward: a held-out one.
    baseline: the label that differences are taken to, at equal evaluations; without it they are left out.
    seconds: of an epoch, for every label, where it was measured apart from these runs.
  """
  spent = ("evaluations", "teraflops", "teraflops_with_rewards")
  budgets = {a: common_budget(groups, reward, a) for a in spent}
  seconds = seconds or {label: seconds_per_epoch(runs) for label, runs in groups.items()}
  # A calibration comes before the first epoch.
  ahead = {label: _seconds_ahead(runs) for label, runs in groups.items()}
  ends = [
    ahead[label] + common_budget({label: runs}, reward, "epoch") * seconds[label]
    for label, runs in groups.items()
  ]
  shortest = min(filter(np.isfinite, ends), default=np.nan)
  compares = baseline in groups
  rows: list[tuple[str, ...]] = [COLUMNS + (f"minus {baseline}",) * compares]
  for label, runs in groups.items():
    o = history.outcome(runs, reward)
    best = [curve(run, reward, "evaluations")[1].max(initial=-np.inf) for run in runs]
    at = {
      a: estimate([score_at(run, reward, a, budget) for run in runs if budget])
      for a, budget in budgets.items()
    }
    area = estimate([area_to(run, reward, "evaluations", budgets["evaluations"]) for run in runs])
    mean = lambda values, form: "" if np.isnan(values).all() else format(np.nanmean(values), form)
    cells = [f"`{label}`", str(len(runs)), str(estimate(o.final)), str(estimate(best))]
    for weights in ("last", "best"):
      name = f"{weights}/reward/{reward}/mean"
      found = np.array([history.number(run.judged, name) for run in runs])
      of = np.isfinite(found).sum()
      cells.append(f"{estimate(found)} ({of})" if 0 < of < len(runs) else str(estimate(found)))
    cells += [mean(o.edges, ".3f").lstrip("0"), mean(o.evaluations, ",.0f")]
    epochs = (shortest - ahead[label]) / seconds[label]
    in_time = estimate([score_at(run, reward, "epoch", epochs) for run in runs])
    cells += [mean(o.teraflops, ",.3g"), mean(o.teraflops_with_rewards, ",.3g")]
    cells += [mean(o.seconds / 60, ".1f")]
    cells += ["" if np.isnan(seconds[label]) else f"{seconds[label]:.1f}"]
    cells += [*map(str, at.values()), str(in_time), str(area)]
    if compares:
      others = groups[baseline]
      budget = budgets["evaluations"]
      same = label == baseline
      cells += ["" if same else str(paired(runs, others, reward, "evaluations", budget))]
    rows.append(tuple(cells))
  return rows


def turning_points(groups: Groups) -> list[tuple[str, ...]]:
  """Rows of text: of each label that looks for turning points, the share of samples that have one at a step.

  Means over seeds and the epochs that all of them have: "found / paid", paid after balancing. Runs of older
  versions did not count what was found: they are left out beside others. Empty where no label has any.
  """
  rows = []
  for label, runs in groups.items():
    counted = [
      run for run in runs if len(history.per_step([run], "turning_point_found")[0])
    ] or runs
    found, paid = (
      history.per_step(counted, n)[1] for n in ("turning_point_found", "turning_point")
    )
    if paid.any() or found.any():
      cells = [f"{share:.3f}".lstrip("0") for share in paid.mean(axis=1)]
      if len(found):
        before = (f"{share:.3f}".lstrip("0") for share in found.mean(axis=1))
        cells = [f"{f} / {p}" for f, p in zip(before, cells, strict=True)]
      rows.append((f"`{label}`", *cells))
  steps = max((len(row) - 1 for row in rows), default=0)
  head = ("found / paid at step", *map(str, range(steps)))
  return [head, *(row + ("",) * (1 + steps - len(row)) for row in rows)] if rows else []


def seconds_per_epoch(runs: Sequence[history.Run]) -> float:
  """Of the quickest seed, the median without the first two, which compile; NaN of runs without more."""
  each = [[history.number(row, "time/epoch") for row in run.train[2:]] for run in runs]
  return float(min((np.median(seconds) for seconds in each if seconds), default=np.nan))


def _seconds_ahead(runs):
  """Of the first evaluation, of the quickest seed; 0 where no run tells."""
  spent = [history.number(row, "time/total") for run in runs for row in run.evals[:1]]
  return float(min(filter(np.isfinite, spent), default=0.0))


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
  """A table whose first row is its head."""
  lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
