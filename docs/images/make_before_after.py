"""Draws the words of a run's first and last evaluation, with what the OCR reads in each and its score.

python docs/images/make_before_after.py RUN_DIR docs/images/before_after.png    (needs the OCR extra)

The pixels are those of the run's sample grids, which enlarge each picture by a whole number.
"""

import sys

import numpy as np
from PIL import Image

from tpgrpo_jax.reporting import history, plots
from tpgrpo_jax.rewards import ocr

ROWS, COLUMNS = 3, 4  # of what is drawn
HEIGHT, WIDTH, SCALE, MARGIN, LINE = (
  24,
  48,
  2,
  4,
  14,
)  # of the grids, as training.evaluation draws them


def cells(path, words: int) -> np.ndarray:
  """The first pictures of a grid of eight columns, as they were painted: uint8 [words, HEIGHT, WIDTH, 3]."""
  sheet = np.asarray(Image.open(path).convert("RGB"))
  height, width, found = HEIGHT * SCALE, WIDTH * SCALE, []
  for i in range(words):
    top, left = MARGIN + i // 8 * (height + LINE + MARGIN), MARGIN + i % 8 * (width + MARGIN)
    found.append(sheet[top : top + height : SCALE, left : left + width : SCALE])
  return np.stack(found)


def main(run_dir: str, output: str) -> None:
  """Reads, scores and draws."""
  from tpgrpo_jax.data import prompts as prompts_lib

  run = history.load_run(run_dir)
  outcome = history.outcome([run], "ocr")
  prompts = prompts_lib.load_prompts("words", "", "test")
  words = [prompts[i].text for i in range(8 * ROWS)]
  chosen = [8 * row + column for row in range(ROWS) for column in range(COLUMNS)]
  reward = ocr.make()
  with plots.style():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    halves = figure.subfigures(1, 2, wspace=0.05)
    scores = zip((outcome.base, outcome.final), (outcome.base_error, outcome.final_error))
    for half, grid, (score, error) in zip(halves, history.sample_grids(run), scores):
      pictures = cells(grid.path, len(words))
      each, info = reward(pictures, words, [{}] * len(words))
      when = "Before training" if grid.epoch == 0 else f"After {grid.epoch} epochs"
      half.suptitle(
        f"{when}: OCR score {score[0]:.3f} ± {error[0]:.3f}", fontsize=13, x=0.02, ha="left"
      )
      for axis, i in zip(half.subplots(ROWS, COLUMNS).flat, chosen):
        axis.imshow(pictures[i], interpolation="nearest")
        axis.set_axis_off()
        right = info["text"][i] == words[i]
        axis.set_title(
          f"asked {words[i]}\nreads {info['text'][i] or 'nothing'}: {each[i]:.2f}",
          fontsize=9, y=-0.62, loc="left", color=plots.INK if right else "#c1432e",
        )  # fmt: skip
    figure.savefig(output)


if __name__ == "__main__":
  main(*sys.argv[1:])
