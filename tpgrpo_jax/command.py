"""How every command starts, and how it says that something is wrong."""

from collections.abc import Callable
import errno
import math
import os
import pathlib
import re
import select
import sys
import tempfile
import traceback
from typing import Any, NoReturn
import warnings

from absl import app, flags, logging

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import registry, version
from tpgrpo_jax.config import bridge, describe
from tpgrpo_jax.runs import interrupts

PACKAGE = pathlib.Path(__file__).parent
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_UNREAD = 141  # 128 + SIGPIPE: as `... | head` ends other programs


def run(
  main: Callable[[list[str]], Any],
  *,
  recipe: type = config_lib.Config,
  argv: list[str] | None = None,
) -> None:
  """absl's app.run without the libraries' INFO lines, unless --verbosity asks for them.

  An error that this package raised for its user ends the command with its message alone; any other
  error, and with --verbosity=1 all of them, keeps its traceback.

  Args:
    main: of argv.
    recipe: the dataclass that --config describes; the keys of --config.x.y=z are checked with it.
    argv: in place of sys.argv.
  """

  def parse(argv: list[str]) -> list[str]:
    if {"--version", "-version"} & {*argv}:
      print(f"tpgrpo_jax {version.installed()}")
      sys.exit(0)
    if {"--help", "-help", "-h"} & {*argv}:
      print(f"{sys.modules[main.__module__].__doc__}\n{flags.FLAGS.main_module_help()}")
      if any(name == "config" for name in flags.FLAGS):
        print(describe.render(recipe))
      sys.exit(0)
    try:
      check_fields(recipe, argv)
      return flags.FLAGS(_with_recipes_found(argv))
    except (ValueError, TypeError, SyntaxError, flags.Error) as error:  # of config_flags
      _stop(_origin(error))

  def quiet(argv: list[str]) -> None:
    if flags.FLAGS["verbosity"].present:
      return main(argv)
    logging.set_verbosity(logging.WARNING)
    warnings.formatwarning = _format_warning
    try:
      main(argv)
    except (ValueError, RuntimeError, ImportError) as error:
      if not _raised_here(error):
        raise
      _stop(error)
    except OSError as error:
      if error.errno not in _FULL:
        raise
      where = error.filename or "the output"
      _stop(
        f"{where}: cannot be written: {error.strerror}. Make room or name another folder, then again."
      )
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.stderr.flush()
      os._exit(interrupts.INTERRUPTED)  # without waiting for threads: that is what was asked for

  with interrupts.second_ends_at_once():
    try:
      try:
        app.run(quiet, argv=argv, flags_parser=parse)
      finally:
        sys.stdout.flush()
    except BrokenPipeError:
      if not _nobody_reads():
        raise
      os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is written at exit
      sys.exit(_UNREAD)


def check_fields(recipe: type, argv: list[str]) -> None:
  """Raises ValueError for a --config.x.y that the dataclass `recipe` lacks, and for a reward named twice."""
  for i, arg in enumerate(argv):
    if key := re.match(r"--?config\.([^=]*)", arg):
      bridge.check_key(recipe, key[1])
    if written := _value_of("config.rewards", arg, argv[i + 1 :]):
      bridge.check_once("rewards", written)


_in_full = warnings.formatwarning


def _format_warning(message, category, filename, lineno, line=None):
  """Of this package's own warnings the message alone: its user did not write the line."""
  if category is UserWarning and pathlib.Path(filename).is_relative_to(PACKAGE):
    return f"warning: {message}\n"
  return _in_full(message, category, filename, lineno, line)


def _nobody_reads() -> bool:
  """Whether the standard output is a pipe whose other end is closed."""
  poll = select.poll()
  poll.register(1, 0)  # errors alone
  return bool(poll.poll(0))


def define_weights() -> tuple[flags.FlagHolder, flags.FlagHolder]:
  """The flags --weights and --strength of the commands that open a run."""
  weights = flags.DEFINE_enum(
    "weights",
    "ema",
    ["ema", "last", "best"],
    "Of the run: the newest average, as the last update left them, those of the best evaluation.",
  )
  strength = flags.DEFINE_float("strength", 1.0, "base + strength (learned - base).")
  flags.register_validator(
    strength, lambda value: 0 <= value < math.inf, message="must be finite and >= 0"
  )
  return weights, strength


def define_epoch() -> flags.FlagHolder:
  """The flag --epoch of the commands that open a run."""
  return flags.DEFINE_integer(
    "epoch",
    None,
    "The run after so many epochs, where a checkpoint of it is kept; by default the newest.",
  )


def define_overwrite(what: str) -> flags.FlagHolder:
  """The flag --overwrite of the commands that leave earlier results in --output alone."""
  return flags.DEFINE_boolean("overwrite", False, f"Replace {what} in --output.")


def refuse_arguments(argv: list[str]) -> None:
  """Raises ValueError for arguments that are not flags, where a command takes none."""
  if len(argv) > 1:
    raise ValueError(f"unexpected arguments {' '.join(argv[1:])}. Recipes go behind --config.")


def open_output(
  flag: str, folder: str, *, only: tuple[str, ...] = (), new: str | None = None
) -> pathlib.Path:
  """Makes the folder of a command's results before any work is done.

  Args:
    flag: its name, for messages.
    folder: as the user gave it.
    only: patterns of the files that may be in it, where the command replaces its content.
    new: a file that must not be there yet, where earlier results stay.

  Raises:
    ValueError: no folder, one that cannot be written to, or one that holds other files, or that one.
  """
  path = pathlib.Path(folder).expanduser()
  if "://" in folder:
    raise ValueError(f"{flag}={folder!r}: must be a folder of this machine. Copy it from there.")
  try:
    if not folder:
      raise OSError("no name")
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise ValueError(
      f"{flag}={folder!r}: must be a folder that can be written to ({error.strerror or error})."
    ) from error
  if new and (path / new).exists():
    raise ValueError(
      f"{flag}={folder!r}: holds an earlier {new}. Name another folder, or --overwrite."
    )
  others = [p.name for p in path.iterdir() if not any(p.match(pattern) for pattern in only)]
  if only and others:
    raise ValueError(
      f"{flag}={folder!r}: holds {others[0]!r}, and its content will be replaced. Name a new folder."
    )
  return path


def recipes() -> dict[str, pathlib.Path]:
  """Name -> file of the recipes that ship: those of the checkout, else those of the installed package."""
  folders = (PACKAGE.parent / "configs", PACKAGE / "recipes")
  folder = next((folder for folder in folders if (folder / "tiny_text.py").is_file()), folders[1])
  return {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}


def _with_recipes_found(argv):
  """The arguments, with the file of the recipe that --config names.

  Raises:
    ValueError: no such recipe or file, which config_flags would keep to itself.
  """
  argv = list(argv)
  if not any(re.match(r"--?config(=|$)", arg) for arg in argv):
    run = next((v for i, a in enumerate(argv) if (v := _value_of("run", a, argv[i + 1 :]))), None)
    if run and any(re.match(r"--?config\.", arg) for arg in argv):  # fields of the run's own config
      argv.insert(1, f"--config={PACKAGE / 'reporting' / 'run_recipe.py'}:{run}")
  for i, arg in enumerate(argv):
    found = re.fullmatch(r"--?config(?:=(.*))?", arg)
    if not found:
      continue
    if found[1] is None and i + 1 == len(argv):
      argv.append("")
    value = found[1] if found[1] is not None else argv[i + 1]
    found_value = _find_recipe(value)
    if found[1] is not None:
      argv[i] = f"--config={found_value}"
    else:
      argv[i + 1] = found_value
  return argv


def _value_of(name, arg, rest):
  """What an argument --name=value, or --name with the next one, says; None for others."""
  found = re.fullmatch(rf"--?{name}(?:=(.*))?", arg, re.DOTALL)
  return found and (found[1] if found[1] is not None else (rest or [""])[0])


def _find_recipe(value):
  file, colon, method = value.partition(
    ":"
  )  # config_flags hands what follows the colon to get_config
  if pathlib.Path(file).is_file():
    return value
  known = recipes()
  if file not in known:
    raise ValueError(
      f"--config={value!r}: no such file, nor a recipe of that name."
      f"{registry.nearest(pathlib.Path(file).stem, known)}"
    )
  return f"{known[file]}{colon}{method}"


def _origin(error: BaseException) -> BaseException:
  """The error that a recipe met, where config_flags has put a traceback around its message."""
  chain = [error]
  while (before := chain[-1].__context__) is not None:
    chain.append(before)
  if re.search(r"get_config\(\) takes 0 positional arguments", str(chain[-1])):
    return ValueError(
      "--config: this recipe knows no methods. Leave the colon and what follows out."
    )
  return next((each for each in reversed(chain) if _raised_here(each)), error)


def _stop(error) -> NoReturn:
  notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))  # which reward it was
  print(f"error: {error}{notes}", file=sys.stderr)
  sys.exit(1)


def _raised_here(error: BaseException) -> bool:
  """Whether a `raise` of this package made the error, and not a library below it."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return pathlib.Path(innermost.filename).is_relative_to(PACKAGE)
