"""The result tables of runs: scores before and after with their standard errors, as text and as HTML."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import html
from typing import Any

import numpy as np

from tpgrpo_jax.reporting import history

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
  "model TFLOP",
  "TFLOP with rewards",
  "minutes",
)
MEANING = "± is the standard error: of one seed over its prompts, of several seeds over the seeds."
JUDGED = ("label", "seeds", "prompts", "base", "last", "gain", "best", "gain of best")


def parts(groups: Groups) -> list[tuple[str, str, Groups]]:
  """(title, reward, groups) of all held-out rewards; runs that make a reward in other ways are apart."""
  found = []
  for reward in history.reward_labels(groups):
    held = {
      k: v for k, v in groups.items() if any(f"reward/{reward}/mean" in r for r in v[0].evals)
    }
    alike = history.alike(held, functools.partial(history.reward_spec, reward=reward))
    for part in alike:
      title = reward if len(alike) == 1 else f"{reward}, as {', '.join(part)} makes it"
      found.append((title, reward, part))
  return found


def table(groups: Groups, reward: str) -> list[tuple[str, ...]]:
  """The rows of the result table on one held-out reward, as text under COLUMNS.

  +- is the standard error: of one seed over prompts, of several over seeds. The base has that over prompts,
  as all seeds begin with it. Gain is final - base of each seed, so one seed alone has no error here; that of
  `judged` is paired by prompts.
  """
  rows = []
  for label, runs in groups.items():
    o = history.outcome(runs, reward)
    planned = max(run.config.train.epochs for run in runs)
    gains = np.where(o.epochs > 0, o.final - o.base, np.nan)
    rows.append(
      (
        label,
        str(len(runs)),
        f"{_range(o.epochs)} / {planned}",
        _score(o.base[:1], o.base_error) if _equal(o.base) else _score(o.base, o.base_error),
        _score(o.final, o.final_error),
        _score(gains, np.full(1, np.nan), "+.3f"),
        _mean(o.edges, ".3f"),
        _mean(o.evaluations, ",.0f"),
        _mean(o.teraflops, ",.3g"),
        _mean(o.teraflops_with_rewards, ",.3g"),
        _mean(o.seconds / 60, ",.1f"),
      )
    )
  return rows


def judged(groups: Groups, reward: str) -> list[tuple[str, ...]]:
  """Rows under JUDGED, of the prompts that judge; +- as in `table`."""
  rows = []
  for label, runs in groups.items():
    done = [run.judged for run in runs if f"base/reward/{reward}/mean" in run.judged]
    if not done:
      continue
    cells = []
    for key in ("base/reward", "last/reward", "last/gain", "best/reward", "best/gain"):
      means = np.array([history.number(row, f"{key}/{reward}/mean") for row in done])
      errors = np.array([history.number(row, f"{key}/{reward}/standard_error") for row in done])
      means = means[:1] if key == "base/reward" and _equal(means) else means
      cells.append(_score(means, errors, "+.3f" if key.endswith("gain") else ".3f"))
    rows.append((label, str(len(done)), str(done[0].get("prompts", "")), *cells))
  return rows


def _equal(values):
  return bool(np.all(values == values[0]))


def _range(values):
  values = values[np.isfinite(values)]
  if not len(values):
    return "–"
  low, high = int(values.min()), int(values.max())
  return str(low) if low == high else f"{low}–{high}"


def _mean(values, form):
  values = values[np.isfinite(values)]
  return format(values.mean(), form) if len(values) else "–"


def _score(values, errors, form=".3f"):
  """A mean and its standard error: over the values, or of one value its own."""
  values = values[np.isfinite(values)]
  if not len(values):
    return "–"
  error = errors[0] if len(values) == 1 else values.std(ddof=1) / np.sqrt(len(values))
  text = format(values.mean(), form)
  return f"{text} ± {error:.3f}" if np.isfinite(error) else text


def of_judge(rows: Iterable[Mapping[str, Any]]) -> str:
  """What prompts the judge has, by its rows.

  Args:
    rows: with "prompts_evaluated", how many of them evaluations ask too; those of earlier versions have none.
  """
  rows = [*rows]
  if any("prompts_evaluated" not in row for row in rows):
    return "held-out prompts, some of which evaluations may have asked"
  twice = max((row["prompts_evaluated"] for row in rows), default=0)
  seen = f", or with other noise: {twice} were seen" if twice else ""
  return f"held-out prompts that no evaluation saw{seen}"


def judges(groups: Groups) -> str:
  """As `of_judge`, of runs."""
  return of_judge(run.judged for runs in groups.values() for run in runs if run.judged)


def render_text(groups: Groups) -> str:
  """All result tables as plain text."""
  blocks = []
  for title, reward, part in parts(groups):
    blocks.append(_as_text(f"held-out {title}", [COLUMNS, *table(part, reward)]))
    if rows := judged(part, reward):
      blocks.append(_as_text(f"{title}, judged: {judges(part)}", [JUDGED, *rows]))
  return "\n\n".join([*blocks, MEANING]) if blocks else ""


def _as_text(heading, rows):
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
    for row in rows
  ]
  return "\n".join([heading, *lines])


def render_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table; on a phone each row becomes a list of names and values."""
  cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
  body = "".join(
    "<tr>"
    + "".join(
      f'<td data-name="{html.escape(name)}">{html.escape(c)}</td>' for name, c in zip(head, row)
    )
    + "</tr>\n"
    for row in rows
  )
  return f'<div class="wide"><table><tr>{cells}</tr>\n{body}</table></div>'
