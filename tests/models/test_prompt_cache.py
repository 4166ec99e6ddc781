"""Prompt embeddings are computed once and kept on disk, and the encoders do not stay."""

import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored_pipelines import GOLDEN, assert_equal, write_pipeline

from tpgrpo_jax.models import prompt_cache, prompt_embedding
from tpgrpo_jax.models.hf import files as hf_files
from tpgrpo_jax.models.prompt_embedding import TextSource

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "prompt_embedding.npz")


@pytest.fixture(scope="module")
def prompts(golden):
  return json.loads(str(golden["prompts"]))


@pytest.fixture(scope="module")
def stored(golden, tmp_path_factory):
  """The golden SD3 pipeline's folder, for reading only."""
  return write_pipeline(golden, "sd3", tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def folder(stored, tmp_path):
  """A copy that a test may break."""
  return pathlib.Path(shutil.copytree(stored, tmp_path / "pipeline"))


def refuse_to_load(*_, **__):
  raise AssertionError("the text encoders were loaded")


def embed_prompts(stored, prompts, cache, **options):
  source = TextSource(stored, "sd3", 20, **options)
  return prompt_cache.embed_prompts(source, prompts, cache=cache)


@pytest.fixture(scope="module")
def filled(stored, prompts, tmp_path_factory):
  """A cache of all prompts but the first; nothing may change it."""
  folder = tmp_path_factory.mktemp("cache")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    assert embed_prompts(stored, prompts[1:], folder).computed == 3
  return folder


@pytest.fixture
def cache(filled, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(filled, tmp_path / "cache"))


def test_cached_embeddings_are_those_computed(golden, stored, cache, prompts):
  embedded = embed_prompts(stored, prompts, cache)
  assert_equal(embedded.embed(prompts), golden["sd3/text"], golden["sd3/pooled"])
  order = [2, 0, 2]  # of the asking, not of the set
  found = embedded.embed([prompts[i] for i in order])
  assert_equal(found, golden["sd3/text"][order], golden["sd3/pooled"][order])


def test_nothing_is_loaded_when_nothing_is_missing(stored, cache, prompts, monkeypatch):
  monkeypatch.setattr(prompt_embedding, "load_text_encoders", refuse_to_load)
  embedded = embed_prompts(stored, [*prompts[1:], prompts[1]], cache)
  assert embedded.computed == 0
  assert embedded.embed(prompts[2:]).text.shape == (2, 33, 32)


def test_only_new_prompts_are_computed(stored, cache, prompts):
  assert embed_prompts(stored, prompts, cache).computed == 1


def test_truncated_prompts_are_counted_and_warned_about_once_from_the_cache_too(
  stored, cache, prompts
):
  with pytest.warns(UserWarning, match="1 of 2 prompts have more than the 13 tokens") as caught:
    embedded = embed_prompts(stored, prompts[1:], cache)
  assert embedded.computed == 0
  assert len(caught) == 3
  assert embedded.truncated == {"text_encoder": 1, "text_encoder_2": 1, "text_encoder_3": 1}


def test_damaged_cache_file_is_computed_again(stored, cache, prompts):
  path = sorted(cache.rglob("*.safetensors"))[0]
  whole = path.read_bytes()
  path.write_bytes(whole[:-10])
  assert embed_prompts(stored, prompts[1:], cache).computed == 1
  assert path.read_bytes() == whole


def test_encoders_are_freed_after_filling_the_cache(stored, tmp_path):
  before = {id(array) for array in jax.live_arrays()}
  embed_prompts(stored, ["on the house"], tmp_path)
  after = [array for array in jax.live_arrays() if id(array) not in before]
  assert sum(array.size for array in after) < 100


def test_cached_bfloat16_keeps_its_dtype(stored, tmp_path):
  embedded = embed_prompts(stored, ["a cat"], tmp_path, dtype="bfloat16")
  assert embedded.embed(["a cat"]).text.dtype == jnp.bfloat16


def test_prompt_that_was_not_embedded_is_refused_by_name(stored, cache, prompts):
  embedded = embed_prompts(stored, prompts[1:], cache)
  with pytest.raises(ValueError, match="prompt 'another': its embedding is not in"):
    embedded.embed(["another"])


def test_identity_is_that_of_a_copy_and_of_nothing_else(stored, folder):
  source = TextSource(folder, "sd3", 20)
  own = prompt_cache.identity(source)
  assert own == prompt_cache.identity(TextSource(stored, "sd3", 20))
  others = [
    prompt_cache.identity(TextSource(folder, "sd3", 20, **{option: value}))
    for option, value in (("dtype", "bfloat16"), ("use_t5", False))
  ] + [prompt_cache.identity(TextSource(folder, "sd3"))]
  for name in ("text_encoder_2/model.safetensors", "tokenizer/merges.txt"):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    others.append(prompt_cache.identity(source))
  assert len({own, *others}) == 6


def test_identity_samples_large_files(folder, monkeypatch):
  monkeypatch.setattr(hf_files, "STRIDE", 1000)
  monkeypatch.setattr(hf_files, "SAMPLE", 100)
  source, path = TextSource(folder, "sd3", 20), folder / "text_encoder/model.safetensors"
  own = prompt_cache.identity(source)
  content = bytearray(path.read_bytes())
  content[2050] ^= 1
  path.write_bytes(content)
  assert prompt_cache.identity(source) != own
