"""Look a name up in a table of plug-ins, or import it as "package.module:function"."""

from collections.abc import Iterable, Mapping
import difflib
import importlib
import re
from typing import TypeVar

T = TypeVar("T")

_PATH = re.compile(r"\w+(\.\w+)*:\w+")  # package.module:function


def nearest(name: str, choices: Iterable[str]) -> str:
  """The phrase that helps after a wrong name: " Did you mean 'x'? Choices: ...".

  Args:
    name: what the user typed.
    choices: every name that would have been right.
  """
  choices = sorted(str(c) for c in choices)
  close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return f"{hint} Choices: {', '.join(choices)}."


def check(name: str, table: Iterable[str], *, field: str, importable: bool = False) -> None:
  """Raises ValueError unless `name` is in `table` (or has the form of an importable path).

  Args:
    name: the name to check.
    table: the known names.
    field: the config field that held the name, for the message.
    importable: whether "package.module:function" is accepted too.
  """
  if not isinstance(name, str):
    raise ValueError(
      f"{field}={name!r}: must be a name, and is {type(name).__name__}.{nearest('', table)}"
    )
  if name in table or (importable and _PATH.fullmatch(name)):
    return
  own = ' Your own goes in as "package.module:function".' if importable else ""
  raise ValueError(f"{field}={name!r}: unknown name.{nearest(name, table)}{own}")


def lookup(table: Mapping[str, T], name: str, *, field: str) -> T:
  """Returns `table[name]`, or imports `name` if it reads "package.module:function".

  Args:
    table: the known plug-ins.
    name: a key of the table, or an importable path.
    field: the config field that held the name, for the message.

  Raises:
    ValueError: unknown name (with the nearest one), or an import that fails (with the cause).
  """
  if name in table:
    return table[name]
  check(name, table, field=field, importable=True)
  module, _, attribute = name.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except Exception as error:  # the module's own code runs, and may raise anything
    raise ValueError(
      f"{field}={name!r}: cannot import {attribute!r} from {module!r} ({type(error).__name__}: {error}). "
      "Check the spelling, and that the module's folder is on PYTHONPATH."
    ) from error
