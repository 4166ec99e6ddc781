"""Prompt embeddings are those of diffusers' pipelines, computed once, and kept on disk."""

import importlib.util
import json
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored_pipelines import GOLDEN, LENGTHS, assert_equal, write_pipeline

from tpgrpo_jax.models import prompt_embedding
from tpgrpo_jax.models.prompt_embedding import TextSource

SCRIPT = GOLDEN / "make_prompt_embedding.py"

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")


@pytest.fixture(scope="module")
def golden():
  return np.load(GOLDEN / "prompt_embedding.npz")


@pytest.fixture(scope="module")
def prompts(golden):
  return json.loads(str(golden["prompts"]))


@pytest.fixture(scope="module")
def stored(golden, tmp_path_factory):
  """{family: its golden pipeline's folder}, for reading only."""
  return {f: write_pipeline(golden, f, tmp_path_factory.mktemp(f)) for f in LENGTHS}


@pytest.fixture
def folder(stored, tmp_path):
  """A copy of the SD3 pipeline that a test may break."""
  return pathlib.Path(shutil.copytree(stored["sd3"], tmp_path / "pipeline"))


@pytest.fixture(scope="module")
def sd3(stored):
  """The opened SD3 encoders."""
  with prompt_embedding.load_text_encoders(TextSource(stored["sd3"], "sd3", 20)) as encoders:
    yield encoders


def edit_json(path, **fields):
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("family", LENGTHS)
def test_embeddings_equal_those_of_the_diffusers_pipeline(golden, stored, prompts, family):
  source = TextSource(stored[family], family, LENGTHS[family])
  with prompt_embedding.load_text_encoders(source) as encoders:
    found = encoders.embed(prompts)
  assert_equal(found, golden[f"{family}/text"], golden[f"{family}/pooled"])


def test_golden_data_were_made_by_the_script_beside_them(golden):
  assert str(golden["script"]) == SCRIPT.read_text()


def test_the_empty_prompt_is_the_pipelines_negative_one(golden, sd3):
  found = sd3.embed([""])
  assert_equal(found, golden["sd3/negative_text"][:1], golden["sd3/negative_pooled"][:1])


def test_t5_left_out_is_zeros_as_in_diffusers(golden, stored, prompts):
  source = TextSource(stored["sd3"], "sd3", 20, use_t5=False)
  with prompt_embedding.load_text_encoders(source) as encoders:
    found = encoders.embed(prompts)
  assert_equal(found, golden["sd3/text_without_t5"], golden["sd3/pooled"])


def test_t5_that_the_folder_never_had_is_zeros(golden, folder, prompts):
  edit_json(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
  shutil.rmtree(folder / "text_encoder_3")
  shutil.rmtree(folder / "tokenizer_3")
  with prompt_embedding.load_text_encoders(TextSource(folder, "sd3", 20)) as encoders:
    found = encoders.embed(prompts)
  assert_equal(found, golden["sd3/text_without_t5"], golden["sd3/pooled"])


def test_embedding_does_not_depend_on_the_size_of_the_batch(golden, sd3, prompts):
  found = sd3.embed(prompts, batch_size=3)
  assert_equal(found, golden["sd3/text"], golden["sd3/pooled"])


def test_embedding_has_the_same_bits_whichever_prompts_are_beside_it(sd3, prompts):
  alone, among = sd3.embed([prompts[2]]), sd3.embed(prompts * 3)
  np.testing.assert_array_equal(alone.text[0], among.text[2])
  np.testing.assert_array_equal(alone.pooled[0], among.pooled[10])


def test_prompts_beyond_a_limit_are_warned_about_and_counted(stored, prompts):
  source = TextSource(stored["sd3"], "sd3", 20)
  with prompt_embedding.load_text_encoders(source) as encoders:
    with pytest.warns(UserWarning) as caught:
      encoders.embed(prompts)
    # By the tokenizers: 5, 2, 13 and 22 CLIP tokens; 4, 1, 19 and more than 20 of T5.
    counts = {name: 1 for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    assert [counts[n] for n in encoders.truncated] == list(encoders.truncated.values())
    assert str(caught[0].message) == (
      "1 of 4 prompts have more than the 13 tokens that text_encoder reads: it does not see their end."
    )
    assert "the 20 tokens that text_encoder_3 reads" in str(caught[2].message)
    encoders.embed([prompts[3], prompts[0]])
    assert encoders.truncated == {"text_encoder": 2, "text_encoder_2": 2, "text_encoder_3": 2}


def test_prompts_within_the_limits_are_not_warned_about(sd3, prompts):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    sd3.embed(prompts[:2])


def test_a_cut_prompt_embeds_as_its_beginning(sd3):
  words = ["red"] * 30
  long, longer = sd3.embed([" ".join(words), " ".join(words + ["cat"])]).text
  np.testing.assert_array_equal(long, longer)


def test_bfloat16_embeddings_are_near_the_float32_ones(golden, stored, prompts):
  source = TextSource(stored["flux"], "flux", 24, dtype="bfloat16")
  with prompt_embedding.load_text_encoders(source) as encoders:
    found = encoders.embed(prompts)
  assert found.text.dtype == found.pooled.dtype == jnp.bfloat16
  # Eight bits of mantissa, 2^-9 = 0.2 % a rounding, through some twenty roundings.
  assert_equal(found, golden["flux/text"], golden["flux/pooled"], 0.05)


def mesh_shardings(tree):
  """Kernels divided along their second-to-last axis over four of eight devices."""
  kinds = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=kinds)

  def place(leaf):
    spec = [None] * leaf.ndim
    if leaf.ndim > 1 and leaf.shape[-2] % 4 == 0:
      spec[-2] = "fsdp"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

  return jax.tree.map(place, tree)


@pytest.mark.parametrize("shardings", [mesh_shardings, prompt_embedding.on_cpu])
def test_embedding_does_not_depend_on_where_the_weights_are(golden, stored, prompts, shardings):
  source = TextSource(stored["flux"], "flux", 24)
  with prompt_embedding.load_text_encoders(source, shardings=shardings) as encoders:
    found = encoders.embed(prompts[:3])
  assert_equal(found, golden["flux/text"][:3], golden["flux/pooled"][:3])


def test_closed_encoders_hold_no_device_memory(stored):
  before = {id(array) for array in jax.live_arrays()}
  encoders = prompt_embedding.load_text_encoders(TextSource(stored["flux"], "flux", 24))
  encoders.embed(["a cat"])
  during = [array for array in jax.live_arrays() if id(array) not in before]
  assert sum(array.size for array in during) > 10_000
  encoders.close()
  after = [array for array in jax.live_arrays() if id(array) not in before]
  assert sum(array.size for array in after) < 100
  with pytest.raises(ValueError, match="are closed"):
    encoders.embed(["a cat"])


# Bad input.


@pytest.mark.parametrize(
  "options, rule",
  [
    (dict(family="sd33"), "Did you mean 'sd3'"),
    (dict(dtype="float16"), "dtype='float16'"),
    (dict(max_sequence_length=513), "max_sequence_length=513: must be 1 to 512"),
    (dict(family="flux", use_t5=False), "FLUX reads nothing but T5"),
  ],
)
def test_source_that_makes_no_sense_is_refused(options, rule):
  with pytest.raises(ValueError, match=rule):
    TextSource(**({"folder": "f", "family": "sd3"} | options))


def test_default_lengths_are_the_pipelines_own():
  assert (TextSource("f", "sd3").length, TextSource("f", "flux").length) == (256, 512)


@pytest.mark.parametrize(
  "missing, rule",
  [
    ("model_index.json", "no model_index.json in it"),
    ("text_encoder_2/config.json", "no config.json in it"),
    ("text_encoder_3/model.safetensors", "no model.safetensors in it"),
    ("tokenizer/merges.txt", "no tokenizer.json or vocab.json and merges.txt in it"),
    ("tokenizer_3/tokenizer.json", "no tokenizer.json or spiece.model in it"),
  ],
)
def test_partial_folder_is_refused_with_what_it_lacks(folder, missing, rule):
  (folder / missing).unlink()
  with pytest.raises(ValueError, match=rule) as caught:
    prompt_embedding.load_text_encoders(TextSource(folder, "sd3"))
  assert str((folder / missing).parent) in str(caught.value)


def test_pipeline_of_another_family_is_refused(stored):
  with pytest.raises(ValueError, match="holds a StableDiffusion3Pipeline, but family='flux'"):
    prompt_embedding.load_text_encoders(TextSource(stored["sd3"], "flux"))


def test_tokenizer_of_another_model_is_refused(folder):
  shutil.copytree(folder / "tokenizer", folder / "tokenizer_3", dirs_exist_ok=True)
  vocab = json.loads((folder / "tokenizer/vocab.json").read_text())
  vocab["<|endoftext|>"] = 5000
  (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab))
  with prompt_embedding.load_text_encoders(TextSource(folder, "sd3")) as encoders:
    with pytest.raises(
      ValueError, match="text_encoder: its tokenizer gives id 5000, but vocab_size"
    ):
      encoders.embed(["a cat"])


def test_no_prompts_are_refused(sd3):
  with pytest.raises(ValueError, match="must be at least one"):
    sd3.embed([])


# Live.


@pytest.fixture(scope="module")
def script():
  pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  spec = importlib.util.spec_from_file_location("make_prompt_embedding", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parity
@pytest.mark.parametrize("length", [5, 77, 256])
def test_sd3_embeddings_equal_live_diffusers(script, length, tmp_path):
  script.torch.manual_seed(length)
  pipe = script.sd3_pipeline(tmp_path)
  wanted = script.encode_sd3(pipe, script.PROMPTS, length)
  source = TextSource(tmp_path, "sd3", length)
  with prompt_embedding.load_text_encoders(source) as encoders:
    assert_equal(encoders.embed(script.PROMPTS), *wanted[:2])
    assert_equal(encoders.embed([""] * 4), *wanted[2:])


@pytest.mark.parity
def test_sd3_embeddings_without_t5_equal_live_diffusers(script, tmp_path):
  pipe = script.sd3_pipeline(tmp_path, with_t5=False)
  wanted = script.encode_sd3(pipe, script.PROMPTS, 30)
  with prompt_embedding.load_text_encoders(TextSource(tmp_path, "sd3", 30)) as encoders:
    assert_equal(encoders.embed(script.PROMPTS), *wanted[:2])


@pytest.mark.parity
@pytest.mark.parametrize("length", [7, 256, 512])
def test_flux_embeddings_equal_live_diffusers(script, length, tmp_path):
  script.torch.manual_seed(length)
  pipe = script.flux_pipeline(tmp_path)
  wanted = script.encode_flux(pipe, script.PROMPTS, length)
  with prompt_embedding.load_text_encoders(TextSource(tmp_path, "flux", length)) as encoders:
    assert_equal(encoders.embed(script.PROMPTS), *wanted)
