"""Which version this is, and what its extras bring."""

import importlib.metadata
import pathlib
import re
import tomllib

_PROJECT = pathlib.Path(__file__).parents[1] / "pyproject.toml"


def installed() -> str:
  """Of this source tree, as its pyproject.toml says, or of the installed package."""
  if _PROJECT.is_file():
    project = tomllib.loads(_PROJECT.read_text()).get("project", {})
    if project.get("name") == "tpgrpo_jax":
      return project["version"]
  try:
    return importlib.metadata.version("tpgrpo_jax")
  except importlib.metadata.PackageNotFoundError:  # its files alone, copied
    return "unknown"


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
