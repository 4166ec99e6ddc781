"""The report of one run or several: plots as PNG, and one HTML page that holds them all."""

import base64
from collections.abc import Iterator, Mapping, Sequence
import html
import os
import pathlib
from typing import Any

import numpy as np

from tpgrpo_jax.reporting import history, plots

Groups = Mapping[str, Sequence[history.Run]]

COLUMNS = (
  "label",
  "seeds",
  "epochs",
  "base score",
  "final score",
  "gain",
  "edge density",
  "evaluations",
  "TFLOP",
  "minutes",
)

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22282f; max-width: 1040px; margin: 2.5rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; }}
h2 {{ font-size: 1.1rem; margin: 2.6rem 0 .2rem; border-top: 1px solid #e4e8ec; padding-top: 1rem; }}
h3 {{ font-size: .95rem; margin: 1rem 0 .2rem; font-weight: 600; }}
p {{ margin: .2rem 0 .7rem; color: #5a636e; max-width: 46rem; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #e4e8ec;
  white-space: nowrap; }}
th {{ color: #6b7480; font-weight: 500; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.pair {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.pair figure {{ flex: 1 1 24rem; margin: 0; }}
figcaption {{ color: #6b7480; font-size: .85rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(groups: Groups, output: str | os.PathLike[str]) -> pathlib.Path:
  """Writes report.html, which needs no other file, and its plots as PNG beside it.

  Args:
    groups: as of `history.load_runs`.
    output: folder, made when it does not exist.

  Returns:
    The page.
  """
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  body = [_summary(groups)]
  with plots.style():
    for name, title, note, figure in _figures(groups):
      path = folder / f"{name}.png"
      figure.savefig(path)
      body.append(_section(title, note, _embed(path, title)))
  body += [_samples(groups), _runs(groups)]
  path = folder / "report.html"
  title = "Runs: " + ", ".join(groups)
  path.write_text(_PAGE.format(title=html.escape(title), body="\n".join(body)), encoding="utf-8")
  return path


def _figures(groups: Groups) -> Iterator[tuple[str, str, str, Any]]:
  """(file name, title, note, Figure); figures without any data are left out."""
  for reward in history.reward_labels(groups):
    yield (
      f"held_out_{_slug(reward)}",
      f"Held-out {reward}",
      "Prompts never trained on, ODE sampling from fixed noise with EMA weights. Line: mean over "
      "seeds; band: lowest to highest. Evaluations are those of training rollouts, completions "
      "included, operations those of rollouts and updates; wall-clock compares only runs made on the "
      "same machine.",
      plots.held_out_reward(groups, reward),
    )
  if any(run.train for runs in groups.values() for run in runs):
    note = (
      "Samples of the stochastic rollout, other prompts in every epoch. Bold: mean of 5 epochs."
    )
    yield "training_reward", "Training reward", note, plots.training_reward(groups)
  for label, runs in groups.items():
    rollouts = [r for run in runs[:1] for r in history.load_rollouts(run)]
    figure = plots.example_trajectories(rollouts[-1]) if rollouts else None
    if figure is not None:
      yield (
        f"trajectories_{_slug(label)}",
        f"Rewards along trajectories: {label}, epoch {rollouts[-1].epoch}",
        "R[k] is the reward of the ODE completion of the state after k stochastic steps, R[W] that "
        "of the trajectory's own image. Shown are the trajectories whose rewards move most.",
        figure,
      )
  for name, title, note, draw in _OPTIONAL:
    figure = draw(groups)
    if figure is not None:
      yield name, title, note, figure
  if any(run.train for runs in groups.values() for run in runs):
    note = (
      "Image statistics do not depend on the reward: when they drift while it rises, look at the "
      "images. They are of held-out samples; the rest is of training, bold: mean of 5 epochs."
    )
    yield "diagnostics", "Diagnostics", note, plots.diagnostics(groups)


_OPTIONAL = (
  (
    "mean_completion_reward",
    "Mean reward of completions",
    "Averaged over the samples of an epoch; the stronger the colour, the later in training.",
    plots.mean_completion_reward,
  ),
  (
    "turning_point_density",
    "Turning points per step",
    "Share of samples whose step k was paid an aggregated reward, mean over seeds.",
    plots.turning_point_density,
  ),
)


def _slug(text):
  return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)


def _embed(path, title):
  data = base64.b64encode(path.read_bytes()).decode()
  return f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">'


def _section(title, note, content):
  return f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(note)}</p>\n{content}"


def table(groups: Groups, reward: str) -> list[tuple[str, ...]]:
  """The rows of the result table on one held-out reward, as text under COLUMNS.

  Gain is final - base of each seed: mean +- standard deviation over seeds (n - 1).
  """
  rows = []
  for label, runs in groups.items():
    o = history.outcome(runs, reward)
    planned = max(run.config.train.epochs for run in runs)
    rows.append(
      (
        label,
        str(len(runs)),
        f"{_range(o.epochs)} / {planned}",
        _mean(o.base, ".3f"),
        _mean(o.final, ".3f"),
        _mean(np.where(o.epochs > 0, o.final - o.base, np.nan), "+.3f", spread=True),
        _mean(o.edges, ".3f"),
        _mean(o.evaluations, ",.0f"),
        _mean(o.teraflops, ",.3g"),
        _mean(o.seconds / 60, ",.1f"),
      )
    )
  return rows


def _range(values):
  values = values[np.isfinite(values)]
  if not len(values):
    return "–"
  low, high = int(values.min()), int(values.max())
  return str(low) if low == high else f"{low}–{high}"


def _mean(values, form, spread=False):
  values = values[np.isfinite(values)]
  if not len(values):
    return "–"
  text = format(values.mean(), form)
  return f"{text} ± {values.std(ddof=1):.3f}" if spread and len(values) > 1 else text


def render_text_table(groups: Groups) -> str:
  """All result tables as plain text."""
  blocks = []
  for reward in history.reward_labels(groups):
    rows = [COLUMNS, *table(groups, reward)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
      "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
      for row in rows
    ]
    blocks.append("\n".join([f"held-out {reward}", *lines]))
  return "\n\n".join(blocks)


def _html_table(head, rows):
  cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in rows
  )
  return f'<div class="wide"><table><tr>{cells}</tr>\n{body}</table></div>'


def _summary(groups):
  parts = [
    "<p>Scores are means over held-out prompts. Gain: final minus base, mean ± standard deviation "
    "over seeds.</p>"
  ]
  rewards = history.reward_labels(groups)
  for reward in rewards:
    parts += [f"<h3>{html.escape(reward)}</h3>", _html_table(COLUMNS, table(groups, reward))]
  return "\n".join(parts) if rewards else "<p>No evaluation on held-out prompts yet.</p>"


def _samples(groups):
  """First and last sample grid of the first run of every label, side by side."""
  parts = []
  for label, runs in groups.items():
    figures = []
    for epoch, path in history.sample_grids(runs[0]):
      caption = "before training" if epoch == 0 else f"after epoch {epoch}"
      figures.append(f"<figure>{_embed(path, caption)}<figcaption>{caption}</figcaption></figure>")
    if figures:
      heading = f"<h3>{html.escape(label)}, seed {runs[0].config.seed}</h3>"
      parts.append(f'{heading}\n<div class="pair">{"".join(figures)}</div>')
  note = "The same held-out prompts from the same noise."
  return _section("Samples", note, "\n".join(parts)) if parts else ""


def _runs(groups):
  """Which folders were read, and in what the recipes differ."""
  rows = [
      (run.label, str(run.config.seed), str(run.folder), str(len(run.train)))
      for runs in groups.values() for run in runs
  ]  # fmt: skip
  parts = [_html_table(("label", "seed", "folder", "epochs logged"), rows)]
  firsts = [runs[0] for runs in groups.values()]
  fields = history.differences([run.config for run in firsts])
  if fields:
    rows = [(name, *(str(v) for v in values)) for name, values in fields.items()]
    parts += ["<h3>Where the recipes differ</h3>", _html_table(("field", *groups), rows)]
  return _section("Runs", "Everything above was read from these folders.", "\n".join(parts))
