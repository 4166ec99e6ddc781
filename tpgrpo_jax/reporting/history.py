"""What finished or running runs left in their folders, read-only: rows, curves, rollouts, pictures."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import os
from typing import Any, NamedTuple
import warnings
import zipfile

from etils import epath
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import credit
from tpgrpo_jax.config import bridge
from tpgrpo_jax.runs import metrics


@dataclasses.dataclass(frozen=True)
class Run:
  """One run folder.

  Attributes:
    folder: where it lies.
    label: what it is drawn as; runs of one label are seeds of one recipe.
    config: of the run.
    train: rows of its epochs.
    evals: rows of its evaluations on held-out prompts.
    judged: the row of its end, on other held-out prompts; {} before it.
  """

  folder: epath.Path
  label: str
  config: config_lib.Config
  train: list[dict[str, Any]]
  evals: list[dict[str, Any]]
  judged: dict[str, Any] = dataclasses.field(default_factory=dict)


class Band(NamedTuple):
  """One metric over the runs of a label, at the epochs that all of them have: arrays [N].

  Attributes:
    x: mean over the runs of what the metric is drawn against.
    mean: over the runs.
    low: smallest.
    high: largest.
  """

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


class Rollout(NamedTuple):
  """One epoch's trajectories, as training keeps them every log.images_every epochs.

  Attributes:
    epoch: 1 for the first.
    completion_reward: [W+1, B]; NaN where no completion was made.
    is_turning_point: [W, B].
    prompts: [B].
    images: uint8 [N <= B, H, W, 3] of the first samples.
    found: [W, B], the turning points before balancing; None where the method looks for none.
    branched: whether R[0] and the images are the anchors', and R[k+1] is of the member that left at step k.
  """

  epoch: int
  completion_reward: np.ndarray
  is_turning_point: np.ndarray
  prompts: np.ndarray
  images: np.ndarray
  found: np.ndarray | None = None
  branched: bool = False


class Grid(NamedTuple):
  """The pictures of one evaluation.

  Attributes:
    epoch: finished ones; 0 is the base model.
    path: of the sheet with all of them.
    said: as of training.evaluation.describe; {} of a run that did not keep it.
  """

  epoch: int
  path: epath.Path
  said: dict[str, Any]


def load_run_config(run_dir: str | os.PathLike[str]) -> config_lib.Config:
  """Reads run_dir/config.json.

  Raises:
    ValueError: no such folder, no config in it, or one that this version cannot read.
  """
  folder = epath.Path(run_dir)
  if not folder.is_dir():
    raise ValueError(
      f"run={str(run_dir)!r}: no such folder. Give the run.dir that training was started with."
    )
  path = folder / "config.json"
  if not path.is_file():
    inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
    fix = f"Did you mean one of {', '.join(inside)} in it?" if inside else "Check the path."
    raise ValueError(f"run={str(run_dir)!r}: is not a run folder: it has no config.json. {fix}")
  try:
    return config_lib.from_config_dict(config_lib.Config, json.loads(path.read_text()))
  except ValueError as error:  # JSONDecodeError is one
    raise ValueError(
      f"{path}: cannot be read ({error}). Was it made by another version?"
    ) from error


def load_run(run_dir: str | os.PathLike[str], label: str = "") -> Run:
  """Opens a run folder.

  Args:
    run_dir: the folder; training may still be writing to it.
    label: "" is the config's run.label, or its credit.method.

  Raises:
    ValueError: as of `load_run_config`, or a run without a single row of metrics.
  """
  folder, config = epath.Path(run_dir), load_run_config(run_dir)
  rows = metrics.rows_of(folder)
  if not rows:
    there = (folder / "metrics.jsonl").is_file()
    raise ValueError(
      f"run={str(run_dir)!r}: metrics.jsonl {'is empty' if there else 'is missing'}. "
      "Training writes its first row after the evaluation of the base model: wait for it."
    )
  train, evals = ([r for r in rows if r.get("kind") == kind] for kind in ("train", "eval"))
  evals = metrics.comparable(evals, evals[-1]) if evals else []
  judged = next((r for r in reversed(rows) if r.get("kind") == "judge"), {})
  # With prompts left to judge, the evaluations had all that were asked for.
  if judged:
    evals = [_with_standard_errors(row, config.eval.prompts) for row in evals]
  label = label or config.run.label or config.credit.method
  return Run(folder, label, config, train, evals, judged)


def _with_standard_errors(row, prompts):
  """The row, with the standard errors that older runs did not write."""
  found = {}
  for name in row:
    if (
      name.startswith("reward/") and name.endswith("/std") and name.count("/") == 2 and prompts > 1
    ):
      error = number(row, name) / np.sqrt(prompts - 1)
      found[f"{name.removesuffix('/std')}/standard_error"] = float(error)
  return found | row


def load_runs(arguments: Sequence[str]) -> dict[str, list[Run]]:
  """Opens "dir" or "label=dir" arguments; runs of one label are grouped, in the order given.

  Raises:
    ValueError: no argument, the same folder twice, or runs that have the same label although their
      recipes differ in more than the seed.
  """
  if not arguments:
    raise ValueError("report: needs one run folder or more. Try: report runs/tiny_text_tp_grpo")
  groups, seen = {}, set()
  for argument in arguments:
    label, folder = _split(argument)
    run = load_run(folder, label)
    if run.folder.resolve() in seen:
      raise ValueError(
        f"run={folder!r}: given twice. Seeds must differ, or the spread is too small."
      )
    seen.add(run.folder.resolve())
    first = groups.setdefault(run.label, [run])[0]
    if first is run:
      continue
    if fields := differences([first.config, run.config]):
      found = (
        f"run={folder!r}: has the label {run.label!r} as {str(first.folder)!r} has, but differs in "
        f"{', '.join(fields)}."
      )
      if not label:
        raise ValueError(f"{found} Tell them apart: other_name={folder}")
      warnings.warn(f"{found} They are drawn as one, as asked.", stacklevel=2)
    groups[run.label].append(run)
  return groups


def _split(argument):
  """(label or "", folder): a label, as a folder, may hold "=" too, so what is a folder decides."""
  parts = argument.split("=")
  ways = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(len(parts))]
  return next((w for w in ways if epath.Path(w[1]).is_dir()), ways[min(1, len(ways) - 1)])


# What may differ between the seeds of one recipe: these, and all that says where and how long it ran.
_NOT_RECIPE = ("seed", "run.", "train.epochs", "log.", "checkpoint.", "mesh.", "eval.every")


def differences(configs: Sequence[config_lib.Config]) -> dict[str, list[Any]]:
  """Recipe fields in which configs differ: dotted name -> the value in each."""
  flat = [bridge.flatten(dataclasses.asdict(config)) for config in configs]
  fields = {name: [f.get(name) for f in flat] for name in {k: None for f in flat for k in f}}
  return {
    name: values
    for name, values in fields.items()
    if not name.startswith(_NOT_RECIPE) and any(v != values[0] for v in values)
  }


def reward_labels(groups: Mapping[str, Sequence[Run]]) -> list[str]:
  """The rewards that held-out evaluation reported, in the order of their first appearance."""
  names = {k: None for runs in groups.values() for r in runs for row in r.evals for k in row}
  return [n[len("reward/") : -len("/mean")] for n in names if _is_reward_mean(n)]


def alike(groups: Mapping[str, Sequence[Run]], what: Any) -> list[dict[str, Sequence[Run]]]:
  """The groups, put together where what(config) of their first run is equal: what one axis may show."""
  parts: list[tuple[Any, dict[str, Sequence[Run]]]] = []
  for label, runs in groups.items():
    own = what(runs[0].config)
    same = next((part for key, part in parts if key == own), None)
    if same is None:
      parts.append((own, same := {}))
    same[label] = runs
  return [part for _, part in parts]


def reward_spec(config: config_lib.Config, reward: str) -> Any:
  """How a reward is made, without its weight: what must be equal for its scores to be comparable."""
  asked = config.rewards.get(reward)
  return {k: v for k, v in asked.items() if k != "weight"} if isinstance(asked, Mapping) else {}


def training_sum(config: config_lib.Config) -> str:
  """What a run is trained on, such as "ocr + 0.1 bright"."""
  weights = {
    label: asked.get("weight", 1.0) if isinstance(asked, Mapping) else asked
    for label, asked in config.rewards.items()
  }
  return " + ".join(k if w == 1 else f"{w:g} {k}" for k, w in weights.items())


def _is_reward_mean(name):
  return name.startswith("reward/") and name.endswith("/mean") and name != "reward/mean"


def number(row: dict[str, Any], name: str) -> float:
  """A value of a row; NaN when it is missing or was not finite (such are written as text)."""
  value = row.get(name)
  return float(value) if isinstance(value, int | float) else float("nan")


def band(runs: Sequence[Run], kind: str, name: str, against: str = "updates") -> Band:
  """One metric over the seeds of a recipe.

  Args:
    runs: of one label.
    kind: "train" or "evals".
    name: of the metric.
    against: "updates" or a name of TOTALS.

  Returns:
    Curves over the epochs at which every run has a finite value; they may be empty.
  """
  tables = []
  for run in runs:
    values = {row["epoch"]: (_position(run, row, against), number(row, name))
              for row in getattr(run, kind) if "epoch" in row}  # fmt: skip
    tables.append({epoch: pair for epoch, pair in values.items() if np.all(np.isfinite(pair))})
  epochs = sorted(set.intersection(*map(set, tables)))
  pairs = np.array([[table[e] for e in epochs] for table in tables]).reshape(len(runs), -1, 2)
  x, y = pairs[..., 0], pairs[..., 1]
  return Band(x.mean(axis=0), y.mean(axis=0), y.min(axis=0), y.max(axis=0))


TOTALS = {
  "evaluations": "total/evaluations",
  "teraflops": "total/teraflops",
  "teraflops_with_rewards": "total/teraflops_with_rewards",
  "seconds": "time/total",
}
"""What a run has spent -> the metric that says so."""


def _position(run, row, against):
  if against == "updates":
    return float(row["epoch"] * run.config.train.updates_per_epoch)
  return number(row, TOTALS[against])


def per_step(runs: Sequence[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
  """A metric that has one number a step, `name/0`, `name/1`, ..., averaged over runs.

  Returns:
    (epochs [E], values [steps, E]) at the epochs that all runs have; both empty when it was not
    measured (a credit method without completions).
  """
  tables = []
  for run in runs:
    table = {}
    for row in run.train:
      numbers = {k: number(row, f"{name}/{k}") for k in range(_count_steps(row, name))}
      if numbers and "epoch" in row:
        table[row["epoch"]] = list(numbers.values())
    tables.append(table)
  steps = min((len(v) for t in tables for v in t.values()), default=0)
  epochs = sorted(set.intersection(*map(set, tables)))
  if not steps or not epochs:
    return np.zeros(0), np.zeros((0, 0))
  values = np.array([[table[e][:steps] for e in epochs] for table in tables])
  return np.array(epochs), values.mean(axis=0).T


def _count_steps(row, name):
  return next(count for count in itertools.count() if f"{name}/{count}" not in row)


def load_rollouts(run: Run) -> list[Rollout]:
  """The kept rollouts of a run by epoch; a file that is still being written is left out."""
  rollouts = []
  for path in sorted((run.folder / "rollouts").glob("epoch_*.npz")):
    try:
      with path.open("rb") as file, np.load(file) as data:
        arrays = {name: data[name] for name in Rollout._fields[1:-2]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      continue
    found = None
    if not run.config.advantage.per_reward:  # there the credit is of each reward for itself
      found = credit.find_turning_points(
        run.config.credit.method, jnp.asarray(arrays["completion_reward"])
      )
    found = None if found is None else np.asarray(found)
    branched = run.config.sampler.rollout == "branch"
    epoch = int(path.stem.removeprefix("epoch_"))
    rollouts.append(Rollout(epoch, **arrays, found=found, branched=branched))
  return rollouts


def sample_grids(run: Run) -> list[Grid]:
  """The run's first and last readable sample grids: 0, 1 or 2."""
  found = []
  for path in sorted((run.folder / "images").glob("eval_*.png")):
    try:
      with path.open("rb") as file, Image.open(file) as image:
        image.load()
    except OSError:
      continue
    found.append(Grid(int(path.stem.removeprefix("eval_")), path, _said_of(path)))
  return found if len(found) < 2 else [found[0], found[-1]]


def _said_of(path):
  try:
    return json.loads(path.with_suffix(".json").read_text())
  except (OSError, ValueError):
    return {}


class Outcome(NamedTuple):
  """What the runs of one label came to, on one held-out reward; arrays [seeds].

  Attributes:
    base: score before the first update, NaN if it was not measured.
    base_error: its standard error over prompts, NaN if it is not known.
    final: score of the last evaluation.
    final_error: likewise.
    epochs: finished at that evaluation.
    edges: share of pixels on an edge in its images, which tells noise.
    evaluations: of the model, of training alone.
    teraflops, teraflops_with_rewards: of rollouts and updates; and of scoring, NaN where a reward is silent.
    seconds: wall-clock of the run.
  """

  base: np.ndarray
  base_error: np.ndarray
  final: np.ndarray
  final_error: np.ndarray
  epochs: np.ndarray
  edges: np.ndarray
  evaluations: np.ndarray
  teraflops: np.ndarray
  teraflops_with_rewards: np.ndarray
  seconds: np.ndarray


def outcome(runs: Sequence[Run], reward: str) -> Outcome:
  """Base and final score of each run of one label; runs without an evaluation are NaN."""
  mean, error = f"reward/{reward}/mean", f"reward/{reward}/standard_error"
  totals, columns = ("epoch", "image/edge_density", *TOTALS.values()), []
  for run in runs:
    rows = [r for r in run.evals if np.isfinite(number(r, mean))] or [{}]
    base = rows[0] if rows[0].get("epoch") == 0 else {}
    scores = [number(row, key) for row in (base, rows[-1]) for key in (mean, error)]
    columns.append([*scores, *(number(rows[-1], total) for total in totals)])
  return Outcome(*np.array(columns).T)
