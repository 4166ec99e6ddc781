"""Figures of what happens along trajectories: R[k], turning points, means over an epoch."""

from collections.abc import Mapping, Sequence
import textwrap
from typing import Any

import numpy as np

from tpgrpo_jax.reporting import history, plots

UP, DOWN = "#4a8c68", "#b9bfc6"  # of a step that raises R, and one that does not
POINT = "#c1432e"

Groups = Mapping[str, Sequence[history.Run]]
_ALONG = "k, stochastic steps done"
_BRANCHED = "k, step at which the member left"


def example_trajectories(
  rollout: history.Rollout, width: float = plots.WIDE, count: int = 6
) -> Any:
  """R[k] along single trajectories with their turning points, as in the paper's first figure.

  Of branches: the reward of an anchor, and of the member that left it at each step. None when the rollout has
  no completions. Chosen are trajectories with turning points whose rewards move most, one a prompt as far as
  there are so many. Where pictures were kept, each has its own.
  """
  chosen = _choose(rollout, count)
  if not chosen:
    return None
  figure, axes = plots.panels(len(chosen), width, 2.9, room=0.5, sharex=True, sharey=True)
  shows, own = len(rollout.images) > 0, 0 if rollout.branched else -1
  for axis, b in zip(axes.flat, chosen):
    found = None if rollout.found is None else rollout.found[:, b]
    reward = rollout.completion_reward[:, b]
    if rollout.branched:
      _draw_branch(axis, reward)
    else:
      _draw_trajectory(axis, reward, rollout.is_turning_point[:, b], found)
    prompt = "\n".join(textwrap.wrap(str(rollout.prompts[b]), 22, max_lines=3, placeholder=" …"))
    axis.set_title(
      f"{prompt}\n{'anchor' if rollout.branched else 'R[W]'} = {reward[own]:.2f}", y=1.03
    )
    if shows:
      _inset(axis, rollout.images[b])
  for axis in axes[-1]:
    axis.set_xlabel(_BRANCHED if rollout.branched else _ALONG)
  for axis in axes[:, 0]:
    axis.set_ylabel("reward" if rollout.branched else "R[k]")
  if rollout.branched:
    _branch_legend(figure)
    return figure
  dropped = _dropped(rollout.is_turning_point, rollout.found)[:, chosen].any()
  _trajectory_legend(figure, rollout.is_turning_point[:, chosen].any(), dropped, width)
  return figure


def _dropped(kept, found):
  """What balancing has taken away."""
  return np.zeros_like(kept, bool) if found is None else np.asarray(found, bool) & ~kept


def _choose(rollout, count):
  reward = rollout.completion_reward
  complete = np.all(np.isfinite(reward), axis=0)
  if reward.shape[0] < 2:
    return []
  if len(rollout.images):
    complete &= np.arange(len(complete)) < len(rollout.images)
  movement = np.where(complete, np.abs(np.diff(reward, axis=0)).sum(axis=0), -np.inf)
  has_point = rollout.is_turning_point.any(axis=0)
  order = np.lexsort((np.arange(len(complete)), -movement, ~has_point))
  order = [b for b in order if complete[b]]
  first_of_prompt = {rollout.prompts[b]: b for b in reversed(order)}.values()
  unique = [b for b in order if b in set(first_of_prompt)]
  return (unique + [b for b in order if b not in set(unique)])[:count]


def _draw_trajectory(axis, reward, kept, found):
  steps = np.arange(len(reward))
  for k in range(len(reward) - 1):
    color = UP if reward[k + 1] > reward[k] else DOWN
    axis.plot(steps[k : k + 2], reward[k : k + 2], color=color, linewidth=2.2)
  axis.plot(steps, reward, "o", color=plots.GRAY, markersize=3.2)
  for k in np.flatnonzero(kept):
    # What the step is paid instead of its own increment: R[W] - R[k].
    if k + 2 < len(reward):  # of the last step the two are the same
      axis.plot([k, steps[-1]], [reward[k], reward[-1]], ":", color=POINT, linewidth=1.2)
    axis.plot(k, reward[k], "o", markersize=9, **_ring(POINT))
  for k in np.flatnonzero(_dropped(kept, found)):
    axis.plot(k, reward[k], "s", markersize=9, **_ring(plots.GRAY))
  axis.set_xticks(steps)
  axis.margins(x=0.06, y=0.12)


def _draw_branch(axis, reward):
  """The anchor's reward as a line, and each member's as a point above or below it."""
  anchor, members = reward[0], reward[1:]
  axis.axhline(anchor, color=plots.GRAY, linewidth=1.2)
  for k, value in enumerate(members):
    color = UP if value > anchor else DOWN
    axis.plot([k, k], [anchor, value], color=color, linewidth=2.2)
    axis.plot(k, value, "o", color=color, markersize=6)
  axis.set_xticks(np.arange(len(members)))
  axis.margins(x=0.12, y=0.12)


def _branch_legend(figure):
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=plots.GRAY, linewidth=1.2, label="the anchor"),
    Line2D([], [], color=UP, marker="o", label="a member that is better"),
    Line2D([], [], color=DOWN, marker="o", label="one that is not"),
  ]
  figure.legend(handles=handles, loc="outside upper left", ncols=3)


def _ring(color):
  return {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.8}


def _inset(axis, image):
  """The finished image, above the panel on the right."""
  shown = axis.inset_axes((0.56, 1.03, 0.44, 0.26))
  shown.imshow(image, interpolation="nearest")
  shown.set_anchor("SE")
  shown.set_axis_off()


def _trajectory_legend(figure, with_points, with_dropped, width):
  from matplotlib.lines import Line2D

  handles = [
    Line2D([], [], color=UP, label="step raises R"),
    Line2D([], [], color=DOWN, label="step does not"),
  ]
  if with_points:
    ring = {"marker": "o", "markersize": 8, "linestyle": "", **_ring(POINT)}
    handles += [
      Line2D([], [], label="turning point, kept", **ring),
      Line2D([], [], color=POINT, linestyle=":", linewidth=1.2, label="it is paid R[W] − R[k]"),
    ]
  if with_dropped:
    square = {"marker": "s", "markersize": 8, "linestyle": "", **_ring(plots.GRAY)}
    handles.append(Line2D([], [], label="turning point, dropped by balancing", **square))
  figure.legend(handles=handles, loc="outside upper left", ncols=5 if width >= plots.WIDE else 2)


def mean_completion_reward(groups: Groups, width: float = plots.WIDE) -> Any:
  """Mean R[k] over k in the first, middle and last tenth of training; None without completions.

  Methods that are trained on the same sum of rewards share an axis, and others do not.
  """
  tables = {k: history.per_step(v, "completion_reward") for k, v in groups.items()}
  tables = {k: t for k, t in tables.items() if len(t[0]) and len(t[1]) > 1}
  if not tables:
    return None
  figure, axes = plots.panels(len(tables), width, 2.9, room=0.3)
  palette = plots.colors(list(groups))
  by_label = dict(zip(tables, axes.flat))
  for label, (epochs, values) in tables.items():
    axis, spans = by_label[label], _spans(len(epochs))
    for shade, span in zip(np.linspace(0.3, 1.0, len(spans)) if len(spans) > 1 else [1.0], spans):
      y = values[:, span].mean(axis=1)
      low, high = epochs[span][0], epochs[span][-1]
      name = f"epoch {low}" if low == high else f"epochs {low}–{high}"
      axis.plot(
        np.arange(len(y)), y, "o-", color=palette[label], alpha=shade, markersize=3.5, label=name
      )
    axis.set_title(label)
    branched = groups[label][0].config.sampler.rollout == "branch"
    axis.set_xlabel("k: 0 the anchor, then members that left at k − 1" if branched else _ALONG)
    axis.set_xticks(np.arange(len(values)))
    axis.set_ylabel(f"mean R[k] of {history.training_sum(groups[label][0].config)}")
    axis.legend(loc="best", fontsize=8)
  for part in history.alike({k: groups[k] for k in tables}, lambda config: config.rewards):
    first, *others = (by_label[label] for label in part)
    for axis in others:
      axis.sharey(first)
  return figure


def _spans(count):
  """Up to three slices: the first tenth, the middle one and the last."""
  width = max(1, count // 10)
  starts = sorted({0, (count - width) // 2, count - width})
  return [slice(s, s + width) for s in starts]


_DENSITIES = (("turning_point_found", "found"), ("turning_point", "paid"))


def turning_point_density(groups: Groups, width: float = plots.WIDE) -> Any:
  """Share of samples with a turning point at step k, over epochs; None where no method marks any.

  One panel for those that were found, and one for those that are paid after balancing. Runs of older versions
  have not written the first.
  """
  tables = []
  for label, runs in groups.items():
    for metric, name in _DENSITIES:
      epochs, values = history.per_step(runs, metric)
      if values.size and values.max() > 0:
        after = " after balancing" * (metric == "turning_point" and runs[0].config.credit.balance)
        tables.append((f"{label}: {name}{after}", epochs, values))
  if not tables:
    return None
  figure, axes = plots.panels(len(tables), width, 1.75, least=width, room=0.5, sharex=True)
  top = max(values.max() for _, _, values in tables)
  for axis, (title, epochs, values) in zip(axes[:, 0], tables):
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, -0.5, len(values) - 0.5)
    shown = axis.imshow(
        100.0 * values, origin="lower", aspect="auto", extent=extent, cmap="OrRd", vmin=0,
        vmax=100.0 * top, interpolation="nearest",
    )  # fmt: skip
    axis.grid(False)
    axis.set_title(title)
    axis.set_ylabel("step k")
    axis.set_yticks(np.arange(len(values)))
  axes[-1, 0].set_xlabel("epoch")
  axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
  bar = figure.colorbar(shown, ax=list(axes[:, 0]), shrink=0.9, pad=0.015)
  bar.outline.set_visible(False)
  bar.set_label("samples (%)", color=plots.GRAY)
  return figure
