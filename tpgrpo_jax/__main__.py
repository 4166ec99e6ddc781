"""One command for all: tpgrpo COMMAND ..., or python -m tpgrpo_jax COMMAND ..."""

import ast
import pathlib
import runpy
import sys
from typing import NoReturn

from tpgrpo_jax import command, registry, version

COMMANDS = ("train", "evaluate", "sample", "export", "report", "pretrain", "aot", "serve", "judge")


def main() -> None:
  """Runs the command that the first argument names, as python -m tpgrpo_jax.COMMAND does."""
  name, rest = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
  if name in ("--help", "-h", "-help", "help"):
    print(usage())
    return
  if name in ("--version", "-version"):
    print(f"tpgrpo_jax {version.installed()}")
    return
  if name not in COMMANDS:
    _stop(f"error: {name!r}: no such command.{registry.nearest(name, COMMANDS)}")
  sys.argv = [f"tpgrpo {name}", *rest]
  runpy.run_module(f"tpgrpo_jax.{name}", run_name="__main__", alter_sys=True)


def usage() -> str:
  """A line for each command: its name and what its module says first."""
  lines = ["tpgrpo COMMAND [--flag=value ...]; tpgrpo COMMAND --help says which flags.", ""]
  for name in COMMANDS:
    text = ast.get_docstring(ast.parse(pathlib.Path(__file__).with_name(f"{name}.py").read_text()))
    lines.append(f"  {name:<9} {(text or '').partition(':')[0]}")
  recipes = ", ".join(command.recipes())
  return "\n".join([*lines, "", f"Recipes for --config: {recipes}; a method behind a colon."])


def _stop(message) -> NoReturn:
  print(message, file=sys.stderr)
  sys.exit(1)


if __name__ == "__main__":
  main()
