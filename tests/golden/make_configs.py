"""Writes configs/: the config of every task, and what every method changes of it.

python tests/golden/make_configs.py

<task>.txt holds all fields of the task, one `dotted.field = repr(value)` a line, sorted;
<task>.<method>.txt the lines of `configs/<task>.py:<method>` that differ from the task's. Whoever changes a
default, a task or a method sees here which runs change with it.
"""

import dataclasses
import pathlib

from tpgrpo_jax.config import bridge, names, presets

FOLDER = pathlib.Path(__file__).with_name("configs")


def lines(config) -> list[str]:
  """One `field = value` for each field, sorted."""
  fields = bridge.flatten(dataclasses.asdict(config))
  return [f"{name} = {value!r}" for name, value in sorted(fields.items())]


def methods_of(task) -> list[str]:
  """The methods that go with a task."""
  of_latents = set(presets.TASKS[task]().rewards) <= set(names.LATENT_REWARDS)
  return [*presets.METHODS, *(presets.OF_LATENTS if of_latents else ())]


def make() -> dict[str, str]:
  """File name -> content."""
  files = {}
  for task in presets.TASKS:
    own = lines(presets.TASKS[task]())
    files[f"{task}.txt"] = own
    for method in methods_of(task):
      changed = lines(presets.recipe(task, method))
      files[f"{task}.{method}.txt"] = [line for line in changed if line not in own]
  return {name: "\n".join(content) + "\n" for name, content in files.items()}


if __name__ == "__main__":
  for path in FOLDER.glob("*.txt"):
    path.unlink()
  FOLDER.mkdir(exist_ok=True)
  for name, text in make().items():
    (FOLDER / name).write_text(text)
