"""The bridge between frozen config dataclasses and ml_collections; imports no jax.

`to_config_dict` makes of a dataclass what recipes and the command line change; `from_config_dict` makes
of that a dataclass again, and checks names and types.
"""

import ast
import dataclasses
import os
import types
import typing
from typing import Any, TypeVar

import ml_collections

from tpgrpo_jax import registry

C = TypeVar("C")


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """A ConfigDict with the fields of a config dataclass, for a recipe to change."""
  tree = dataclasses.asdict(config)
  rewards = tree.pop("rewards", None)
  result = ml_collections.ConfigDict(tree)
  if rewards is not None:
    # Labels of rewards are data, not fields: a recipe or the command line may add and remove them.
    result.rewards = ml_collections.ConfigDict(rewards, allow_dotted_keys=True)
  return result


def from_config_dict(cls: type[C], tree: Any) -> C:
  """Builds the frozen dataclass `cls` from a ConfigDict (or nested dict), checking names and types.

  Raises:
    ValueError: an unknown key (with the nearest one) or a value of the wrong type.
  """
  if isinstance(tree, ml_collections.ConfigDict):
    tree = tree.to_dict()
  if not isinstance(tree, dict):
    raise ValueError(
      "--config: no recipe. Give the name of one that ships, such as --config tiny_text, or a Python file "
      "whose get_config() returns one."
    )
  return _build(cls, tree, prefix="")


def name_run(config: C) -> C:
  """The config whose run folder has its seed where it says "{seed}" (config.Run)."""
  run, seed = getattr(config, "run", None), getattr(config, "seed", 0)
  if run is None or "{seed}" not in run.dir:
    return config
  named = dataclasses.replace(run, dir=run.dir.replace("{seed}", f"_seed{seed}" if seed else ""))
  return dataclasses.replace(config, run=named)  # pyright: ignore[reportArgumentType, reportCallIssue]


def check_types(config: Any) -> None:
  """Checks the types of a config dataclass's fields, which its constructor does not.

  Raises:
    ValueError: as of `from_config_dict`.
  """
  _build(type(config), dataclasses.asdict(config), prefix="")


def check_key(cls: type, key: str) -> None:
  """Checks that a dotted key of the command line names a field of the dataclass `cls`.

  Raises:
    ValueError: no such field (with the nearest one), or a label below `rewards`: these are set all
      together.
  """
  hints, prefix = typing.get_type_hints(cls), ""
  for part in key.split("."):
    if prefix == "rewards.":
      raise ValueError(
        f"{key}: labels of rewards are set together on the command line, such as "
        """--config.rewards="{'ocr': 1.0, 'jpeg_compressibility': 0.1}"."""
      )
    if part not in hints:
      raise ValueError(f"{prefix}{part}: unknown config key.{registry.nearest(part, hints)}")
    prefix += f"{part}."
    hints = typing.get_type_hints(hints[part]) if dataclasses.is_dataclass(hints[part]) else {}


def check_once(field: str, text: str) -> None:
  """Checks that dicts on the command line name each key once; Python would keep the last and say nothing.

  Raises:
    ValueError: a key that stands twice.
  """
  try:
    nodes = [*ast.walk(ast.parse(text.strip(), mode="eval"))]
  except (SyntaxError, ValueError, MemoryError, RecursionError):
    return  # what is none is refused when it is read
  for node in nodes:
    keys = [key.value for key in getattr(node, "keys", ()) if isinstance(key, ast.Constant)]
    for key in keys:
      if keys.count(key) > 1:
        raise ValueError(f"{field}: has {key!r} twice. Name each once; give one another label.")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """Nested dicts as one, by dotted names; an empty dict within is a value."""
  if not isinstance(tree, dict) or (prefix and not tree):
    return {prefix[:-1]: tree}
  return {k: v for key in tree for k, v in flatten(tree[key], f"{prefix}{key}.").items()}


def _build(cls, tree, prefix):
  hints = typing.get_type_hints(cls)
  if not isinstance(tree, dict):
    raise ValueError(
      f"{prefix[:-1]}={tree!r}: must be a group of fields.{registry.nearest('', hints)}"
    )
  for key in tree:
    if key not in hints:
      raise ValueError(f"{prefix}{key}: unknown config key.{registry.nearest(key, hints)}")
  values = {key: _convert(hints[key], value, prefix + key) for key, value in tree.items()}
  return cls(**values)


def _convert(hint, value, field):
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, field + ".")
  origin = typing.get_origin(hint)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      example = f"({value!r},)" if isinstance(value, str) else "(0, 9)"
      raise ValueError(f"{field}={value!r}: must be a tuple, such as {field}={example}.")
    args = [a for a in typing.get_args(hint) if a is not Ellipsis]
    kinds = args * len(value) if Ellipsis in typing.get_args(hint) else args
    if len(kinds) != len(value):
      raise ValueError(f"{field}={value!r}: must have {len(kinds)} elements, has {len(value)}.")
    return tuple(_convert(kind, v, field) for kind, v in zip(kinds, value))
  if origin is dict or isinstance(hint, types.GenericAlias):
    if not isinstance(value, dict):
      raise ValueError(f"{field}={value!r}: must be a mapping, such as {{'ocr': 1.0}}.")
    return _expand_user(value)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint is str and isinstance(value, str) and value.startswith("~"):
    return os.path.expanduser(value)
  if type(value) is not hint:
    raise ValueError(f"{field}={value!r}: must be {hint.__name__}, is {type(value).__name__}.")
  return value


def _expand_user(tree):
  """A nested dict with "~" at the start of a string as a shell would have it."""
  if isinstance(tree, dict):
    return {key: _expand_user(value) for key, value in tree.items()}
  return os.path.expanduser(tree) if isinstance(tree, str) and tree.startswith("~") else tree
