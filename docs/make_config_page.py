"""Writes docs/config.md: every field of a run, from the docstrings of tpgrpo_jax/config.

python docs/make_config_page.py
"""

import pathlib

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import describe

PAGE = pathlib.Path(__file__).with_name("config.md")
HEAD = """# Every field

This page is made from the code (`python docs/make_config_page.py`). A recipe sets some of these fields.
Any can be set on the command line: `--config.sampler.num_steps=10`. The values here are the defaults of a
run, before a recipe. `tpgrpo train --help` prints the same.
"""


def make() -> str:
  """The page."""
  parts = [HEAD]
  for group in describe.groups(config_lib.Config):
    if not group.fields:
      continue
    parts.append(f"## {group.name or 'The run itself'}\n\n{_cell(group.text)}\n")
    parts.append("| field | default | what it is |\n| --- | --- | --- |")
    for field in group.fields:
      parts.append(f"| `{field.name}` | `{_cell(field.default)}` | {_cell(field.text)} |")
    parts.append("")
  return "\n".join(parts).rstrip() + "\n"


def _cell(text):
  return text.replace("|", "\\|")


if __name__ == "__main__":
  PAGE.write_text(make())
