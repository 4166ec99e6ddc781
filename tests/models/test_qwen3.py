"""Qwen3 computes what transformers' does, and prompts become what diffusers' pipelines make of them."""

import json
import pathlib
import shutil
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax.models import prompt_cache, prompt_embedding, qwen3
from tpgrpo_jax.models.hf import encoder, flatten
from tpgrpo_jax.models.hf import qwen3 as hf_qwen3
from tpgrpo_jax.models.text_source import TextSource

sys.path.append(str(pathlib.Path(__file__).parents[1] / "training"))
import stored_diffusers as stored

# Float32 sums over widths of 8 to 48, in another order than torch's, through up to 27 layers.
TOLERANCE = 1e-4
FAMILIES = stored.QWEN


@pytest.fixture(scope="module")
def golden():
  return stored.load()


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
  make = lambda family: stored.write_pipeline(golden, family, tmp_path_factory.mktemp(family))
  return {family: make(family) for family in FAMILIES}


def apply(loaded, ids, length):
  run = jax.jit(lambda weights, *inputs: nnx.merge(loaded.graphdef, weights)(*inputs))
  return run(loaded.weights, ids, length)


def relative_error(found, wanted):
  found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
  assert found.shape == wanted.shape
  return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_those_of_the_diffusers_pipeline(golden, folders, family, tmp_path):
  source = TextSource(folders[family], family, stored.LENGTHS[family])
  prompts = [*stored.prompts(golden, family), ""]
  embedded = prompt_cache.embed_prompts(source, prompts, cache=tmp_path)
  found = embedded.embed(prompts)
  length = golden[f"{family}/length"]
  is_token = np.arange(found.text.shape[1]) < length[:, None]
  wanted = golden[f"{family}/text"]
  assert relative_error(found.text[is_token], wanted[is_token]) < TOLERANCE
  assert found.pooled is None
  if family == "z_image":
    np.testing.assert_array_equal(found.length, length)
  else:
    assert found.length is None  # padding is read too
  again = prompt_cache.embed_prompts(source, prompts, cache=tmp_path)
  assert again.computed == 0
  np.testing.assert_array_equal(again.embed(prompts[1:]).text, found.text[1:])


def test_golden_data_were_made_by_the_script_beside_them(golden):
  script = stored.GOLDEN / "make_qwen_pipelines.py"
  assert str(golden["qwen_pipelines/script"]) == script.read_text()


@pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")
def test_what_was_asked_of_the_prompt_is_part_of_the_tokens(folders):
  source = TextSource(folders["flux2"], "flux2", 48)
  with prompt_embedding.load_text_encoders(source, shardings=prompt_embedding.on_cpu) as encoders:
    tokens = encoders.tokenize(["a red cat", "a red cat " * 20])
    (ids, length) = tokens.inputs["text_encoder"]
    text = encoders._opened[0].tokenizer.decode(ids[0][: length[0]])
  assert text == (
    "<|im_start|>user\na red cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
  )
  assert length[1] == 48 and [*tokens.cut] == [{}, {"text_encoder": 48}]


def small(transformers, **changes):
  sizes = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
  )  # fmt: skip
  return transformers.Qwen3Config(**sizes | changes)


def random_model(kind, config):
  import torch

  torch.manual_seed(0)
  model = kind(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
      parameter.copy_((parameter.ndim == 1) + scale * torch.randn_like(parameter))
  return model


def states_of(model, ids, length):
  import torch

  mask = torch.from_numpy(np.arange(ids.shape[1]) < length[:, None]).long()
  with torch.no_grad():
    ids = torch.from_numpy(ids)
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
  return [state.float().numpy() for state in found.hidden_states]


def draw_ids(config, tokens):
  ids = np.random.default_rng(0).integers(0, config.vocab_size, size=(3, tokens))
  return ids, np.asarray([tokens, 5, 1], np.int32)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["Qwen3Model", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("states", [(1, 3, 4), (-2,)])
def test_states_equal_live_transformers(kind, states, tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  theirs = random_model(getattr(transformers, kind), small(transformers))
  theirs.save_pretrained(tmp_path)
  inputs = draw_ids(theirs.config, 12)
  wanted = states_of(theirs, *inputs)
  wanted = np.concatenate([wanted[i] for i in states], axis=-1)
  assert relative_error(apply(hf_qwen3.load_qwen3(tmp_path, states), *inputs), wanted) < TOLERANCE


@pytest.mark.parity
def test_bfloat16_is_at_least_as_near_to_float32_as_transformers_own(tmp_path):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs = random_model(transformers.Qwen3Model, small(transformers, num_hidden_layers=9))
  theirs.to(torch.bfloat16).save_pretrained(tmp_path)
  inputs = draw_ids(theirs.config, 20)
  rounded, exact = (states_of(theirs.to(t), *inputs)[8] for t in (torch.bfloat16, torch.float32))
  loaded = hf_qwen3.load_qwen3(tmp_path, (8,), dtype=jnp.bfloat16)
  rms = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - exact))))
  assert rms(apply(loaded, *inputs)) <= 1.1 * rms(rounded)


# Of Qwen3-4B, but for the vocabulary and the number of layers.
TRUE_WIDTH = dict(
  vocab_size=1000, hidden_size=2560, intermediate_size=9728, num_attention_heads=32,
  num_key_value_heads=8, head_dim=128, num_hidden_layers=3,
)  # fmt: skip


@pytest.mark.parity
@pytest.mark.exhaustive
def test_states_of_the_true_width_equal_live_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("torch")
  theirs = random_model(transformers.Qwen3Model, small(transformers, **TRUE_WIDTH))
  theirs.save_pretrained(tmp_path)
  inputs = draw_ids(theirs.config, 40)
  wanted = states_of(theirs, *inputs)[2]
  assert relative_error(apply(hf_qwen3.load_qwen3(tmp_path, (2,)), *inputs), wanted) < TOLERANCE


@pytest.mark.parity
def test_every_tensor_that_qwen3_4b_needs_is_mapped_both_ways():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  sizes = TRUE_WIDTH | dict(vocab_size=151936, num_hidden_layers=36, tie_word_embeddings=True)
  with torch.device("meta"):
    model = transformers.Qwen3ForCausalLM(small(transformers, **sizes))
  theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
  assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.02e9, rel=0.01)
  config = qwen3.Qwen3Config.from_transformers(model.config.to_dict())
  create = lambda: qwen3.Qwen3Encoder(config, (9, 18, 27), rngs=nnx.Rngs(0))
  _, state = nnx.split(nnx.eval_shape(create))
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
  found = {e.name: e.shape for e in hf_qwen3.names(config, shapes)}
  needed = hf_qwen3.aliases(theirs, layers=27, of=36)
  assert found == {name: theirs[full] for name, full in needed.items()}
  assert len(found) == 1 + 27 * 11


# Bad input.


def edit(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(path):
  """The chat template, wherever it is."""
  for file in (path / "chat_template.jinja", path / "chat_template.json"):
    file.unlink(missing_ok=True)
  edit(path / "tokenizer_config.json", chat_template=None)


def divide(folder):
  """The weights in two shards, of which one is lost."""
  path = folder / encoder.WEIGHTS_FILE
  tensors = safetensors.numpy.load_file(path)
  path.unlink()
  shards = {"model-00001-of-00002.safetensors": [], "model-00002-of-00002.safetensors": []}
  for i, name in enumerate(tensors):
    shards[list(shards)[i % 2]].append(name)
  for shard, names in list(shards.items())[:1]:
    safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / shard)
  index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QWEN2_TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def change(name, **changes):
  return lambda folder: edit(folder / name, **changes)


def change_sizes(**changes):
  return change("text_encoder/config.json", **changes)


@pytest.mark.parametrize(
  "break_it, rule",
  [
    (change_sizes(model_type="qwen2"), "model_type='qwen2': must be 'qwen3'"),
    (change_sizes(use_sliding_window=True), "use_sliding_window=True: must be False"),
    (change_sizes(rope_parameters={"rope_type": "yarn"}), "must be of rope_type 'default'"),
    (change_sizes(num_hidden_layers=27), "the states after 9, 18, 27 layers, and one more"),
    (change_sizes(num_key_value_heads=3), "must divide num_attention_heads=2"),
    (change_sizes(hidden_size=8), "k_proj.weight is (8, 16), must be (8, 8)"),
    (lambda f: divide(f / "text_encoder"), "no model-00002-of-00002.safetensors in it"),
    (lambda f: drop(f / "tokenizer"), "no chat template in it"),
    (
      change("tokenizer/tokenizer_config.json", padding_side="left"),
      "padding_side='left': must be 'right'",
    ),
    (
      lambda f: (f / "tokenizer/chat_template.jinja").write_text(QWEN2_TEMPLATE),
      "not Qwen3's (that of Qwen2",
    ),
    (
      lambda f: (f / "tokenizer/chat_template.jinja").write_text(
        "{{ 1 if enable_thinking else 2 }}"
      ),
      "its chat template leaves the prompt out",
    ),
    (
      lambda f: (f / "tokenizer/chat_template.jinja").write_text("{% for %}"),
      "its chat template cannot be used (TemplateSyntaxError",
    ),
    (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "no tokenizer.json or vocab.json and"),
    (
      change("model_index.json", _class_name="Flux2Pipeline"),
      "holds a Flux2Pipeline, but family='flux2' reads a Flux2KleinPipeline",
    ),
    (change("model_index.json", text_encoder=[None, None]), "needs text_encoder, which it has not"),
  ],
)
def test_broken_folder_ends_with_one_message(folders, tmp_path, break_it, rule):
  folder = shutil.copytree(folders["flux2"], tmp_path / "pipeline")
  break_it(folder)
  with pytest.raises(ValueError) as caught:
    prompt_embedding.load_text_encoders(TextSource(folder, "flux2"))
  assert rule in str(caught.value) and str(folder) in str(caught.value)


def test_layers_that_the_config_does_not_know_are_refused(folders, tmp_path):
  """State -2 of fewer layers would be another state."""
  folder = shutil.copytree(folders["z_image"], tmp_path / "pipeline")
  path = folder / "text_encoder" / "config.json"
  edit(path, num_hidden_layers=json.loads(path.read_text())["num_hidden_layers"] - 1)
  with pytest.raises(ValueError, match="text_encoder"):
    prompt_embedding.load_text_encoders(TextSource(folder, "z_image"))


def test_a_flux_2_pipeline_is_not_taken_for_a_flux_1(folders):
  with pytest.raises(ValueError, match="holds a Flux2KleinPipeline, but family='flux'"):
    prompt_embedding.load_text_encoders(TextSource(folders["flux2"], "flux"))
