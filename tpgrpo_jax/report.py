"""Draws runs: python -m tpgrpo_jax.report --output report RUN_DIR [RUN_DIR ...] [label=RUN_DIR ...]

Runs of one label are drawn as one curve, the mean over seeds with the band from the lowest to the
highest. The label is the run's method unless it is given. With --watch the page is written again whenever
a run folder has changed, until the runs have ended or Ctrl-C. An open page loads itself again.
"""

from absl import flags

from tpgrpo_jax import command

_OUTPUT = flags.DEFINE_string("output", "report", "Folder for report.html and its plots as PNG.")
_WATCH = flags.DEFINE_bool(
  "watch", False, "Write the page again whenever a run folder has changed."
)
_EVERY = flags.DEFINE_float("every", 10.0, "Seconds between two looks of --watch.", lower_bound=0.1)


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  from tpgrpo_jax.reporting import history, page, tables, watch

  command.open_output("--output", _OUTPUT.value)
  groups = None if _WATCH.value else history.load_runs(argv[1:])
  if groups is None:
    path = watch.watch(argv[1:], _OUTPUT.value, every=_EVERY.value)
    groups = history.load_runs(argv[1:])
  else:
    path = page.write_report(groups, _OUTPUT.value)
  print(tables.render_text(groups), f"written to {path}", sep="\n")


if __name__ == "__main__":
  command.run(main)
