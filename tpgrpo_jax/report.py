"""Draws runs: python -m tpgrpo_jax.report --output report RUN_DIR [RUN_DIR ...] [label=RUN_DIR ...]

Runs of one label are drawn as one curve, the mean over seeds with the band from the lowest to the
highest. The label is the run's method unless it is given.
"""

from absl import flags

from tpgrpo_jax import command

_OUTPUT = flags.DEFINE_string("output", "report", "Folder for report.html and its plots as PNG.")


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  from tpgrpo_jax.reporting import history, page

  command.open_output("--output", _OUTPUT.value)
  groups = history.load_runs(argv[1:])
  path = page.write_report(groups, _OUTPUT.value)
  print(page.render_text_table(groups), f"written to {path}", sep="\n")


if __name__ == "__main__":
  command.run(main)
