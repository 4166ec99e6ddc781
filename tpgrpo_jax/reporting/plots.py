"""The report's figures. Each function takes what `history` reads and returns a matplotlib Figure.

matplotlib is imported inside functions, and only its Figure (never pyplot): no window system, no
global state.
"""

from collections.abc import Mapping, Sequence
import contextlib
import os
from typing import Any

import numpy as np

from tpgrpo_jax.reporting import history

# One colour a method in every report; other labels take the free ones in turn.
METHOD_COLORS = {
  "tp_grpo": "#c1432e",
  "tp_grpo_consistent": "#d98f2b",
  "flow_grpo": "#2f5f8f",
  "increments": "#4a8c68",
  "aggregation": "#7d63a6",
  "tp_grpo_fast": "#e39b8b",
  "tempflow": "#a02c8a",
  "mixgrpo": "#3b8ea5",
  "densegrpo": "#8c7a3f",
}
SPARE_COLORS = ("#5b6b7a", "#b0705a", "#6f9fd8", "#98b06f", "#c9a0c4")
INK, GRAY, FAINT = "#22282f", "#6b7480", "#d9dee3"

STYLE: dict[Any, Any] = {
  "font.size": 9.0,
  "axes.titlesize": 9.5,
  "axes.titlelocation": "left",
  "axes.labelcolor": GRAY,
  "axes.edgecolor": FAINT,
  "axes.linewidth": 0.8,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#eceff2",
  "grid.linewidth": 0.8,
  "text.color": INK,
  "xtick.color": GRAY,
  "ytick.color": GRAY,
  "xtick.major.size": 0.0,
  "ytick.major.size": 0.0,
  "legend.frameon": False,
  "lines.linewidth": 1.8,
  "lines.solid_capstyle": "round",
  "text.parse_math": False,  # prompts and labels may hold a dollar sign
  "savefig.dpi": 144,
}

SMOOTHING = 5  # epochs

Groups = Mapping[str, Sequence[history.Run]]


@contextlib.contextmanager
def style():
  """The report's matplotlib settings; drawing and saving both happen inside."""
  # A terminal in a notebook sets a backend for its own kernel, which may not be importable here. No backend
  # is used at all.
  backend = os.environ.pop("MPLBACKEND", None)
  try:
    import matplotlib
  finally:
    if backend is not None:
      os.environ["MPLBACKEND"] = backend
  with matplotlib.rc_context(STYLE):
    yield


def colors(labels: Sequence[str]) -> dict[str, str]:
  """A colour for every label."""
  spare = [c for c in SPARE_COLORS]
  spare += [c for name, c in METHOD_COLORS.items() if name not in labels]
  others = [label for label in labels if label not in METHOD_COLORS]
  chosen = {label: spare[i % len(spare)] for i, label in enumerate(others)}
  return {label: METHOD_COLORS.get(label) or chosen[label] for label in labels}


WIDE, NARROW = 10.0, 4.0  # inches: of a page on a desk, and of one on a phone


def panels(
  count: int, width: float, height: float, *, least: float = 3.0, room: float = 0.0, **options: Any
) -> tuple[Any, np.ndarray]:
  """(Figure, its axes [rows, columns]) with `count` panels, as many beside each other as there is room for.

  Args:
    count: of panels.
    width: of the figure in inches, WIDE or NARROW.
    height: of a row.
    least: width of a panel.
    room: further height, for a legend.
    **options: of matplotlib's subplots.
  """
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  columns = max(1, min(count, int(width / least)))
  rows = -(-count // columns)
  layout = ConstrainedLayoutEngine(wspace=0.04, hspace=0.06)
  figure = Figure(figsize=(width, room + rows * height), layout=layout)
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for axis in axes.flat[count:]:
    axis.set_visible(False)
  return figure, axes


def held_out_reward(
  groups: Groups, reward: str, width: float = WIDE, totals: Sequence[str] = ()
) -> Any:
  """One reward of held-out prompts against what was spent: evaluations, operations, wall-clock.

  A band is that of the seeds, lowest to highest; of one seed it is the standard error over prompts. The
  dashed line is the base model's score, with its standard error. `totals`, names of history.TOTALS, has a
  panel each; without it operations are with the rewards' own where all runs know them.
  """
  if not totals:
    whole = all(
      np.isfinite(history.outcome(v, reward).teraflops_with_rewards).all() for v in groups.values()
    )
    totals = ("evaluations", "teraflops_with_rewards" if whole else "teraflops", "seconds")
  figure, axes = panels(len(totals), width, 3.0, room=0.4, sharey=True)
  for axis, against in zip(axes.flat, totals):
    curves = {k: _with_error(v, reward, against) for k, v in groups.items()}
    _draw_base(axis, groups, reward)
    _draw_bands(axis, curves, markers=True)
    _name_axis(axis, against, curves)
  for axis in axes[:, 0]:
    axis.set_ylabel(f"{reward}, held-out prompts")
  legend(figure, groups, width)
  return figure


def _with_error(runs, reward, against):
  """The band of the seeds, or the only seed's standard error over prompts, where it is known."""
  name = f"reward/{reward}"
  band = history.band(runs, "evals", f"{name}/mean", against)
  errors = history.band(runs, "evals", f"{name}/standard_error", against)
  if len(runs) > 1 or len(errors.x) != len(band.x):
    return band
  return history.Band(band.x, band.mean, band.mean - errors.mean, band.mean + errors.mean)


def _draw_base(axis, groups, reward):
  """A line for each base model that the runs began with; one that all machines round alike is drawn once."""
  outcomes = [history.outcome(runs, reward) for runs in groups.values()]
  bases = {
    (round(o.base[0], 3), round(o.base_error[0], 3)) for o in outcomes if np.isfinite(o.base[0])
  }
  for base, error in bases:
    axis.axhline(base, color=GRAY, linestyle="--", linewidth=0.9)
    if np.isfinite(error):
      axis.axhspan(base - error, base + error, color=GRAY, alpha=0.12, linewidth=0)


def training_reward(groups: Groups, width: float = WIDE) -> Any:
  """Mean reward of the samples trained on, against updates and model evaluations.

  Runs that are trained on other rewards, or on another sum of them, have panels and an axis of their own.
  Every epoch has other prompts, so the line is a trailing mean of SMOOTHING epochs.
  """
  sums = history.alike(groups, lambda config: config.rewards)
  least = 3.0 if width < WIDE else 4.5
  figure, axes = panels(2 * len(sums), width, 2.8, least=least, room=0.4, sharey=False)
  palette = colors(list(groups))
  for part, pair in zip(sums, axes.reshape(-1, 2)):
    for axis, against in zip(pair, ("updates", "evaluations")):
      curves = {k: history.band(v, "train", "reward/mean", against) for k, v in part.items()}
      _draw_noisy(axis, curves, palette)
      _name_axis(axis, against, curves)
    pair[0].set_ylabel(
      f"training reward: {history.training_sum(next(iter(part.values()))[0].config)}"
    )
    pair[1].sharey(pair[0])
  legend(figure, groups, width)
  return figure


def _draw_noisy(axis, curves, palette):
  """A trailing mean in bold over what it averages: the band of the seeds, or the only seed's line."""
  for label, band in curves.items():
    color = palette[label]
    if np.any(band.high > band.low):
      axis.fill_between(band.x, band.low, band.high, color=color, alpha=0.12, linewidth=0)
    else:
      axis.plot(band.x, band.mean, color=color, alpha=0.35, linewidth=0.8)
    means = [band.mean[max(0, i + 1 - SMOOTHING) : i + 1].mean() for i in range(len(band.x))]
    marker = {"marker": "o"} if len(band.x) == 1 else {}
    if len(band.x):
      axis.plot(band.x, means, color=color, **marker)


def _draw_bands(axis, curves, markers=False):
  for label, color in colors(list(curves)).items():
    band = curves[label]
    if not len(band.x):
      continue
    if np.any(band.high > band.low):
      axis.fill_between(band.x, band.low, band.high, color=color, alpha=0.15, linewidth=0)
    alone = len(band.x) == 1
    marker = {"marker": "o", "markersize": 5.0 if alone else 3.0} if markers or alone else {}
    axis.plot(band.x, band.mean, color=color, **marker)


_NAMES = {
  "updates": "optimizer updates",
  "evaluations": "model evaluations (training rollouts)",
  "teraflops": "model TFLOP (rollouts and updates)",
  "teraflops_with_rewards": "TFLOP (rollouts, rewards and updates)",
}


def _name_axis(axis, against, curves):
  """The x label with its unit, and numbers to match."""
  from matplotlib import ticker

  longest = max((b.x[-1] for b in curves.values() if len(b.x)), default=0.0)
  if against == "seconds":
    unit, size = ("s", 1) if longest < 300 else ("min", 60) if longest < 18000 else ("h", 3600)
    axis.set_xlabel(f"wall-clock ({unit})")
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x / size:g}"))
    # Ticks at round numbers of the unit, not of seconds.
    step = _nice(longest / size / 5) * size if longest else 1.0
    axis.xaxis.set_major_locator(ticker.MultipleLocator(step))
  else:
    axis.set_xlabel(_NAMES[against])
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer="teraflops" not in against))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _nice(value):
  """The next 1, 2 or 5 times a power of ten."""
  power = 10.0 ** np.floor(np.log10(value))
  return next(n * power for n in (1, 2, 5, 10) if n * power >= value * 0.999)


def legend(figure: Any, groups: Groups, width: float) -> None:
  """The labels and their colours, above all panels."""
  from matplotlib.lines import Line2D

  handles = []
  for label, color in colors(list(groups)).items():
    seeds = len(groups[label])
    name = label if seeds == 1 else f"{label} ({seeds} seeds)"
    handles.append(Line2D([], [], color=color, label=name))
  longest = max(len(handle.get_label()) for handle in handles)
  columns = max(1, min(len(handles), int(13.5 * width) // (longest + 6)))
  figure.legend(handles=handles, loc="outside upper left", ncols=columns)


# (title, unit of the y axis, kind of row, metrics, scale)
DIAGNOSTICS = (
  (
    "policy ratio, smallest and largest",
    "ratio − 1",
    "train",
    ("ratio/min", "ratio/max"),
    "shifted",
  ),
  ("clipped above", "samples × steps (%)", "train", ("clip/above",), "percent"),
  ("clipped below", "samples × steps (%)", "train", ("clip/below",), "percent"),
  ("KL to the base model", "nats per latent dim", "train", ("kl",), ""),
  ("gradient norm", "before clipping", "train", ("grad_norm",), ""),
  ("groups without any spread", "prompts (%)", "train", ("group/zero_spread",), "percent"),
  ("image mean", "brightness, 0 to 1", "evals", ("image/mean",), ""),
  ("image contrast", "std over pixels", "evals", ("image/contrast",), ""),
  ("image edge density", "pixels on an edge (%)", "evals", ("image/edge_density",), "percent"),
)


def diagnostics(groups: Groups, width: float = WIDE) -> Any:
  """What tells a healthy run from a broken one: ratios, clipping, KL, gradients, image statistics."""
  figure, axes = panels(len(DIAGNOSTICS), width, 2.3, room=0.4)
  palette = colors(list(groups))
  for axis, (title, unit, kind, names, scale) in zip(axes.flat, DIAGNOSTICS):
    for name in names:
      curves = {k: _scaled(history.band(v, kind, name), scale) for k, v in groups.items()}
      if name == "kl":  # without the term it is not computed, and the rows hold 0
        curves = {k: b for k, b in curves.items() if groups[k][0].config.loss.kl_coef}
      if kind == "evals":
        _draw_bands(axis, curves)
      else:
        _draw_noisy(axis, curves, palette)
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if not any(len(line.get_xdata()) for line in axis.lines):
      axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GRAY)
      axis.set(xticks=[], yticks=[], ylabel="")
  for axis in axes[-1]:
    axis.set_xlabel("optimizer updates")
  legend(figure, groups, width)
  return figure


def _scaled(band, scale):
  factor, shift = (100.0 if scale == "percent" else 1.0), (1.0 if scale == "shifted" else 0.0)
  return history.Band(band.x, *(factor * (y - shift) for y in band[1:]))
