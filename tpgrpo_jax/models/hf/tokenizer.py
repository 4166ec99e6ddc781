"""Tokenizers from the files that the hub stores."""

import os
import pathlib
from typing import Any

# kind -> (transformers' class, the sets of files of which a folder must hold one).
KINDS = {
  "clip": ("CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
  "bert": ("BertTokenizer", (("tokenizer.json",), ("vocab.txt",))),
  "t5": ("T5Tokenizer", (("tokenizer.json",), ("spiece.model",))),
  "qwen3": ("Qwen2Tokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
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
    ValueError: files that are missing or cannot be read; of "qwen3", no chat template, or one of another
      model.
  """
  import transformers

  class_name, choices = KINDS[kind]
  if not has_tokenizer(kind, folder):
    wanted = " or ".join(" and ".join(names) for names in choices)
    raise ValueError(
      f"{str(folder)!r}: no {wanted} in it. Point it at a complete folder of the hub."
    )
  try:
    tokenizer = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
  except Exception as error:  # the tokenizers package raises bare Exceptions
    raise ValueError(f"{folder}: not a readable tokenizer ({error}). Fetch it again.") from error
  if tokenizer.pad_token_id is None:
    raise ValueError(
      f"{str(folder)!r}: pad_token={tokenizer.pad_token!r}: must be a token that fills up short prompts. "
      "Fetch the tokenizer again."
    )
  if kind == "qwen3":
    _check_chat(tokenizer, folder)
  return tokenizer


def render_chat(tokenizer: Any, prompt: str, *, thinking: bool) -> str:
  """The prompt as the user's turn of a chat, and the beginning of the answer.

  Args:
    tokenizer: with a chat template of Qwen3.
    prompt: of one image.
    thinking: False begins the answer behind an empty thought.
  """
  return tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    tokenize=False,
    add_generation_prompt=True,
    enable_thinking=thinking,
  )


def _check_chat(tokenizer, folder):
  """Raises ValueError unless there is a chat template that knows whether to think, as Qwen3's does."""
  if tokenizer.padding_side != "right":
    raise ValueError(
      f"{str(folder)!r}: padding_side={tokenizer.padding_side!r}: must be 'right', as the pipelines have it. "
      "Fetch the tokenizer again."
    )
  if not tokenizer.chat_template:
    raise ValueError(
      f"{str(folder)!r}: no chat template in it (chat_template.jinja, or a field of "
      "tokenizer_config.json). Point it at a complete folder of the hub."
    )
  asked = "a red circle"
  try:
    thoughtful, thoughtless = (render_chat(tokenizer, asked, thinking=t) for t in (True, False))
  except Exception as error:  # whatever the template's language or the template itself raises
    raise ValueError(
      f"{str(folder)!r}: its chat template cannot be used ({type(error).__name__}: {error}). Fetch the "
      "tokenizer of the pipeline again."
    ) from error
  if asked not in thoughtful or asked not in thoughtless:
    raise ValueError(
      f"{str(folder)!r}: its chat template leaves the prompt out. Fetch the tokenizer of the pipeline again."
    )
  if thoughtful == thoughtless:
    raise ValueError(
      f"{str(folder)!r}: its chat template knows no enable_thinking, so it is not Qwen3's (that of Qwen2 "
      "knows none). Fetch the tokenizer of the pipeline again."
    )
