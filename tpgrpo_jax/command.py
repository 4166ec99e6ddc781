"""How every command starts, and how it says that something is wrong."""

from collections.abc import Callable
import pathlib
import sys
import traceback
from typing import Any

from absl import app, flags, logging

PACKAGE = pathlib.Path(__file__).parent


def run(main: Callable[[list[str]], Any]) -> None:
  """absl's app.run without the libraries' INFO lines, unless --verbosity asks for them.

  An error that this package raised for its user ends the command with its message alone; any other
  error, and with --verbosity=1 all of them, keeps its traceback.
  """

  def quiet(argv: list[str]) -> None:
    if flags.FLAGS["verbosity"].present:
      return main(argv)
    logging.set_verbosity(logging.WARNING)
    try:
      main(argv)
    except (ValueError, RuntimeError) as error:
      if not _raised_here(error):
        raise
      print(f"error: {error}", file=sys.stderr)
      sys.exit(1)

  app.run(quiet)


def _raised_here(error: BaseException) -> bool:
  """Whether a `raise` of this package made the error, and not a library below it."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return pathlib.Path(innermost.filename).is_relative_to(PACKAGE)
