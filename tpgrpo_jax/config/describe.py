"""What every field of a config is, read from the docstrings of its dataclasses."""

from collections.abc import Iterator
import dataclasses
import inspect
import re
import textwrap
import typing
from typing import Any, NamedTuple


class Field(NamedTuple):
  """One field of a config.

  Attributes:
    name: dotted.
    kind: its type, as it is written.
    default: as Python writes it.
    text: what it is, in one line; "" where no docstring says it.
  """

  name: str
  kind: str
  default: str
  text: str


class Group(NamedTuple):
  """The fields of one dataclass.

  Attributes:
    name: dotted, "" for the config itself.
    text: what the dataclass says of itself.
    fields: its own, without those of the groups within.
  """

  name: str
  text: str
  fields: list[Field]


def groups(cls: type, name: str = "", default: Any = None) -> Iterator[Group]:
  """The groups of a config dataclass, itself first.

  Args:
    cls: the dataclass.
    name: of the group.
    default: an instance with the defaults; by default cls().
  """
  config = cls() if default is None else default
  text, texts = _parse(inspect.getdoc(cls) or "")
  hints, own, below = typing.get_type_hints(cls), [], []
  for field in dataclasses.fields(cls):
    dotted, value = f"{name}.{field.name}".lstrip("."), getattr(config, field.name)
    if dataclasses.is_dataclass(hints[field.name]):
      below.append((hints[field.name], dotted, value))
    else:
      kind = field.type if isinstance(field.type, str) else _name_of(hints[field.name])
      own.append(Field(dotted, kind, repr(value), texts.get(field.name, "")))
  yield Group(name, text, own)
  for each in below:
    yield from groups(*each)


def render(cls: type, prefix: str = "--config.") -> str:
  """All fields as text, for --help.

  Args:
    cls: the config dataclass.
    prefix: of each name.
  """
  lines = []
  for group in groups(cls):
    if not group.fields:
      continue
    lines += ["", group.text and textwrap.fill(group.text, 100)]
    for field in group.fields:
      lines.append(f"  {prefix}{field.name}={field.default}  ({field.kind})")
      if field.text:
        lines.append(
          textwrap.fill(field.text, 100, initial_indent="      ", subsequent_indent="      ")
        )
  return "\n".join(lines)


def _parse(doc):
  """(text before "Attributes:", {field: its text}), each in one line."""
  head, _, tail = doc.partition("Attributes:")
  texts: dict[str, list[str]] = {}
  name = ""
  for line in textwrap.dedent(tail.strip("\n")).splitlines():
    if found := re.match(r"(\w+): (.*)", line):
      name = found[1]
      texts[name] = [found[2]]
    elif line.strip() and name:
      texts[name].append(line.strip())
  return " ".join(head.split()), {name: " ".join(parts) for name, parts in texts.items()}


def _name_of(hint):
  return (
    hint.__name__
    if isinstance(hint, type) and not typing.get_args(hint)
    else str(hint).replace("typing.", "")
  )
