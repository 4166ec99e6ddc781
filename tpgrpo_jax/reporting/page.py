"""The report of one run or several: plots as PNG, and one HTML page that holds them all."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import html
import io
import os
import pathlib
from typing import Any

from tpgrpo_jax.reporting import history, pictures, plots, tables, trajectories

Groups = Mapping[str, Sequence[history.Run]]

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22282f; max-width: 1040px; margin: 2.5rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
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
figure {{ margin: 0; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }}
.card {{ border: 1px solid #e4e8ec; border-radius: 6px; padding: .5rem .6rem; }}
.card figcaption {{ font-weight: 600; overflow-wrap: anywhere; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }}
.pair img {{ width: 100%; image-rendering: pixelated; display: block; }}
.pair span {{ display: block; font-size: .8rem; line-height: 1.35; overflow-wrap: anywhere; }}
.pair span:first-of-type {{ color: #6b7480; }}
.sheets {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.sheets figure {{ flex: 1 1 24rem; min-width: 0; }}
figcaption {{ font-size: .85rem; }}
@media (max-width: 640px) {{
  table, tbody {{ display: block; width: 100%; }}
  body {{ margin-top: 1.2rem; }}
  th {{ display: none; }}
  tr {{ display: block; padding: .5rem 0; border-bottom: 1px solid #e4e8ec; }}
  td, td:first-child {{ display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0;
    border: 0; white-space: normal; overflow-wrap: anywhere; }}
  td::before {{ content: attr(data-name); color: #6b7480; flex: none; }}
  td:first-child {{ font-weight: 600; }}
}}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(
  groups: Groups, output: str | os.PathLike[str], *, refresh: float = 0.0
) -> pathlib.Path:
  """Writes report.html, which needs no other file, and its plots as PNG beside it.

  Each plot is drawn twice, for a desk and for a phone. Whoever has the page open never sees half of it.

  Args:
    groups: as of `history.load_runs`.
    output: folder, made when it does not exist.
    refresh: seconds after which an open page loads itself again; 0 for never.

  Returns:
    The page.
  """
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  body = [_summary(groups)]
  with plots.style():
    for name, title, note, draw in _figures(groups):
      shown = _save_both(folder, name, title, draw)
      if shown:
        body.append(_section(title, note, shown))
  samples = pictures.render_samples(groups)
  if samples:
    note = (
      "The same held-out prompts from the same noise, with what each reward says of each picture."
    )
    body.append(_section("Samples", note, samples))
  body.append(_runs(groups))
  again = f'\n<meta http-equiv="refresh" content="{refresh:g}">' if refresh else ""
  title = html.escape("Runs: " + ", ".join(groups))
  text = _PAGE.format(title=title, body="\n".join(body), refresh=again)
  path, part = folder / "report.html", folder / ".report.html.part"
  part.write_text(text, encoding="utf-8")
  part.replace(path)
  return path


def _save_both(folder, name, title, draw):
  """Writes a plot for a desk and one for a phone; returns the HTML of both, or "" where there is nothing."""
  data = {}
  for suffix, width in (("", plots.WIDE), ("_narrow", plots.NARROW)):
    figure = draw(width=width)
    if figure is None:
      return ""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    (folder / f"{name}{suffix}.png").write_bytes(content.getvalue())
    data[width] = content.getvalue()
  narrow = base64.b64encode(data[plots.NARROW]).decode()
  source = f'<source media="(max-width: 640px)" srcset="data:image/png;base64,{narrow}">'
  return f"<picture>{source}{pictures.embed(data[plots.WIDE], title)}</picture>"


def _figures(groups: Groups) -> Iterator[tuple[str, str, str, Callable[..., Any]]]:
  """(file name, title, note, function that draws at a width); it gives None where there is no data."""
  count: dict[str, int] = {}
  for title, reward, part in tables.parts(groups):
    count[reward] = count.get(reward, 0) + 1
    yield (
      f"held_out_{_slug(reward)}" + (f"_{count[reward]}" if count[reward] > 1 else ""),
      f"Held-out {title}",
      "Prompts never trained on, ODE sampling from fixed noise with EMA weights. Line: mean over "
      "seeds; band: lowest to highest, of one seed the standard error over prompts. Dashed: the base model, "
      "with its standard error. Evaluations are those of training rollouts, completions included, "
      "operations those of rollouts and updates; wall-clock compares only runs made on the same machine.",
      functools.partial(plots.held_out_reward, part, reward),
    )
  if any(run.train for runs in groups.values() for run in runs):
    note = (
      "Samples of the stochastic rollout, other prompts in every epoch. Bold: mean of 5 epochs. Runs that "
      "are trained on other rewards have an axis of their own."
    )
    draw = functools.partial(plots.training_reward, groups)
    yield "training_reward", "Training reward", note, draw
  for label, runs in groups.items():
    rollouts = history.load_rollouts(runs[0])
    if rollouts:
      kind, note = _EXAMPLES[rollouts[-1].branched]
      yield (
        f"trajectories_{_slug(label)}",
        f"Rewards {kind}: {label}, epoch {rollouts[-1].epoch}",
        note,
        functools.partial(trajectories.example_trajectories, rollouts[-1]),
      )
  for name, title, note, draw in _OPTIONAL:
    yield name, title, note, functools.partial(draw, groups)
  if any(run.train for runs in groups.values() for run in runs):
    note = (
      "Image statistics do not depend on the reward: when they drift while it rises, look at the "
      "images. They are of held-out samples; the rest is of training, bold: mean of 5 epochs."
    )
    draw = functools.partial(plots.diagnostics, groups)
    yield "diagnostics", "Diagnostics", note, draw


_EXAMPLES = {
  False: (
    "along trajectories",
    "R[k] is the reward of the ODE completion of the state after k stochastic steps, R[W] that of the "
    "trajectory's own picture, which stands above. Shown are the trajectories whose rewards move most.",
  ),
  True: (
    "of branches",
    "The line is the reward of the anchor, whose picture stands above. A member left the anchor by one "
    "stochastic step, and the ODE finished it. Shown are the anchors whose members differ most.",
  ),
}

_OPTIONAL = (
  (
    "mean_completion_reward",
    "Mean reward of completions",
    "Averaged over the samples of an epoch; the stronger the colour, the later in training.",
    trajectories.mean_completion_reward,
  ),
  (
    "turning_point_density",
    "Turning points per step",
    "Share of samples with a turning point at step k, mean over seeds. Found: by the rule alone. Paid: "
    "those whose step was paid an aggregated reward, which balancing may have made fewer.",
    trajectories.turning_point_density,
  ),
)


def _slug(text):
  return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)


def _section(title, note, content):
  return f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(note)}</p>\n{content}"


def _summary(groups):
  parts = [
    f"<p>Scores are means over held-out prompts. {tables.MEANING} All seeds begin "
    "with one base, so its error is over prompts. Gain: final minus base of each seed.</p>"
  ]
  rewards = tables.parts(groups)
  for title, reward, part in rewards:
    rows = tables.table(part, reward)
    parts += [f"<h3>{html.escape(title)}</h3>", tables.render_html(tables.COLUMNS, rows)]
    if rows := tables.judged(part, reward):
      parts.append(
        f"<h3>{html.escape(title)}, judged</h3>\n<p>On {tables.judges(part)}. Gains are prompt by prompt "
        "from the same noise, so their error is the smaller one.</p>"
      )
      parts.append(tables.render_html(tables.JUDGED, rows))
  return "\n".join(parts) if rewards else "<p>No evaluation on held-out prompts yet.</p>"


def _runs(groups):
  """Which folders were read, and in what the recipes differ."""
  rows = [
      (run.label, str(run.config.seed), str(run.folder), str(len(run.train)))
      for runs in groups.values() for run in runs
  ]  # fmt: skip
  parts = [tables.render_html(("label", "seed", "folder", "epochs logged"), rows)]
  firsts = [runs[0] for runs in groups.values()]
  fields = history.differences([run.config for run in firsts])
  if fields:
    rows = [(name, *(str(v) for v in values)) for name, values in fields.items()]
    parts += ["<h3>Where the recipes differ</h3>", tables.render_html(("field", *groups), rows)]
  return _section("Runs", "Everything above was read from these folders.", "\n".join(parts))
