"""Writes tables of results in README.md, evidence.md and settings.md, from the runs that are kept.

It draws images/held_out_ocr.png too. python docs/make_results_tables.py
"""

from collections.abc import Sequence
import functools
import pathlib
import re

import numpy as np

from tpgrpo_jax.reporting import comparison, history, plots

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
PAGES = (HERE.parent / "README.md", HERE / "evidence.md", HERE / "settings.md")
MARKS = "<!-- begin {0}: python docs/make_results_tables.py writes this table -->\n\n{1}\n\n<!-- end {0} -->"

WORDS = (
  "flow_grpo", "mixgrpo", "increments", "tp_grpo", "tp_grpo_consistent", "tp_grpo_fast",
  "densegrpo", "diffusion_nft", "branch", "tempflow",
)  # fmt: skip
IN_SHORT = (
  "method", "seeds", "final", "judged", "edge density", "evaluations", "model TFLOP", "TFLOP with rewards",
)  # fmt: skip
LEFT_OUT = ("best", "judged, best weights", "minutes")
SHAPES = (
  "tempflow", "tp_grpo", "flow_grpo", "increments", "tp_grpo_consistent", "densegrpo", "diffusion_nft", "awm",
  "tp_grpo_fast", "branch",
)  # fmt: skip
QUESTIONS = (
  "tp_grpo", "increments", "tp_grpo_consistent", "tp_grpo+credit.balance=False",
  "tp_grpo+advantage.normalization=group_joint", "tp_grpo+sampler.same_latent=True",
  "tp_grpo+completion.steps=1",
)  # fmt: skip

DECAY = "optimizer.decay_to=start+optimizer.weight_decay"
LESS_NOISE = (
  "tp_grpo", "tp_grpo+loss.kl_coef=2e-4", "tp_grpo+advantage.normalization=group_joint",
  f"tp_grpo+{DECAY}=15", f"tp_grpo+{DECAY}=30", "branch", f"branch+{DECAY}=15",
  "branch+optimizer.schedule=constant", "branch+optimizer.schedule=cosine",
)  # fmt: skip
TWICE = ("flow_grpo", "mixgrpo", "tp_grpo", "diffusion_nft", "branch", "tempflow")
TRUST_REGIONS = ("tp_grpo", "tp_grpo+loss.trust_region=dppo+loss.clip_range=1e-5")

Rows = list[tuple[str, ...]]


def groups_of(folder: str, methods: Sequence[str]) -> dict[str, list[history.Run]]:
  """The runs of each method, in the order of their seeds."""
  runs = [f"{m}={run}" for m in methods for run in sorted((RESULTS / folder).glob(f"{m}_s*"))]
  return history.load_runs(runs)


def words_as_timed() -> tuple[dict[str, list[history.Run]], dict[str, float]]:
  """The runs on words and the seconds of an epoch of each method, from short runs on a quiet machine.

  The runs were made on machines of several speeds, and the older ones counted neither what the reward takes
  nor a calibration. So these come from the short ones.
  """
  quiet = {label: runs[0] for label, runs in groups_of("timing/tiny_text", WORDS).items()}
  seconds = {label: comparison.seconds_per_epoch([run]) for label, run in quiet.items()}
  groups = groups_of("tiny_text", WORDS)
  for label, runs in groups.items():
    first, last = quiet[label].evals[0], quiet[label].train[-1]
    ahead, spent = (
      row["total/teraflops_with_rewards"] - row["total/teraflops"] for row in (first, last)
    )
    for row in (row for run in runs for row in run.evals):
      row["total/teraflops"] += first["total/teraflops"]
      of_rewards = ahead + row["epoch"] * (spent - ahead) / last["epoch"]
      row["total/teraflops_with_rewards"] = row["total/teraflops"] + of_rewards
      row["time/total"] = first["time/total"] + row["epoch"] * seconds[label]
  return groups, seconds


def words() -> Rows:
  """The comparison on words."""
  groups, seconds = words_as_timed()
  head, *rows = comparison.table(groups, "ocr", seconds=seconds)
  kept = [i for i, name in enumerate(head) if name not in LEFT_OUT]
  return [tuple(row[i] for i in kept) for row in (head, *rows)]


def words_in_short() -> Rows:
  """The columns of README."""
  head, *rows = words()
  return [IN_SHORT, *(tuple(row[head.index(name)] for name in IN_SHORT) for row in rows)]


def shapes() -> Rows:
  """Methods at equal operations, the best of the judge's means first."""
  groups = groups_of("teraflops_20/tiny_shapes", SHAPES)
  mean = {label: np.mean([judged(run) for run in runs]) for label, runs in groups.items()}
  rows = [
    (
      f"`{label}`",
      str(runs[0].config.train.epochs),
      each(final(run) for run in runs),
      each(best(run) for run in runs),
      each(judged(run) for run in runs),
      each([mean[label]]),
      edges(runs),
      evaluations(runs),
      f"{comparison.seconds_per_epoch(runs):.1f}",
    )
    for label, runs in sorted(groups.items(), key=lambda item: -mean[item[0]])
  ]
  head = ("method", "epochs", "last evaluation, seed by seed", "its best", "judged", "its mean")
  return [head + ("edge density (base .077)", "evaluations", "s an epoch"), *rows]


def recipe_of_shapes() -> Rows:
  """Seeds of the recipe, and what the judge says of each."""
  runs = groups_of("tiny_shapes", ("tp_grpo",))["tp_grpo"]
  rows = [
    (
      f"seed {run.config.seed}",
      each([final(run)]),
      each([best(run)]),
      each([judged(run)]),
      gain(run),
      edges([run]),
    )
    for run in runs
  ]
  return [("", "last evaluation", "its best", "judged", "gain", "edge density (base .077)"), *rows]


def questions() -> Rows:
  """What reviewers ask."""
  rows = [
    (
      f"`{label}`",
      str(runs[0].config.train.epochs),
      evaluations(runs),
      each(final(run) for run in runs),
      each(judged(run) for run in runs),
      edges(runs),
    )
    for label, runs in groups_of("teraflops_4/tiny_text", QUESTIONS).items()
  ]
  head = ("method", "epochs", "evaluations", "last evaluation, seeds 0 and 1", "judged")
  return [head + ("edge density (base .272)",), *rows]


def changes_on_words(methods: Sequence[str]) -> Rows:
  """Recipes at their length, and changes of them, seed by seed."""
  found = {
    m: groups_of("settings/tiny_text" if "+" in m else "tiny_text", (m,))[m] for m in methods
  }
  rows = [
    (
      f"`{label}`",
      ", ".join(str(run.config.seed) for run in runs),
      each(final(run) for run in runs),
      each(judged(run) for run in runs),
      ", ".join(edges([run]) for run in runs),
    )
    for label, runs in found.items()
  ]
  return [("recipe", "seeds", "last evaluation", "judged", "edge density (base .272)"), *rows]


def more_prompts_late() -> Rows:
  """A run at a constant rate, and two that go on from its weights."""
  constant = "branch+optimizer.schedule=constant"
  one, more = (
    f"{constant}+train.epochs=60",
    f"{constant}+train.prompts_per_epoch=16+train.epochs=30",
  )
  rows = [("", "epochs", "updates", "last evaluation", "judged", "edge density (base .272)")]
  for title, half, label in (
    ("the first half, 8 prompts an epoch", "first_half", one),
    ("from there: 8 prompts", "second_half", one),
    ("from there: 16 prompts", "second_half", more),
  ):
    (runs,) = groups_of(f"more_prompts_late/{half}", (label,)).values()
    train = runs[0].config.train
    cells = [title, str(train.epochs), str(train.epochs * train.updates_per_epoch)]
    rows.append((*cells, each(map(final, runs)), each(map(judged, runs)), edges(runs)))
  return rows


def turning_points() -> Rows:
  """At which steps they are, found and paid."""
  groups = {}
  for task, folder, methods in (
    ("words", "tiny_text", ("tp_grpo", "tp_grpo_consistent", "tp_grpo_fast")),
    ("shapes", "tiny_shapes", ("tp_grpo",)),
    (
      "shapes, 20 TFLOP",
      "teraflops_20/tiny_shapes",
      ("tp_grpo", "tp_grpo_consistent", "tp_grpo_fast"),
    ),
  ):
    groups |= {f"{m}, {task}": runs for m, runs in groups_of(folder, methods).items()}
  return comparison.turning_points(groups)


def ten_steps() -> Rows:
  """As many steps as in the paper, at as many operations as with those of the recipe."""
  recipe, ten = "tp_grpo", "tp_grpo+sampler.num_steps=10+sampler.window"
  rows = []
  for task, folder, label in (
    ("words", "tiny_text", recipe),
    ("words", "ten_steps/tiny_text", f"{ten}=(0,9)"),
    ("words", "ten_steps/tiny_text", f"{ten}=(0,9)+advantage.floor=0.1"),
    ("shapes", "teraflops_20/tiny_shapes", recipe),
    ("shapes", "ten_steps/tiny_shapes", f"{ten}=(0,8)"),
    ("shapes", "ten_steps/tiny_shapes", f"{ten}=(0,9)"),
  ):
    (runs,) = groups_of(folder, (label,)).values()
    sampler, floor = runs[0].config.sampler, runs[0].config.advantage.floor
    cells = [f"{task}, {sampler.num_steps} steps, window {sampler.window}"]
    cells[0] += f", std floor {floor}" if floor else ""
    cells += [str(runs[0].config.train.epochs)]
    cells += [each(map(final, runs)), each(map(judged, runs)), edges(runs), evaluations(runs)]
    rows.append(tuple(cells))
  head = ("", "epochs", "last evaluation, seed by seed", "judged", "edge density", "evaluations")
  return [head, *rows]


def twice_the_epochs() -> Rows:
  """The recipes of the words, and twice their epochs; the first seed."""
  rows = []
  for label in TWICE:
    (again,) = groups_of("settings/tiny_text", (f"{label}+train.epochs=240",)).values()
    for runs in (groups_of("tiny_text", (label,))[label][:1], again):
      cells = [f"`{label}`", str(runs[0].config.train.epochs), evaluations(runs)]
      rows.append((*cells, *(each(map(of, runs)) for of in (final, best, judged)), edges(runs)))
  head = ("method", "epochs", "evaluations", "last evaluation", "its best", "judged")
  return [head + ("edge density (base .272)",), *rows]


def two_threads() -> Rows:
  """Runs on two threads, and those of the same seeds on one: last evaluation, and as judged."""
  rows = []
  for label, runs in groups_of("two_threads/tiny_text", ("tp_grpo", "branch", "tempflow")).items():
    alone = {run.config.seed: run for run in groups_of("tiny_text", (label,))[label]}
    for run in runs:
      cells = [f"{each([final(r)])} ({each([judged(r)])})" for r in (alone[run.config.seed], run)]
      rows.append((f"`{label}`", str(run.config.seed), *cells, edges([run])))
  return [("method", "seed", "one thread", "two threads", "edge density of these"), *rows]


def reward_of(run: history.Run) -> str:
  """The reward that evaluations report first."""
  return history.reward_labels({"": [run]})[0]


def end(runs: Sequence[history.Run]) -> history.Outcome:
  """What their last evaluations say."""
  return history.outcome(runs, reward_of(runs[0]))


def final(run: history.Run) -> float:
  """Of the last evaluation."""
  return end([run]).final[0]


def best(run: history.Run) -> float:
  """Of the best evaluation."""
  return comparison.curve(run, reward_of(run), "epoch")[1].max()


def judged(run: history.Run) -> float:
  """Of the last weights."""
  return history.number(run.judged, f"last/reward/{reward_of(run)}/mean")


def gain(run: history.Run) -> str:
  """The judge's, picture by picture, with its 95 % interval."""
  name = f"last/gain/{reward_of(run)}"
  mean, error = (run.judged[f"{name}/{part}"] for part in ("mean", "standard_error"))
  return str(comparison.Estimate(mean, 1.96 * error))


def edges(runs: Sequence[history.Run]) -> str:
  """Of the last evaluations, the mean."""
  return each([end(runs).edges.mean()])


def evaluations(runs: Sequence[history.Run]) -> str:
  """Of the model, the mean over runs."""
  return format(end(runs).evaluations.mean(), ",.0f")


def each(values) -> str:
  """Three decimals of each, without the 0."""
  return ", ".join(f"{value:.3f}".lstrip("0") for value in values)


TABLES = {
  "words in short": words_in_short,
  "words": words,
  "recipe of shapes": recipe_of_shapes,
  "shapes": shapes,
  "questions": questions,
  "twice the epochs": twice_the_epochs,
  "two threads": two_threads,
  "turning points": turning_points,
  "ten steps": ten_steps,
  "less noise": functools.partial(changes_on_words, LESS_NOISE),
  "more prompts late": more_prompts_late,
  "trust regions": functools.partial(changes_on_words, TRUST_REGIONS),
}


def written(page: str) -> str:
  """The page with the tables of now between their marks."""

  def of_now(found: re.Match) -> str:
    return MARKS.format(found[1], comparison.as_markdown(TABLES[found[1]]()))

  return re.sub(r"<!-- begin ([\w ]+): .*?<!-- end \1 -->", of_now, page, flags=re.DOTALL)


def draw_words() -> None:
  """The methods that have three seeds or more, against what was spent."""
  groups, _ = words_as_timed()
  groups = {label: runs for label, runs in groups.items() if len(runs) >= 3}
  totals = ("evaluations", "teraflops_with_rewards", "seconds")
  with plots.style():
    plots.held_out_reward(groups, "ocr", totals=totals).savefig(
      HERE / "images" / "held_out_ocr.png"
    )


if __name__ == "__main__":
  draw_words()
  for path in PAGES:
    path.write_text(written(path.read_text()))
