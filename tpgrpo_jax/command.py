"""How every command starts, and how it says that something is wrong."""

from collections.abc import Callable
import pathlib
import re
import sys
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import config_dict

PACKAGE = pathlib.Path(__file__).parent


def run(main: Callable[[list[str]], Any], *, recipe: type = config_lib.Config) -> None:
  """absl's app.run without the libraries' INFO lines, unless --verbosity asks for them.

  An error that this package raised for its user ends the command with its message alone; any other
  error, and with --verbosity=1 all of them, keeps its traceback.

  Args:
    main: of argv.
    recipe: the dataclass that --config describes; the keys of --config.x.y=z are checked with it.
  """

  def parse(argv: list[str]) -> list[str]:
    keys = (re.match(r"--?config\.([^=]+)", arg) for arg in argv)
    try:
      for key in filter(None, keys):
        config_dict.check_key(recipe, key[1])
      _check_recipe(argv)
      return flags.FLAGS(argv)
    except (ValueError, TypeError, flags.Error) as error:  # TypeError: config_flags, a wrong value
      _stop(error)

  def quiet(argv: list[str]) -> None:
    if flags.FLAGS["verbosity"].present:
      return main(argv)
    logging.set_verbosity(logging.WARNING)
    try:
      main(argv)
    except (ValueError, RuntimeError, ImportError) as error:
      if not _raised_here(error):
        raise
      _stop(error)

  app.run(quiet, flags_parser=parse)


def refuse_arguments(argv: list[str]) -> None:
  """Raises ValueError for arguments that are not flags, where a command takes none."""
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {' '.join(argv[1:])}. Recipes go behind --config.")


def _check_recipe(argv):
  """Raises ValueError where --config names no file, which config_flags would keep to itself."""
  for i, arg in enumerate(argv):
    found = re.fullmatch(r"--?config(?:=(.*))?", arg)
    if not found:
      continue
    value = found[1] if found[1] is not None else (argv[i + 1 : i + 2] or [""])[0]
    file = value.split(":", 1)[0]  # config_flags hands what follows the colon to get_config
    if not pathlib.Path(file).is_file():
      raise ValueError(
        f"--config={value!r}: no such file. Give a recipe, such as configs/tiny_text_tpgrpo.py."
      )


def _stop(error) -> NoReturn:
  print(f"error: {error}", file=sys.stderr)
  sys.exit(1)


def _raised_here(error: BaseException) -> bool:
  """Whether a `raise` of this package made the error, and not a library below it."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return pathlib.Path(innermost.filename).is_relative_to(PACKAGE)
