"""Prompt datasets, prepared once as TFDS datasets on array_record and read without TensorFlow.

    load_prompts(name, path, split)[i] -> Prompt(text, metadata)

TFDS 4.9 writes and reads array_record in pure Python as long as nothing touches its `tf` stand-in:
a GeneratorBasedBuilder of our own does not (tfds.dataset_builders.store_as_tfds_dataset does), and
`as_data_source` gives random access, which is what index arithmetic over epochs needs.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from typing import NamedTuple

import numpy as np

from tpgrpo_jax import caches, registry
from tpgrpo_jax.data import geneval, shapes, words
from tpgrpo_jax.types import Prompt

SPLITS = ("train", "test")
BUILT_IN_WORDS = {"train": 20_000, "test": 1024}  # distinct words in each split
BUILT_IN_SHAPES = {"train": 3000, "test": 1026}  # prompts, every kind as often as another
_LAYOUT = "1"  # change it when prepared datasets of older code must not be read


class _Source(NamedTuple):
  """The unread prompts of one split: `parse(content, where)` gives them, `where` names the file."""

  where: str
  content: bytes
  parse: Callable[[bytes, str], list[Prompt]]


def load_prompts(
  name: str, path: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> Sequence[Prompt]:
  """Opens one split of a prompt dataset, which is prepared first if it is new or has changed.

  Args:
    name: "words", the built-in task (the prompt is the word, metadata {"text": word}); "shapes", the
      other one (data/shapes.py, GenEval's metadata); "geneval"; or "folder".
    path: of "geneval": a folder with train_metadata.jsonl and test_metadata.jsonl, as Flow-GRPO publishes
      them, or one file of metadata, as GenEval does. No prompt of `test` is in `train`, and none is in
      `test` twice; of one file a fifth of each tag's prompts is held out. Of "folder": where train.* and
      test.* lie, in the forms that `FILES` lists. A line of a .txt file is a prompt, and blank lines are
      skipped; a line of a .jsonl file is an object whose "prompt" is the prompt and whose other members
      are its metadata.
    split: "train" or "test".
    data_dir: where prepared datasets are kept; by default $TFDS_DATA_DIR, else tpgrpo_jax in the
      user's cache folder. Any number of processes may share it.

  Returns:
    A sequence in the order of the file; indexing reads one record from disk.

  Raises:
    ValueError: an unknown name or split, a path that is no folder, a split without a file or with
      two, an empty file, a line that does not hold a prompt, or metadata that is not GenEval's.
  """
  registry.check(name, PROMPT_SOURCES, field="prompts.name")
  registry.check(split, SPLITS, field="split")
  sources = PROMPT_SOURCES[name](path)
  if split not in sources:
    wanted = (f"{split}_metadata.jsonl",) if name == "geneval" else FILES[split]
    raise ValueError(
      f"prompts.path={path!r}: holds no {split} prompts. Add one of {', '.join(wanted)}."
    )
  root = pathlib.Path(data_dir) if data_dir else _default_data_dir()
  folder = root / f"prompts-{name}-{_digest(sources)}"
  if not folder.exists():
    with caches.writing("prompts", root, "prompts.cache"):
      _prepare(sources, folder)
  return _Prompts(folder, split)


def _check_no_path(name, path):
  if path:
    raise ValueError(
      f"prompts.path={path!r}: prompts.name={name!r} reads no files. Set prompts.path='', or "
      "prompts.name='folder'."
    )


def _word_sources(path: str) -> dict[str, _Source]:
  _check_no_path("words", path)
  sources = {}
  for split, count in BUILT_IN_WORDS.items():
    drawn = words.sample_distinct_words(np.random.default_rng(0), count, split=split)
    sources[split] = _Source(f"words {split}", "\n".join(drawn).encode(), _parse_words)
  return sources


def _shape_sources(path: str) -> dict[str, _Source]:
  _check_no_path("shapes", path)
  sources = {}
  for split, count in BUILT_IN_SHAPES.items():
    lines = [json.dumps(row) for row in shapes.task_prompts(split, count)]
    sources[split] = _Source(f"shapes {split}", "\n".join(lines).encode(), _parse_jsonl)
  return sources


def _folder_sources(path: str) -> dict[str, _Source]:
  folder = pathlib.Path(path).expanduser()
  if not path or not folder.is_dir():
    raise ValueError(
      f"prompts.path={path!r}: must be a folder when prompts.name='folder'. Point it at one that "
      f"holds {FILES['train'][0]} and {FILES['test'][0]} (or .jsonl)."
    )
  sources = {}
  for split, names in FILES.items():
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
      raise ValueError(
        f"prompts.path={path!r}: holds {' and '.join(f.name for f in found)}; a split must have "
        "one file. Remove or rename the others."
      )
    for file in found:
      sources[split] = _Source(str(file), file.read_bytes(), _parser(file))
  if not sources:
    looked_for = ", ".join(name for names in FILES.values() for name in names)
    raise ValueError(
      f"prompts.path={path!r}: holds no prompts. Looked for {looked_for}: add at least one."
    )
  return sources


def _geneval_sources(path: str) -> dict[str, _Source]:
  """Flow-GRPO's pair of files, or the parts of one file."""
  given = pathlib.Path(path).expanduser()
  read = lambda file: _parse_geneval(file.read_bytes(), str(file))
  if given.is_file():
    train, test = geneval.hold_out(read(given))
    return {"train": _geneval_source(given, train), "test": _geneval_source(given, test)}
  files = {split: given / f"{split}_metadata.jsonl" for split in SPLITS}
  found = {split: read(file) for split, file in files.items() if path and file.is_file()}
  if not found:
    raise ValueError(
      f"prompts.path={path!r}: must be a folder with {' and '.join(f.name for f in files.values())} when "
      "prompts.name='geneval', or one file of metadata such as evaluation_metadata.jsonl."
    )
  if "test" in found:
    found["test"] = geneval.distinct(found["test"])
    held_out = {prompt.text for prompt in found["test"]}
    found = {
      split: rows if split == "test" else [row for row in rows if row.text not in held_out]
      for split, rows in found.items()
    }
  return {split: _geneval_source(files[split], rows) for split, rows in found.items()}


def _geneval_source(file, rows) -> _Source:
  if not rows:
    raise ValueError(
      f"{file}: every prompt of it is held out. Give a train_metadata.jsonl with other prompts."
    )
  lines = [json.dumps({"prompt": row.text, **row.metadata}) for row in rows]
  return _Source(str(file), "\n".join(lines).encode(), _parse_jsonl)


# The last form is what Flow-GRPO's datasets use for prompts with metadata.
FILES = {s: (f"{s}.txt", f"{s}.jsonl", f"{s}_metadata.jsonl") for s in SPLITS}
PROMPT_SOURCES: dict[str, Callable[[str], dict[str, _Source]]] = {
  "words": _word_sources,
  "shapes": _shape_sources,
  "geneval": _geneval_sources,
  "folder": _folder_sources,
}


_COLUMN = re.compile(r"(\w+_)?(prompts?|captions?|text)(_\w+)?")
_QUOTED = re.compile(r'"([^"]|"")*""([^"]|"")*"')  # of CSV: quotes within are doubled
_LIST = re.compile(r"\[\s*['\"]|(prompts?|captions?|texts?):\s*$", re.I)  # of Python or YAML


def read_file(path: pathlib.Path, where: str) -> list[Prompt]:
  """The prompts of a .jsonl file or, under any other name, of lines of text; see `load_prompts`.

  Args:
    path: of the file.
    where: what messages call it.

  Raises:
    ValueError: no such file, one in another form, or nothing in it.
  """
  if not path.is_file():
    raise ValueError(
      f"{where}: no such file. Give a text file, one prompt a line, or a .jsonl file."
    )
  return _parser(path)(path.read_bytes(), where)


def _parser(file):
  return _parse_jsonl if file.suffix == ".jsonl" else _parse_txt


def _parse_txt(content: bytes, where: str) -> list[Prompt]:
  lines = _lines(content, where, ends=r"\r\n|[\r\n\x85\u2028\u2029]")  # those of every system
  first = lines[0][1]
  fix = 'Write one prompt a line, or one object such as {"prompt": "a red bird"} a line in a .jsonl file'
  try:
    is_json = isinstance(json.loads(first), dict | list)
  except ValueError:
    is_json = re.match(r"\[?\s*\{\s*[\"']|[\[{]+\s*$", first) is not None
  if is_json:
    raise ValueError(f"{where}: holds JSON, and its lines would be the prompts. {fix}.")
  if _LIST.match(first):
    raise ValueError(
      f"{where}: holds a list of Python or YAML (its first line is {first[:60]!r}), and its lines would be "
      f"the prompts. {fix}."
    )
  cells = [cell.strip().strip('"').lower() for cell in re.split(r"[,;\t]", first)]
  is_header = any(map(_COLUMN.fullmatch, cells)) and all(re.fullmatch(r"[\w ]*", c) for c in cells)
  if _QUOTED.fullmatch(first) or is_header and (len(cells) > 1 or first.lower() != "text"):
    raise ValueError(
      f"{where}: is a table (its first line is {first[:60]!r}), and its lines would be the prompts. {fix}."
    )
  return [Prompt(line, {}) for _, line in lines]


def _parse_words(content: bytes, where: str) -> list[Prompt]:
  return [Prompt(line, {"text": line}) for _, line in _lines(content, where)]


def _parse_jsonl(content: bytes, where: str) -> list[Prompt]:
  prompts = []
  for number, line in _lines(content, where):
    try:
      row = json.loads(line)
      json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
      raise ValueError(
        f"{where}:{number}: is not JSON ({error}). Write one object a line, such as "
        '{"prompt": "a red bird"}.'
      ) from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
      raise ValueError(
        f'{where}:{number}: must be an object whose "prompt" is a text that is not empty, is '
        f"{line[:80]!r}. Add the prompt, or remove the line."
      )
    prompts.append(Prompt(text.strip(), {k: v for k, v in row.items() if k != "prompt"}))
  return prompts


def _parse_geneval(content: bytes, where: str) -> list[Prompt]:
  """As `_parse_jsonl`, of metadata that GenEval's detector and rules can judge."""
  prompts = _parse_jsonl(content, where)
  for (number, _), prompt in zip(_lines(content, where), prompts, strict=True):
    try:
      geneval.check_metadata(prompt.text, prompt.metadata)
      geneval.check_names(prompt.text, prompt.metadata)
    except ValueError as error:
      raise ValueError(f"{where}:{number}: {error}") from error
  return prompts


def _lines(content: bytes, where: str, ends: str = r"\r\n|[\r\n]") -> list[tuple[int, str]]:
  """(line number, stripped line) of every line that is not blank; `ends` is the pattern of a line's end."""
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: is not UTF-8 ({error}). Save it as UTF-8.") from error
  # Not str.splitlines: it also breaks at characters that may stand inside a JSON string.
  numbered = [(n, line.strip()) for n, line in enumerate(re.split(ends, text), start=1)]
  numbered = [(n, line) for n, line in numbered if line]
  if not numbered:
    raise ValueError(f"{where}: holds no prompts. Write one a line, or remove the file.")
  return numbered


def _default_data_dir() -> pathlib.Path:
  return caches.place("", variable="TFDS_DATA_DIR")


def _digest(sources: Mapping[str, _Source]) -> str:
  """Of what a prepared dataset depends on: the sources' bytes, how they are read, the layout."""
  parts = [_LAYOUT]
  for split, source in sorted(sources.items()):
    content = hashlib.sha256(source.content).hexdigest()
    parts += [split, source.parse.__name__, content]
  return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _prepare(sources: Mapping[str, _Source], folder: pathlib.Path) -> None:
  """Writes the TFDS dataset `folder`, all of it or nothing.

  Every process writes to a folder of its own and renames it at the end. The name of the result
  says what is in it, so whoever comes second throws the own copy away.
  """
  examples = {split: s.parse(s.content, s.where) for split, s in sources.items()}
  caches.check_writable("prompts", folder.parent, "prompts.cache")
  staging = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
  try:
    written = _write_tfds(examples, staging)
    try:
      written.rename(folder)
    except OSError:
      if not folder.exists():
        raise
  finally:
    shutil.rmtree(staging, ignore_errors=True)


def _write_tfds(examples: Mapping[str, Sequence[Prompt]], staging: str) -> pathlib.Path:
  import tensorflow_datasets as tfds

  class Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prompts, with their metadata as JSON text."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS looks for checksums and notes beside a builder's code, and imports importlib_resources
    # for that without requiring it (4.9.10, Python >= 3.9). There are none here.
    code_path = None

    def _info(self):
      text = tfds.features.Text
      features = tfds.features.FeaturesDict({"prompt": text(), "metadata": text()})
      # Unshuffled: the first n prompts of a split are the first n of its file.
      return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(prompts) for split, prompts in examples.items()}

    def _generate_examples(self, prompts):
      for i, prompt in enumerate(prompts):
        yield i, {"prompt": prompt.text, "metadata": json.dumps(prompt.metadata)}

  tfds.disable_progress_bar()
  builder = Prompts(data_dir=staging, file_format="array_record")
  with contextlib.redirect_stdout(io.StringIO()):  # it prints where the staging folder was
    builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


class _Prompts(Sequence):
  """One split of a prepared dataset, held open.

  Attributes:
    identity: names what is in the dataset; other files give another one.
  """

  def __init__(self, folder: pathlib.Path, split: str):
    import tensorflow_datasets as tfds

    self.identity = folder.name

    builder = tfds.builder_from_directory(folder)
    self._rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Prompt:
    # range() knows negative indices and raises the IndexError that ends an iteration.
    row = self._rows[range(len(self._rows))[index]]
    return Prompt(row["prompt"].decode(), json.loads(row["metadata"]))
