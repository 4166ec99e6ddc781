"""Draws the first held-out prompts of a run before and after training, with what its reward reads in each.

python docs/images/make_before_after.py RUN_DIR docs/images/before_after.png [ROWS]

The pictures are those of the run's sample grids, which enlarge each by a whole number.
"""

import sys
import textwrap

import numpy as np
from PIL import Image

from tpgrpo_jax.reporting import history, plots

COLUMNS = 4  # of what is drawn, before and after
LETTERS = 18  # in a line
LINE = 0.16  # inches


def caption(grid: history.Grid, label: str, i: int) -> tuple[str, bool]:
  """What picture i of a grid was to show and what was read, and whether that is all right."""
  score = grid.said["scores"][label][i]
  read = grid.said["readings"][label][i] or "nothing"
  lines = [f"asked {grid.said['prompts'][i]}", f"reads {read}: {score:.2f}"]
  return "\n".join(line for text in lines for line in textwrap.wrap(text, LETTERS)), score == 1


def main(run_dir: str, output: str, rows: str = "3") -> None:
  """Reads and draws."""
  run = history.load_run(run_dir)
  (label,), rows = run.config.eval.rewards or run.config.rewards, int(rows)
  outcome, grids = history.outcome([run], label), history.sample_grids(run)
  captions = [[caption(grid, label, i) for i in range(rows * COLUMNS)] for grid in grids]
  lines = max(text.count("\n") + 1 for each in captions for text, _ in each)
  with plots.style():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 0.5 + rows * (0.75 + LINE * lines)), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.05)
    scores = zip((outcome.base, outcome.final), (outcome.base_error, outcome.final_error))
    for half, grid, said, (score, error) in zip(halves, grids, captions, scores):
      when = "Before training" if grid.epoch == 0 else f"After {grid.epoch} epochs"
      title = f"{when}: {label} score {score[0]:.3f} ± {error[0]:.3f}"
      half.suptitle(title, fontsize=13, x=0.02, ha="left")
      sheet = np.asarray(Image.open(grid.path).convert("RGB"))
      for i, axis in enumerate(half.subplots(rows, COLUMNS).flat):
        left, top, right, bottom = grid.said["boxes"][i]
        axis.imshow(sheet[top:bottom, left:right], interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        text, is_right = said[i]
        axis.set_xlabel(text, fontsize=8, loc="left", color=plots.INK if is_right else "#c1432e")
    figure.savefig(output)


if __name__ == "__main__":
  main(*sys.argv[1:])
