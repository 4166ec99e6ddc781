"""Draws docs/images/held_out_ocr.png from the runs that are kept: python docs/images/make_comparison.py

The methods that have three seeds or more. Minutes are left out: the runs were made on shared machines.
"""

import pathlib

from tpgrpo_jax.reporting import history, plots

HERE = pathlib.Path(__file__).parent
RUNS = HERE.parents[1] / "benchmarks" / "results" / "tiny_text"


def main() -> None:
  """Reads and draws."""
  seeds = sorted(RUNS.glob("*_s[0-9]*"))
  names = [run.name.rpartition("_s")[0] for run in seeds]
  kept = [f"{name}={run}" for name, run in zip(names, seeds) if names.count(name) >= 3]
  groups = history.load_runs(kept)
  with plots.style():
    figure = plots.held_out_reward(groups, "ocr", totals=("evaluations", "teraflops"))
    figure.savefig(HERE / "held_out_ocr.png")


if __name__ == "__main__":
  main()
