"""Sets a run's first and last sample grids side by side.

python docs/images/make_before_after.py RUN_DIR docs/images/before_after.png
"""

import pathlib
import sys

import numpy as np
from PIL import Image


def main(run_dir: str, output: str) -> None:
  """Cuts both grids to their first four columns and writes them with a gap between."""
  grids = sorted(pathlib.Path(run_dir, "images").glob("eval_*.png"))
  before, after = (np.asarray(Image.open(path))[:, :404] for path in (grids[0], grids[-1]))
  gap = np.full((len(before), 24, 3), 255, np.uint8)
  Image.fromarray(np.hstack([before, gap, after])).save(output)


if __name__ == "__main__":
  main(*sys.argv[1:])
