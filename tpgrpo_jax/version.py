"""Which version this is, and what its extras bring."""

import importlib.metadata
import re


def installed() -> str:
  """Of the installed package, as its metadata says."""
  try:
    return importlib.metadata.version("tpgrpo_jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    return "not installed"


def install(extra: str) -> str:
  """The command that installs an extra's packages, by their own names: it works from any folder.

  Args:
    extra: of pyproject.toml.
  """
  try:
    asked = importlib.metadata.requires("tpgrpo_jax") or []
  except importlib.metadata.PackageNotFoundError:
    return f"pip install -e '.[{extra}]'"
  packages = _packages(extra, asked)
  return (
    f"pip install {' '.join(repr(name) for name in packages)}" if packages else "pip install -e ."
  )


def _packages(extra, asked):
  """The requirements of an extra, and of those that it names."""
  found = []
  for line in asked:
    requirement, _, marker = (part.strip() for part in line.partition(";"))
    if not re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", marker):
      continue
    other = re.fullmatch(r"tpgrpo[_-]jax\[([\w,-]+)\]", requirement)
    names = other[1].split(",") if other else []
    found += [name for each in names for name in _packages(each, asked)] or [requirement]
  return found
