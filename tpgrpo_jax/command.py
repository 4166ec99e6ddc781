"""How every command starts."""

from collections.abc import Callable
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[list[str]], Any]) -> None:
  """absl's app.run without the libraries' INFO lines, unless --verbosity asks for them."""

  def quiet(argv: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    main(argv)

  app.run(quiet)
