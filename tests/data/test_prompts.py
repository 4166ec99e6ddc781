import json
import pathlib
import subprocess
import sys

import pytest

from tpgrpo_jax.data import prompts, words
from tpgrpo_jax.types import Prompt

REPOSITORY = pathlib.Path(__file__).parents[2]
PUBLISHED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="module")
def word_cache(tmp_path_factory):
  return tmp_path_factory.mktemp("words")


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  return folder


@pytest.fixture
def load(source, tmp_path):
  def load(split="train", name="folder"):
    return prompts.load_prompts(name, str(source), split, data_dir=tmp_path / "cache")

  return load


def run_python(*lines):
  return subprocess.Popen(
    [sys.executable, "-c", "\n".join(lines)],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize(
  "split, count", [pytest.param("train", 20_000, marks=pytest.mark.slow), ("test", 1024)]
)
def test_built_in_words_are_distinct_and_of_their_split(word_cache, split, count):
  dataset = prompts.load_prompts("words", "", split, data_dir=word_cache)
  texts = [prompt.text for prompt in dataset]
  assert len(dataset) == len(set(texts)) == count
  assert {words.split_of(text) for text in texts} == {split}


def test_built_in_words_carry_their_text_as_metadata(word_cache):
  prompt = prompts.load_prompts("words", "", "test", data_dir=word_cache)[5]
  assert prompt.metadata == {"text": prompt.text}


def test_txt_gives_its_lines_in_order_without_blank_ones(source, load):
  (source / "train.txt").write_bytes('\ufeffa cat\r\n\n  \n a "dög" \nlast'.encode())
  assert list(load()) == [Prompt("a cat", {}), Prompt('a "dög"', {}), Prompt("last", {})]


@pytest.mark.parametrize("name", ["train.jsonl", "train_metadata.jsonl"])
def test_jsonl_passes_everything_but_the_prompt_on_as_metadata(source, load, name):
  row = {"prompt": "two cups", "include": [{"class": "cup", "count": 2}], "tag": None}
  (source / name).write_text(json.dumps(row) + "\n\n")
  metadata = {"include": [{"class": "cup", "count": 2}], "tag": None}
  assert list(load()) == [Prompt("two cups", metadata)]


def test_jsonl_lines_end_at_line_feeds_only(source, load):
  text = "a\u2028b"
  (source / "train.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False), "utf-8")
  assert [p.text for p in load()] == [text]


def test_prompts_are_indexed_like_a_list(source, load):
  (source / "train.txt").write_text("a\nb\nc\n")
  dataset = load()
  assert (len(dataset), dataset[-1].text, dataset[1].text) == (3, "c", "b")
  with pytest.raises(IndexError):
    dataset[3]


def test_a_changed_file_is_prepared_again(source, load):
  (source / "train.txt").write_text("old")
  assert load()[0].text == "old"
  (source / "train.txt").write_text("new")
  assert load()[0].text == "new"


def test_an_unchanged_file_is_prepared_once(source, load, monkeypatch):
  (source / "train.txt").write_text("a")
  load()
  monkeypatch.setattr(prompts, "_write_tfds", None)
  assert load()[0].text == "a"


def test_the_same_bytes_in_another_form_are_another_dataset(source, load):
  (source / "train.jsonl").write_text('{"prompt": "a"}')
  assert load()[0].text == "a"
  (source / "train.jsonl").rename(source / "train.txt")
  with pytest.raises(ValueError, match="holds JSON"):
    load()


@pytest.mark.parametrize(
  "content, part",
  [
    ('{"prompt": "a"}\n{"prompt": "b"}', "holds JSON"),
    ('[\n{"prompt": "a"}\n]', "holds JSON"),
    ('["a", "b"]', "holds JSON"),
    ("id,prompt\n1,a cat", "is a table (its first line is 'id,prompt')"),
    ('"Prompt";"Seed"\n"a cat";1', "is a table"),
    ("caption\tsource\na cat\tweb", "is a table"),
    ("prompt\na cat", "is a table"),
    (",prompt\n0,K7T", "is a table"),  # of pandas
    ('"","prompt"\n"0","a cat"', "is a table"),
    ("id,caption_text\n1,a cat", "is a table"),
    ('"a ""big"" dog"\n"a cat"', "is a table"),
    ("['a cat',\n'a dog']", "holds a list of Python or YAML"),
    ("prompts:\n- a cat", "holds a list of Python or YAML"),
  ],
)
def test_a_text_file_that_is_something_else_is_recognised(source, load, content, part):
  (source / "train.txt").write_text(content)
  with pytest.raises(ValueError) as caught:
    load()
  assert part in str(caught.value) and "one prompt a line" in str(caught.value)


@pytest.mark.parametrize("content", ["a cat, caption of a prompt\nb", "text\nb", "{braces}\nb"])
def test_prompts_that_look_a_little_like_something_else_are_prompts(source, load, content):
  (source / "train.txt").write_text(content)
  assert [p.text for p in load()] == content.splitlines()


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n", "\u2028", "\x85"])
def test_line_ends_of_every_system_end_a_line(source, load, end):
  (source / "train.txt").write_bytes(end.join(["a", "b", "c"]).encode())
  assert [p.text for p in load()] == ["a", "b", "c"]


@pytest.mark.slow
def test_processes_that_prepare_at_once_all_read_the_whole_dataset(source, tmp_path):
  (source / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(300)))
  cache = tmp_path / "cache"
  processes = [
    run_python(
      "from tpgrpo_jax.data import prompts",
      f"d = prompts.load_prompts('folder', {str(source)!r}, 'train', data_dir={str(cache)!r})",
      "assert [p.text for p in d] == [f'prompt {i}' for i in range(300)]",
    )
    for _ in range(3)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
  assert len(list(cache.iterdir())) == 1  # and no staging folder is left


def test_whoever_prepares_second_uses_what_the_first_left(source, load, tmp_path, monkeypatch):
  (source / "train.txt").write_text("a")
  write = prompts._write_tfds

  def write_after_a_rival(examples, staging):
    monkeypatch.setattr(prompts, "_write_tfds", write)
    load()
    return write(examples, staging)

  monkeypatch.setattr(prompts, "_write_tfds", write_after_a_rival)
  assert load()[0].text == "a"
  assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_preparation_that_fails_leaves_nothing_behind(source, load, tmp_path, monkeypatch):
  def fail(examples, staging):
    pathlib.Path(staging, "half").write_text("written")
    raise OSError("disk full")

  (source / "train.txt").write_text("a")
  monkeypatch.setattr(prompts, "_write_tfds", fail)
  with pytest.raises(ValueError, match="--config.prompts.cache=") as caught:
    load()
  assert "disk full" in str(caught.value)
  assert not list((tmp_path / "cache").iterdir())


def test_preparing_and_reading_loads_no_tensorflow_and_prints_nothing(source, tmp_path):
  (source / "test.txt").write_text("a")
  process = run_python(
    "import sys",
    "from tpgrpo_jax.data import prompts",
    "assert 'tensorflow_datasets' not in sys.modules",
    f"d = prompts.load_prompts('folder', {str(source)!r}, 'test', data_dir={str(tmp_path)!r})",
    "assert d[0].text == 'a'",
    "assert 'tensorflow' not in sys.modules",
  )
  output, errors = process.communicate(timeout=120)
  assert (process.returncode, output) == (0, ""), errors


@pytest.mark.parametrize(
  "variables, expected",
  [
    ({"TFDS_DATA_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
    ({"XDG_CACHE_HOME": "/b"}, "/b/tpgrpo_jax"),
    ({"HOME": "/c"}, "/c/.cache/tpgrpo_jax"),
  ],
)
def test_default_data_dir_follows_the_environment(monkeypatch, variables, expected):
  for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  assert prompts._default_data_dir() == pathlib.Path(expected)


def test_unknown_name_is_refused_with_the_nearest_one(load):
  with pytest.raises(ValueError, match="prompts.name='word'.*Did you mean 'words'"):
    load(name="word")


def test_unknown_split_is_refused(load):
  with pytest.raises(ValueError, match="split='validation'.*Choices: test, train"):
    load("validation")


def test_a_path_that_would_be_ignored_is_refused(load):
  with pytest.raises(ValueError, match="prompts.path=.*reads no files"):
    load(name="words")


@pytest.mark.parametrize("path", ["", "/no/such/folder"])
def test_a_path_that_is_no_folder_is_refused(path):
  with pytest.raises(ValueError, match=f"prompts.path='{path}': must be a folder"):
    prompts.load_prompts("folder", path, "train")


def test_a_folder_without_prompts_is_refused_with_the_names_looked_for(load):
  with pytest.raises(ValueError, match="train.txt, train.jsonl, train_metadata.jsonl, test.txt"):
    load()


def test_two_files_for_a_split_are_refused(source, load):
  (source / "train.txt").write_text("a")
  (source / "train.jsonl").write_text('{"prompt": "a"}')
  with pytest.raises(ValueError, match="train.txt and train.jsonl"):
    load()


def test_a_missing_train_file_matters_only_to_training(source, load):
  (source / "test.txt").write_text("a")
  assert load("test")[0].text == "a"
  with pytest.raises(ValueError, match="holds no train prompts. Add one of train.txt"):
    load("train")


@pytest.mark.parametrize("content", ["", "\n  \n"])
@pytest.mark.parametrize("name", ["train.txt", "train.jsonl"])
def test_an_empty_file_is_refused(source, load, name, content):
  (source / name).write_text(content)
  with pytest.raises(ValueError, match=f"{name}: holds no prompts"):
    load()


def test_a_file_that_is_not_utf8_is_refused(source, load):
  (source / "train.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match="train.txt: is not UTF-8"):
    load()


@pytest.mark.parametrize(
  "line, rule",
  [
    ('{"prompt": "a"', "is not JSON"),
    ('{"text": "a"}', "must be an object"),
    ('{"prompt": 3}', "must be an object"),
    ('{"prompt": " "}', "must be an object"),
    ('["a"]', "must be an object"),
  ],
)
def test_a_bad_jsonl_line_is_refused_with_its_number(source, load, line, rule):
  (source / "train.jsonl").write_text('{"prompt": "a"}\n\n' + line)
  with pytest.raises(ValueError, match=f"train.jsonl:3: {rule}"):
    load()


@pytest.mark.parametrize("name, key", [("geneval", "include"), ("ocr", None), ("drawbench", None)])
def test_published_prompts_are_read_unchanged(name, key, tmp_path):
  if not (PUBLISHED / name).is_dir():
    pytest.skip("the published prompt files are not here")
  dataset = prompts.load_prompts("folder", str(PUBLISHED / name), "test", data_dir=tmp_path)
  (file,) = (PUBLISHED / name).iterdir()
  lines = [line for line in file.read_text("utf-8").split("\n") if line.strip()]
  if key:
    rows = [json.loads(line) for line in lines]
    assert [{"prompt": p.text, **p.metadata} for p in dataset] == rows
  else:
    assert [p.text for p in dataset] == [line.strip() for line in lines]
