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
}
SPARE_COLORS = ("#3b8ea5", "#a14d7b", "#8c7a3f", "#5b6b7a", "#b0705a")
INK, GRAY, FAINT = "#22282f", "#6b7480", "#d9dee3"
UP, DOWN = "#4a8c68", "#b9bfc6"  # of a step that raises R, and one that does not
POINT = "#c1432e"

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


def _figure(
  rows: int, columns: int, width: float, height: float, **options
) -> tuple[Any, np.ndarray]:
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  layout = ConstrainedLayoutEngine(wspace=0.04, hspace=0.06)
  figure = Figure(figsize=(width, height), layout=layout)
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def held_out_reward(groups: Groups, reward: str) -> Any:
  """One reward of held-out prompts against what was spent: evaluations, operations, wall-clock."""
  figure, axes = _figure(1, 3, 10.0, 3.4, sharey=True)
  for axis, against in zip(axes[0], history.TOTALS):
    curves = {
      k: history.band(v, "evals", f"reward/{reward}/mean", against) for k, v in groups.items()
    }
    _draw_bands(axis, curves, markers=True)
    _name_axis(axis, against, curves)
  axes[0, 0].set_ylabel(f"{reward}, held-out prompts")
  _legend(figure, groups)
  return figure


def training_reward(groups: Groups) -> Any:
  """Mean reward of the samples trained on, against updates and model evaluations.

  Every epoch has other prompts, so the line is a trailing mean of SMOOTHING epochs.
  """
  figure, axes = _figure(1, 2, 10.0, 3.2, sharey=True)
  for axis, against in zip(axes[0], ("updates", "evaluations")):
    curves = {k: history.band(v, "train", "reward/mean", against) for k, v in groups.items()}
    _draw_noisy(axis, curves)
    _name_axis(axis, against, curves)
  axes[0, 0].set_ylabel("training reward")
  _legend(figure, groups)
  return figure


def _draw_noisy(axis, curves):
  """A trailing mean in bold over what it averages: the band of the seeds, or the only seed's line."""
  for label, color in colors(list(curves)).items():
    band = curves[label]
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
    axis.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=against != "teraflops"))
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))


def _nice(value):
  """The next 1, 2 or 5 times a power of ten."""
  power = 10.0 ** np.floor(np.log10(value))
  return next(n * power for n in (1, 2, 5, 10) if n * power >= value * 0.999)


def _legend(figure, groups):
  from matplotlib.lines import Line2D

  handles = []
  for label, color in colors(list(groups)).items():
    seeds = len(groups[label])
    name = label if seeds == 1 else f"{label} ({seeds} seeds)"
    handles.append(Line2D([], [], color=color, label=name))
  longest = max(len(handle.get_label()) for handle in handles)
  columns = max(1, min(len(handles), 135 // (longest + 6)))
  figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def example_trajectories(rollout: history.Rollout, count: int = 6) -> Any:
  """R[k] along single trajectories with their turning points, as in the paper's first figure.

  None when the rollout has no completions. Chosen are trajectories with turning points whose rewards
  move most, one a prompt as far as there are so many.
  """
  chosen = _choose(rollout, count)
  if not chosen:
    return None
  columns = min(3, len(chosen))
  rows = -(-len(chosen) // columns)
  figure, axes = _figure(rows, columns, 10.0, 0.6 + 2.4 * rows, sharex=True, sharey=True)
  for axis in axes.flat[len(chosen) :]:
    axis.set_visible(False)
  for axis, b in zip(axes.flat, chosen):
    _draw_trajectory(axis, rollout.completion_reward[:, b], rollout.is_turning_point[:, b])
    axis.set_title(_shorten(str(rollout.prompts[b])), y=1.03)  # a fixed y: beside the image
    if b < len(rollout.images):
      _inset(axis, rollout.images[b])
  for axis in axes[-1]:
    axis.set_xlabel("k, stochastic steps done")
  for axis in axes[:, 0]:
    axis.set_ylabel("R[k]")
  _trajectory_legend(figure, rollout.is_turning_point[:, chosen].any())
  return figure


def _choose(rollout, count):
  reward = rollout.completion_reward
  complete = np.all(np.isfinite(reward), axis=0)
  if reward.shape[0] < 2 or not complete.any():
    return []
  movement = np.where(complete, np.abs(np.diff(reward, axis=0)).sum(axis=0), -np.inf)
  has_point = rollout.is_turning_point.any(axis=0)
  has_image = np.arange(len(complete)) < len(rollout.images)
  order = np.lexsort((np.arange(len(complete)), -movement, ~has_image, ~has_point))
  order = [b for b in order if complete[b]]
  first_of_prompt = {rollout.prompts[b]: b for b in reversed(order)}.values()
  unique = [b for b in order if b in set(first_of_prompt)]
  return (unique + [b for b in order if b not in set(unique)])[:count]


def _draw_trajectory(axis, reward, is_turning_point):
  steps = np.arange(len(reward))
  for k in range(len(reward) - 1):
    color = UP if reward[k + 1] > reward[k] else DOWN
    axis.plot(steps[k : k + 2], reward[k : k + 2], color=color, linewidth=2.2)
  axis.plot(steps, reward, "o", color=GRAY, markersize=3.2)
  for k in np.flatnonzero(is_turning_point):
    # What the step is paid instead of its own increment: R[W] - R[k].
    if k + 2 < len(reward):  # of the last step the two are the same
      axis.plot([k, steps[-1]], [reward[k], reward[-1]], ":", color=POINT, linewidth=1.2)
    ring = {"markerfacecolor": "none", "markeredgecolor": POINT, "markeredgewidth": 1.8}
    axis.plot(k, reward[k], "o", markersize=9, **ring)
  axis.set_xticks(steps)
  axis.margins(x=0.06, y=0.12)


def _inset(axis, image):
  """The finished image, above the panel on the right."""
  shown = axis.inset_axes((0.6, 1.02, 0.4, 0.15))
  shown.set_in_layout(False)
  shown.imshow(image, interpolation="nearest")
  shown.set_anchor("SE")
  shown.set_axis_off()


def _trajectory_legend(figure, with_points):
  from matplotlib.lines import Line2D

  ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "linestyle": ""}
  handles = [
    Line2D([], [], color=UP, label="step raises R"),
    Line2D([], [], color=DOWN, label="step does not"),
  ]
  if with_points:
    handles += [
      Line2D([], [], color=POINT, label="turning point: the step that starts here", **ring),
      Line2D([], [], color=POINT, linestyle=":", linewidth=1.2, label="is paid R[W] − R[k]"),
    ]
  figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _shorten(text, length=28):
  return text if len(text) <= length else text[: length - 1] + "…"


def mean_completion_reward(groups: Groups) -> Any:
  """Mean R[k] over k in the first, middle and last tenth of training; None without completions."""
  tables = {k: history.per_step(v, "completion_reward") for k, v in groups.items()}
  tables = {k: t for k, t in tables.items() if len(t[0]) and len(t[1]) > 1}
  if not tables:
    return None
  figure, axes = _figure(1, len(tables), min(10.0, 3.4 * len(tables) + 0.6), 3.2, sharey=True)
  palette = colors(list(groups))
  for axis, (label, (epochs, values)) in zip(axes[0], tables.items()):
    spans = _spans(len(epochs))
    for shade, span in zip(np.linspace(0.3, 1.0, len(spans)) if len(spans) > 1 else [1.0], spans):
      y = values[:, span].mean(axis=1)
      low, high = epochs[span][0], epochs[span][-1]
      name = f"epoch {low}" if low == high else f"epochs {low}–{high}"
      axis.plot(
        np.arange(len(y)), y, "o-", color=palette[label], alpha=shade, markersize=3.5, label=name
      )
    axis.set_title(label)
    axis.set_xlabel("k, stochastic steps done")
    axis.set_xticks(np.arange(len(values)))
    axis.legend(loc="best", fontsize=8)
  axes[0, 0].set_ylabel("mean R[k]")
  return figure


def _spans(count):
  """Up to three slices: the first tenth, the middle one and the last."""
  width = max(1, count // 10)
  starts = sorted({0, (count - width) // 2, count - width})
  return [slice(s, s + width) for s in starts]


def turning_point_density(groups: Groups) -> Any:
  """Share of samples with a turning point at step k, over epochs; None where no method marks any."""
  tables = {k: history.per_step(v, "turning_point") for k, v in groups.items()}
  tables = {k: t for k, t in tables.items() if t[1].size and t[1].max() > 0}
  if not tables:
    return None
  figure, axes = _figure(len(tables), 1, 10.0, 0.7 + 1.75 * len(tables), sharex=True)
  top = max(values.max() for _, values in tables.values())
  for axis, (label, (epochs, values)) in zip(axes[:, 0], tables.items()):
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, -0.5, len(values) - 0.5)
    shown = axis.imshow(
        100.0 * values, origin="lower", aspect="auto", extent=extent, cmap="OrRd", vmin=0,
        vmax=100.0 * top, interpolation="nearest",
    )  # fmt: skip
    axis.grid(False)
    axis.set_title(label)
    axis.set_ylabel("step k")
    axis.set_yticks(np.arange(len(values)))
  axes[-1, 0].set_xlabel("epoch")
  axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
  bar = figure.colorbar(shown, ax=list(axes[:, 0]), shrink=0.9, pad=0.015)
  bar.outline.set_visible(False)
  bar.set_label("samples with a turning point (%)", color=GRAY)
  return figure


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


def diagnostics(groups: Groups) -> Any:
  """What tells a healthy run from a broken one: ratios, clipping, KL, gradients, image statistics."""
  figure, axes = _figure(3, 3, 10.0, 7.2)
  for axis, (title, unit, kind, names, scale) in zip(axes.flat, DIAGNOSTICS):
    for name in names:
      curves = {k: _scaled(history.band(v, kind, name), scale) for k, v in groups.items()}
      if name == "kl":  # without the term it is not computed, and the rows hold 0
        curves = {k: b for k, b in curves.items() if groups[k][0].config.loss.kl_coef}
      if kind == "evals":
        _draw_bands(axis, curves)
      else:
        _draw_noisy(axis, curves)
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    if not any(len(line.get_xdata()) for line in axis.lines):
      axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GRAY)
      axis.set(xticks=[], yticks=[], ylabel="")
  for axis in axes[-1]:
    axis.set_xlabel("optimizer updates")
  _legend(figure, groups)
  return figure


def _scaled(band, scale):
  factor, shift = (100.0 if scale == "percent" else 1.0), (1.0 if scale == "shifted" else 0.0)
  return history.Band(band.x, *(factor * (y - shift) for y in band[1:]))
