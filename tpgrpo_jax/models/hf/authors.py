"""Adapters under the names of a model's authors, as kohya, ai-toolkit and ComfyUI write them.

Where the authors have one matrix for what diffusers splits (queries, keys, values), an adapter of it is one
of each: A is theirs together, and B has its own rows for each.
"""

from collections.abc import Mapping, Sequence
import re
from typing import NamedTuple

import numpy as np

_PREFIXES = (
  r"^(base_model\.model\.)?"
  r"(lora_unet_|lora_transformer_|transformer\.|(model\.)?diffusion_model\.)?"
)
_ENDING = r"(.*)\.((?:lora_A|lora_B|lora[._]down|lora[._]up)(?:\.default)?\.weight|alpha)$"
_ADAPTER = r"(?:^|(?<=\.))default\."  # what PEFT calls an adapter, anywhere in a tensor's name


class Rename(NamedTuple):
  """One kind of module.

  Attributes:
    pattern: of the authors' name, with `\\.` between its parts (kohya has "_" there).
    names: diffusers' names; more than one where the authors fuse them.
    shares: of the rows of B, for each of the names; () is even.
  """

  pattern: str
  names: tuple[str, ...]
  shares: tuple[int, ...] = ()


def plain(name: str) -> str:
  """A tensor's name without what other programs put into it.

  Before it: "diffusion_model.", torch.compile's "_orig_mod."; anywhere: "default.", PEFT's adapter.
  """
  return re.sub(_PREFIXES, "", re.sub(_ADAPTER, "", name.replace("_orig_mod.", "")))


def rename_adapters(
  found: Mapping[str, np.ndarray], renames: Sequence[Rename]
) -> dict[str, np.ndarray]:
  """Adapters under the authors' names -> the same under diffusers'; other names stay as they are.

  Of a module that the file has under both names, as Anime-Z writes, diffusers' is the one that is read.

  Args:
    found: tensors of a file by name.
    renames: the kinds of modules.
  """
  renamed: dict[str, np.ndarray] = {}
  modules: dict[str, dict[str, np.ndarray]] = {}
  direct: set[str] = set()
  for name, tensor in found.items():
    match = re.match(_ENDING, plain(name))
    if match and _kind(match[1], renames):
      modules.setdefault(match[1], {})[match[2]] = tensor
    else:
      renamed[name] = tensor
      direct.add(_flat(match[1] if match else name))
  for module, parts in modules.items():
    kind = _kind(module, renames)
    names = [re.sub(_either(kind.pattern), name, module) for name in kind.names]
    if any(_flat(name) in direct for name in names):
      continue
    for name, own in zip(names, _split(parts, kind)):
      renamed |= {f"{name}.{ending}": tensor for ending, tensor in own.items()}
  return renamed


def _flat(name):
  return name.replace(".", "_")


def _either(pattern):
  return pattern.replace(r"\.", "[._]")


def _kind(module, renames) -> Rename:
  return next((r for r in renames if re.match(_either(r.pattern), module)), None)  # pyright: ignore[reportReturnType]


def _split(parts, kind):
  """One dict of tensors for each of the names; raises nothing, misfits show by their shapes."""
  count, shares = len(kind.names), kind.shares or (1,) * len(kind.names)
  if count == 1:
    return [parts]
  side = {e: "b" for e in parts if e.startswith(("lora_B", "lora_up", "lora.up"))}
  side |= {e: "a" for e in parts if e.startswith(("lora_A", "lora_down", "lora.down"))}
  b = next((parts[e] for e in side if side[e] == "b"), None)
  if b is None:
    return [parts] * count
  bounds = np.cumsum([0, *shares]) * len(b) // sum(shares)
  rows = [slice(*pair) for pair in zip(bounds, bounds[1:])]
  rank = b.shape[1] // count
  # kohya may train one small adapter for each part, and write them as one of blocks (split_qkv).
  columns = [slice(i * rank, (i + 1) * rank) for i in range(count)]
  blocks = b.shape[1] % count == 0 and b.any()
  blocks = blocks and all(
    not b[rows[i], columns[j]].any() for i in range(count) for j in range(count) if i != j
  )
  if not blocks:
    columns = [slice(None)] * count

  def own(i):
    take = {
      "a": lambda x: x[columns[i]],
      "b": lambda x: x[rows[i], columns[i]],
      "": lambda x: x / count if blocks else x,  # alpha / rank stays
    }
    return {e: take[side.get(e, "")](x) for e, x in parts.items()}

  return [own(i) for i in range(count)]
