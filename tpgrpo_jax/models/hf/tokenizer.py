"""Tokenizers from the files that the hub stores."""

import os
import pathlib
from typing import Any

# kind -> (transformers' class, the sets of files of which a folder must hold one).
KINDS = {
  "clip": ("CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
  "t5": ("T5Tokenizer", (("tokenizer.json",), ("spiece.model",))),
}


def has_tokenizer(kind: str, folder: str | os.PathLike[str]) -> bool:
  """Whether a folder holds the files of a tokenizer of this kind."""
  root = pathlib.Path(folder)
  return any(all((root / name).is_file() for name in names) for names in KINDS[kind][1])


def load_tokenizer(kind: str, folder: str | os.PathLike[str]) -> Any:
  """Loads a tokenizer of transformers from a folder.

  Args:
    kind: a name of KINDS.
    folder: holds its files.

  Raises:
    ValueError: files that are missing or cannot be read.
  """
  import transformers

  class_name, choices = KINDS[kind]
  if not has_tokenizer(kind, folder):
    wanted = " or ".join(" and ".join(names) for names in choices)
    raise ValueError(
      f"{str(folder)!r}: no {wanted} in it. Point it at a complete folder of the hub."
    )
  try:
    return getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
  except Exception as error:  # the tokenizers package raises bare Exceptions
    raise ValueError(f"{folder}: not a readable tokenizer ({error}). Fetch it again.") from error
