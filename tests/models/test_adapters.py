"""Adapters go out to diffusers and come back, from PEFT too, with alpha applied once."""

import json

import families
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields
from tpgrpo_jax.models import flux, hf, lora, mmdit
from tpgrpo_jax.models.hf import flux as hf_flux
from tpgrpo_jax.models.hf import flux2 as hf_flux2

RANK, ALPHA = 3, 12.0
CONFIG = mmdit.MMDiTConfig(
  sample_size=8,
  patch_size=2,
  in_channels=4,
  num_layers=3,
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=12,
  caption_projection_dim=16,
  pooled_projection_dim=10,
  out_channels=4,
  pos_embed_max_size=6,
  dual_attention_layers=(0,),
  qk_norm="rms_norm",
)
EVERY_KIND = (*model_fields.REFERENCE_LORA_TARGETS, "ff.net.0.proj", "norm1.linear", "proj_out")
TOLERANCE = 1e-4  # float32 sums in another order than torch's


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), tree)


def adapted(targets, *, rank=RANK, alpha=ALPHA):
  """(graphdef, trainable shapes, frozen shapes) of a model with adapters."""

  def create():
    model = models.build_transformer(CONFIG)(jax.random.key(0))
    lora.add_lora(
      model, jax.random.key(1), rank=rank, alpha=alpha, init="gaussian", targets=targets
    )
    return model

  return lora.split_trainable(nnx.eval_shape(create), rank=rank)


@pytest.fixture(scope="module")
def abstract():
  create = nnx.eval_shape(models.build_transformer(CONFIG), jax.random.key(0))
  return lora.merge_trees(*lora.split_trainable(create, rank=0)[1:])


@pytest.fixture(scope="module")
def weights(abstract):
  return random_like(abstract, 0)


@pytest.fixture(scope="module")
def trainable():
  return random_like(adapted(EVERY_KIND)[1], 1)


@pytest.fixture
def file(trainable, tmp_path):
  return save(tmp_path, trainable)


def save(path, trainable, **options):
  options = {"rank": RANK, "alpha": ALPHA, "targets": EVERY_KIND} | options
  return hf.save_lora(path, trainable, CONFIG, **options)


def rewrite(path, change, target=None, metadata=None):
  """Writes what `change` makes of {name: tensor}, with the same metadata unless told otherwise."""
  tensors = safetensors.numpy.load_file(path)
  if metadata is None:
    metadata = metadata_of(path)
  safetensors.numpy.save_file(change(tensors), target or path, metadata=metadata)


def metadata_of(path):
  with safetensors.safe_open(path, framework="numpy") as handle:
    return handle.metadata()


def assert_same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def error_of_loading(path, abstract):
  with pytest.raises(ValueError) as caught:
    hf.load_lora(path, CONFIG, abstract)
  return str(caught.value)


def test_adapters_come_back_bit_for_bit(file, trainable, abstract):
  found = hf.load_lora(file.parent, CONFIG, abstract)
  assert_same(found.trainable, trainable)
  assert (found.rank, found.alpha) == (RANK, ALPHA)
  assert set(found.targets) == set(EVERY_KIND)


def test_names_and_metadata_are_diffusers_own(file):
  names = safetensors.numpy.load_file(file)
  assert file.name == "pytorch_lora_weights.safetensors"
  assert names["transformer.transformer_blocks.2.attn.to_out.0.lora_A.weight"].shape == (RANK, 16)
  assert names["transformer.transformer_blocks.0.norm1.linear.lora_B.weight"].shape == (144, RANK)
  assert names["transformer.proj_out.lora_A.weight"].shape == (RANK, 16)
  assert not any("alpha" in name for name in names)  # diffusers' SD3 loader refuses them
  settings = json.loads(metadata_of(file)["lora_adapter_metadata"])
  assert settings["transformer.r"] == settings["transformer.lora_alpha"] == RANK
  assert settings["transformer.target_modules"] == list(EVERY_KIND)


def test_adapters_on_a_mesh_are_written_alike(file, trainable, tmp_path):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = lambda x: jax.sharding.PartitionSpec(
    *[None] * (x.ndim - 1), "x" if x.shape[-1] % 8 == 0 else None
  )
  on_mesh = jax.tree.map(
    lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spread(x))), trainable
  )
  again = save(tmp_path / "again.safetensors", on_mesh)
  assert again.read_bytes() == file.read_bytes()


def test_targets_that_were_given_select_the_same_modules_again(abstract, tmp_path):
  # Each of the two ends is the end of another module's name too.
  targets = ("transformer_blocks.0.ff.net.2", "proj_out", "pos_embed.proj")
  tree = random_like(adapted(targets)[1], 3)
  path = save(tmp_path, tree, targets=targets)
  found = hf.load_lora(path, CONFIG, abstract)
  assert_same(found.trainable, tree)
  assert jax.tree.structure(adapted(found.targets)[1]) == jax.tree.structure(tree)


def test_a_single_block_of_a_stack_is_no_target():
  config = CONFIG.__class__(**CONFIG.__dict__ | {"num_layers": 4})
  model = nnx.eval_shape(models.build_transformer(config), jax.random.key(0))
  with pytest.raises(ValueError) as caught:
    options = {"rank": 2, "alpha": 2.0, "init": "gaussian"}
    lora.add_lora(model, jax.random.key(0), targets=("transformer_blocks.1.attn.to_q",), **options)
  for part in (
    "lora.targets: transformer_blocks.1.attn.to_q",
    "add transformer_blocks.2.attn.to_q",
  ):
    assert part in str(caught.value)


def renamed(prefix, a="lora_A", b="lora_B"):
  def change(tensors):
    names = {
      name: name.replace("transformer.", prefix, 1).replace("lora_A", a).replace("lora_B", b)
      for name in tensors
    }
    return {names[name]: tensor for name, tensor in tensors.items()}

  return change


@pytest.mark.parametrize(
  "change",
  [
    renamed(""),
    renamed("base_model.model."),
    renamed("base_model.model.transformer."),
    renamed("diffusion_model.", "lora_down", "lora_up"),
    renamed("transformer.", "lora_A.default", "lora_B.default"),
    renamed("diffusion_model."),
    renamed("_orig_mod.transformer."),
    renamed("transformer._orig_mod."),
  ],
)
def test_names_of_other_programs_are_understood(file, trainable, abstract, change):
  rewrite(file, change)
  assert_same(hf.load_lora(file, CONFIG, abstract).trainable, trainable)


def without_scale(tensors):
  """B as it was trained, which other programs write; alpha / rank is 4, so that nothing is rounded."""
  return {k: v / np.float32(ALPHA / RANK) if "lora_B" in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
  "name",
  [
    "text_encoder.layers.0.lora_A.weight",
    "_orig_mod.text_encoder.layers.0.lora_A.weight",
    "lora_te1_text_model_encoder_layers_0.lora_up.weight",
    "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight",
  ],
)
def test_adapters_of_text_encoders_are_left_out_with_a_warning(file, trainable, abstract, name):
  rewrite(file, lambda t: t | {name: np.zeros((3, 4), np.float32)})
  with pytest.warns(UserWarning, match=f"1 tensors, such as {name}"):
    found = hf.load_lora(file, CONFIG, abstract)
  assert_same(found.trainable, trainable)


def test_a_list_of_names_that_do_not_fit_is_short_and_has_every_kind(file, abstract):
  rewrite(file, renamed("transformer.other_"))
  lines = error_of_loading(file, abstract).splitlines()
  assert len(lines) <= 13 and "more lines of the kind" in lines[-2] + lines[-1]
  assert any("no such module" in line for line in lines)
  assert any("adapts none" in line for line in lines)


def to_kohya(tensors, alpha=ALPHA):
  """Underscores for dots, and an alpha beside every pair."""
  result = {}
  for name, tensor in renamed("", "lora_down", "lora_up")(without_scale(tensors)).items():
    module, _, end = name.rpartition(".lora_")
    module = "lora_transformer_" + module.replace(".", "_")
    result[f"{module}.lora_{end}"] = tensor
    result[f"{module}.alpha"] = np.asarray(alpha, np.float32)
  return result


def test_kohyas_names_and_alpha_tensors_are_understood(file, trainable, abstract):
  rewrite(file, to_kohya, metadata={})
  found = hf.load_lora(file, CONFIG, abstract)
  assert_same(found.trainable, trainable)
  assert found.alpha == ALPHA


def test_without_a_word_on_alpha_it_is_the_rank_as_in_diffusers(file, abstract):
  assert hf.load_lora(file, CONFIG, abstract).states_alpha
  rewrite(file, lambda tensors: tensors, metadata={"format": "pt"})
  found = hf.load_lora(file, CONFIG, abstract)
  assert found.alpha == RANK and not found.states_alpha


@pytest.mark.parametrize(
  "header, part",
  [
    ({"tpgrpo_jax": "{}"}, "alpha of tpgrpo_jax=None, must be a finite number above 0"),
    ({"tpgrpo_jax": '{"alpha": "six"}'}, "alpha of tpgrpo_jax='six', must be a finite number"),
    ({"tpgrpo_jax": '{"alpha": NaN}'}, "alpha of tpgrpo_jax=nan, must be a finite number"),
    (
      {"lora_adapter_metadata": '{"lora_alpha": "six"}'},
      "lora_alpha='six', must be a finite number",
    ),
    ({"lora_adapter_metadata": '{"lora_alpha": 0}'}, "lora_alpha=0, must be a finite number"),
    (
      {"lora_adapter_metadata": '{"lora_alpha": 4, "alpha_pattern": [1]}'},
      "alpha_pattern=[1], must be an",
    ),
  ],
)
def test_a_header_that_is_no_number_is_named(file, abstract, header, part):
  rewrite(file, lambda tensors: tensors, metadata=metadata_of(file) | header)
  with pytest.raises(ValueError) as error:
    hf.load_lora(file, CONFIG, abstract)
  assert part in str(error.value) and str(file) in str(error.value)


def test_alphas_of_one_element_are_read_and_larger_ones_and_empty_adapters_named(file, abstract):
  many = lambda size: (
    lambda tensors: {
      k: np.full(size, ALPHA, np.float32) if k.endswith("alpha") else v for k, v in tensors.items()
    }
  )
  rewrite(file, to_kohya, metadata={})
  rewrite(file, many(1), metadata={})
  assert hf.load_lora(file, CONFIG, abstract).alpha == ALPHA
  rewrite(file, many(2), metadata={})
  with pytest.raises(ValueError, match=r"alpha has the shape \(2,\), must be one number"):
    hf.load_lora(file, CONFIG, abstract)
  empty = lambda tensors: {
    k: v[:0] if "lora_down" in k else v[:, :0]
    for k, v in tensors.items()
    if not k.endswith("alpha")
  }
  rewrite(file, empty, metadata={})
  with pytest.raises(ValueError, match="rank 0: some of its tensors are empty"):
    hf.load_lora(file, CONFIG, abstract)


@pytest.mark.parametrize("header", [True, False])
def test_every_readers_rule_gives_the_same_strength(file, trainable, header):
  tensors, settings = safetensors.numpy.load_file(file), {}
  if header:
    settings = json.loads(metadata_of(file)["lora_adapter_metadata"])
  a, b = (tensors[f"transformer.proj_out.lora_{side}.weight"] for side in "AB")
  ours = trainable["proj_out"]["lora_a"] @ trainable["proj_out"]["lora_b"] * (ALPHA / RANK)
  by_header = settings.get("transformer.lora_alpha", RANK) / RANK  # diffusers >= 0.34, peft
  by_alpha_tensors = tensors.get("transformer.proj_out.alpha", RANK) / RANK  # ComfyUI, kohya
  for scale in (by_header, by_alpha_tensors):
    np.testing.assert_allclose(scale * (b @ a), ours.T, rtol=1e-5, atol=1e-6)


def test_a_scale_that_rounds_comes_back_to_one_rounding(trainable, abstract, tmp_path):
  found = hf.load_lora(save(tmp_path, trainable, alpha=9.1), CONFIG, abstract)
  assert found.alpha == 9.1
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-22), found.trainable, trainable
  )


def test_pefts_folder_takes_its_settings_from_adapter_config(file, trainable, abstract, tmp_path):
  folder = tmp_path / "peft"
  folder.mkdir()
  change = lambda tensors: renamed("base_model.model.")(without_scale(tensors))
  rewrite(file, change, folder / "adapter_model.safetensors", {})
  settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5, "bias": "none"}
  (folder / "adapter_config.json").write_text(json.dumps(settings))
  found = hf.load_lora(folder, CONFIG, abstract)
  assert_same(found.trainable, trainable)
  assert found.alpha == 5.0
  (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
  assert f"its settings say rank 8, its tensors have rank {RANK}" in error_of_loading(
    folder, abstract
  )


@pytest.mark.parametrize(
  "settings",
  [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"modules_to_save": ["proj_out"]},
   {"peft_type": "LOKR"}],
)  # fmt: skip
def test_adapters_of_another_kind_are_refused(file, abstract, settings):
  text = json.dumps({"r": RANK, "lora_alpha": ALPHA} | settings)
  rewrite(file, lambda tensors: tensors, metadata={"lora_adapter_metadata": text})
  (key,) = settings
  assert f"{key}=" in error_of_loading(file, abstract)


TO_Q = "transformer.transformer_blocks.1.attn.to_q"


def dropped(*names):
  return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


@pytest.mark.parametrize(
  "change, parts",
  [
    (dropped(f"{TO_Q}.lora_A.weight"), ("missing: transformer_blocks.1.attn.to_q.lora_A (3, 16)",)),
    (
      dropped("transformer.transformer_blocks.0.ff.net.0.proj.lora_B.weight"),
      ("missing: transformer_blocks.0.ff.net.0.proj.lora_B (64, 3)",),
    ),
    (
      lambda t: t | {f"{TO_Q}.lora_B.weight": np.zeros((8, 3), np.float32)},
      ("misshapen: transformer_blocks.1.attn.to_q.lora_B is (8, 3), must be (16, 3)",),
    ),
    (
      lambda t: t | {f"{TO_Q}.lora_A.weight": np.zeros((4, 16), np.float32)},
      ("more than one rank: 3, 4",),
    ),
    (
      lambda t: t | {f"{TO_Q}.alpha": np.asarray(7.0, np.float32)},
      ("more than one alpha: 3, 7",),
    ),
    (
      renamed("transformer.single_"),
      ("not an adapter for this SD3Transformer2DModel", "no such module: transformer.single_trans"),
    ),
    (
      lambda t: t | {f"{TO_Q}.lora_B.weight": np.full((16, 3), np.nan, np.float32)},
      (f"the tensor {TO_Q}.lora_B.weight holds NaN or infinity",),
    ),
    (
      lambda t: t | {f"{TO_Q}.magnitude": np.zeros(16, np.float32)},
      ("not a tensor of an adapter",),
    ),
    (lambda t: {}, ("it adapts none of the model's modules",)),
  ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_explained(file, abstract, change, parts):
  rewrite(file, change)
  message = error_of_loading(file, abstract)
  assert str(file) in message
  for part in parts:
    assert part in message


def test_adapters_on_some_blocks_of_a_stack_are_refused(tmp_path):
  config = CONFIG.__class__(**CONFIG.__dict__ | {"num_layers": 4})
  model = nnx.eval_shape(models.build_transformer(config), jax.random.key(0))
  base = lora.merge_trees(*lora.split_trainable(model, rank=0)[1:])
  name = "transformer.transformer_blocks.1.attn.to_q.lora_"
  tensors = {
    f"{name}{s}.weight": np.zeros((2, 16) if s == "A" else (16, 2), np.float32) for s in "AB"
  }
  safetensors.numpy.save_file(tensors, tmp_path / "one.safetensors")
  with pytest.raises(ValueError, match="missing: transformer_blocks.2.attn.to_q, whose neighbours"):
    hf.load_lora(tmp_path / "one.safetensors", config, base)


def test_absent_broken_and_pickled_files_are_refused(file, abstract, tmp_path):
  assert f"lora.path={str(tmp_path / 'no')!r}: no such file" in error_of_loading(
    tmp_path / "no", abstract
  )
  file.write_bytes(file.read_bytes()[:-5])
  assert "not a readable safetensors file" in error_of_loading(file, abstract)
  file.rename(tmp_path / "pytorch_lora_weights.bin")
  assert "convert to safetensors" in error_of_loading(tmp_path, abstract)


def run(graphdef, params):
  """Velocity of two random latents, not square."""
  rng = np.random.default_rng(7)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x, text, pooled = draw(2, 8, 12, 4), draw(2, 5, 12), draw(2, 10)
  sigma = np.asarray([0.9, 0.3], np.float32)
  condition = types.Condition(jnp.asarray(text), jnp.asarray(pooled))
  velocity = jax.jit(
    lambda p: models.velocity_fn(graphdef, p, jnp.asarray(x), jnp.asarray(sigma), condition)
  )
  return np.asarray(velocity(params)), (x, sigma, text, pooled)


def relative_error(found, wanted):
  return np.abs(found - wanted).max() / np.abs(wanted).max()


def test_merged_weights_give_the_adapters_output(trainable, weights):
  graphdef, _, _ = adapted(EVERY_KIND)
  params = {"frozen": weights, "trainable": trainable}
  wanted, _ = run(graphdef, params)
  merged = hf.merge_lora(params, rank=RANK, alpha=ALPHA)
  assert jax.tree.structure(merged) == jax.tree.structure(weights)
  base = nnx.eval_shape(models.build_transformer(CONFIG), jax.random.key(0))
  found, _ = run(lora.split_trainable(base, rank=0)[0], {"frozen": merged, "trainable": {}})
  unadapted, _ = run(lora.split_trainable(base, rank=0)[0], {"frozen": weights, "trainable": {}})
  assert relative_error(unadapted, wanted) > 0.1  # the adapters do something
  assert relative_error(found, wanted) < TOLERANCE


def test_merging_keeps_the_weights_own_dtype(trainable, weights):
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), weights)
  merged = hf.merge_lora({"frozen": half, "trainable": trainable}, rank=RANK, alpha=ALPHA)
  assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
  kernel, a, b = half["proj_out"]["kernel"], *(trainable["proj_out"][f"lora_{s}"] for s in "ab")
  wanted = np.asarray(kernel, np.float64) + ALPHA / RANK * a.astype(np.float64) @ b
  # One rounding to bfloat16, of 8 bits.
  found = np.asarray(merged["proj_out"]["kernel"], np.float64)
  np.testing.assert_allclose(found, wanted, rtol=2**-8)


@pytest.fixture
def theirs(weights, tmp_path):
  """diffusers' transformer with our weights."""
  diffusers = pytest.importorskip("diffusers")
  pytest.importorskip("peft")
  hf.save_transformer(tmp_path / "transformer", CONFIG, weights)
  return diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").eval()


def run_theirs(model, inputs):
  torch = pytest.importorskip("torch")
  x, sigma, text, pooled = (torch.from_numpy(a) for a in inputs)
  with torch.no_grad():
    y = model(x.permute(0, 3, 1, 2), text, pooled, 1000 * sigma, return_dict=False)[0]
  return y.permute(0, 2, 3, 1).numpy()


@pytest.mark.parity
@pytest.mark.parametrize("through", ["pipeline", "transformer", "pipeline without header"])
@pytest.mark.parametrize(
  "targets", [model_fields.REFERENCE_LORA_TARGETS, (*EVERY_KIND, "pos_embed.proj")]
)
def test_diffusers_gives_our_output_with_our_adapters(theirs, weights, tmp_path, through, targets):
  diffusers = pytest.importorskip("diffusers")
  graphdef, shapes, _ = adapted(targets)
  trainable = random_like(shapes, 4)
  wanted, inputs = run(graphdef, {"frozen": weights, "trainable": trainable})
  path = save(tmp_path / "lora", trainable, targets=targets)
  before = run_theirs(theirs, inputs)
  if through == "pipeline without header":
    rewrite(path, lambda tensors: tensors, metadata={"format": "pt"})
  if through.startswith("pipeline"):
    pipe = diffusers.StableDiffusion3Pipeline(
      transformer=theirs, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None,
      text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
      text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.load_lora_weights(str(path.parent))
  else:
    theirs.load_lora_adapter(str(path.parent), weight_name=path.name)
  assert relative_error(before, wanted) > 0.1
  assert relative_error(run_theirs(theirs, inputs), wanted) < TOLERANCE


FLUX = flux.FluxConfig(
  in_channels=16,
  out_channels=16,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  guidance_embeds=True,
  axes_dims_rope=(4, 6, 6),
)


def flux_with(targets):
  """(graphdef, random adapters, random weights) of a small FLUX.1."""

  def create():
    model = flux.Flux(FLUX, guidance=3.5, rngs=nnx.Rngs(0))
    lora.add_lora(
      model, jax.random.key(1), rank=RANK, alpha=ALPHA, init="gaussian", targets=targets
    )
    return model

  graphdef, trainable, frozen = lora.split_trainable(nnx.eval_shape(create), rank=RANK)
  return graphdef, random_like(trainable, 5), random_like(frozen, 6)


FLUX_TARGETS = ("ff_context.net.0.proj", "proj_mlp", "x_embedder", "attn.to_k")


def test_adapters_of_flux_come_back_bit_for_bit(tmp_path):
  _, trainable, weights = flux_with(FLUX_TARGETS)
  path = hf.save_lora(tmp_path, trainable, FLUX, rank=RANK, alpha=ALPHA, targets=FLUX_TARGETS)
  found = hf.load_lora(path, FLUX, weights)
  assert_same(found.trainable, trainable)
  assert set(found.targets) == set(FLUX_TARGETS)


def test_adapters_of_another_architecture_are_refused(tmp_path, abstract):
  _, trainable, _ = flux_with(("proj_mlp", "attn.to_k"))
  path = hf.save_lora(tmp_path, trainable, FLUX, rank=RANK, alpha=ALPHA, targets=("proj_mlp",))
  message = error_of_loading(path, abstract)
  assert "not an adapter for this SD3Transformer2DModel" in message
  assert "no such module: transformer.single_transformer_blocks.0.proj_mlp.lora_A" in message


@pytest.mark.parity
def test_diffusers_flux_pipeline_gives_our_output_with_our_adapters(tmp_path):
  diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
  graphdef, trainable, weights = flux_with(FLUX_TARGETS)
  hf.save_transformer(tmp_path / "transformer", FLUX, weights)
  model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").eval()
  pipe = diffusers.FluxPipeline(
    transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None,
    text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
  )  # fmt: skip
  found, inputs = run(graphdef, {"frozen": weights, "trainable": trainable})

  def theirs():
    x, sigma, text, pooled = (torch.from_numpy(a) for a in inputs)
    packed = pipe._pack_latents(x.permute(0, 3, 1, 2), 2, 4, 8, 12)
    with torch.no_grad():
      y = model(
        hidden_states=packed,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        guidance=torch.full((2,), 3.5),
        txt_ids=torch.zeros(5, 3),
        img_ids=pipe._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
        return_dict=False,
      )[0]
    y = y.reshape(2, 4, 6, 4, 2, 2).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(2, 8, 12, 4).numpy()

  assert relative_error(theirs(), found) > 0.1
  hf.save_lora(tmp_path / "lora", trainable, FLUX, rank=RANK, alpha=ALPHA, targets=FLUX_TARGETS)
  pipe.load_lora_weights(str(tmp_path / "lora"))
  assert relative_error(theirs(), found) < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("writer", ["diffusers_pipeline", "diffusers_transformer", "peft"])
def test_adapters_of_peft_give_their_output_here(theirs, weights, abstract, tmp_path, writer):
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  import diffusers

  torch.manual_seed(0)
  targets = ("attn.to_q", "attn.to_out.0", "attn.to_add_out", "ff.net.2", "proj_out")
  settings = peft.LoraConfig(
    r=5, lora_alpha=7, target_modules=list(targets), init_lora_weights="gaussian"
  )
  if writer == "peft":
    model = peft.get_peft_model(theirs, settings)
  else:
    theirs.add_adapter(settings)
    model = theirs
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.normal_(std=0.3)
  if writer == "peft":
    model.save_pretrained(tmp_path / "out")
  elif writer == "diffusers_transformer":
    model.save_lora_adapter(tmp_path / "out")
  else:
    from diffusers.training_utils import _collate_lora_metadata

    diffusers.StableDiffusion3Pipeline.save_lora_weights(
      tmp_path / "out",
      transformer_lora_layers=peft.get_peft_model_state_dict(theirs),
      **_collate_lora_metadata({"transformer": theirs}),
    )
  found = hf.load_lora(tmp_path / "out", CONFIG, abstract)
  assert (found.rank, found.alpha, set(found.targets)) == (5, 7.0, set(targets))
  graphdef, shapes, _ = adapted(found.targets, rank=5, alpha=7.0)
  assert jax.tree.structure(shapes) == jax.tree.structure(found.trainable)
  ours, inputs = run(graphdef, {"frozen": weights, "trainable": found.trainable})
  assert relative_error(ours, run_theirs(model, inputs)) < TOLERANCE


def flux_authors_file(path, style, *, sparse=False, rank=4):
  """Adapters of the small FLUX.1 under its authors' names, as kohya ("_") or ai-toolkit (".") write them."""
  rng, width = np.random.default_rng(0), 32
  shapes = {
    f"double_blocks.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
      "img_attn.qkv": (3 * width, width), "txt_attn.qkv": (3 * width, width),
      "img_attn.proj": (width, width), "txt_mlp.2": (width, 4 * width),
      "img_mod.lin": (6 * width, width),
    }.items()
  } | {f"single_blocks.{i}.linear1": (7 * width, width) for i in range(2)}  # fmt: skip
  draw, tensors = lambda *shape: rng.standard_normal(shape).astype(np.float32), {}
  for name, (out, inside) in shapes.items():
    parts = {"qkv": 3, "linear1": 4}.get(name.rpartition(".")[2], 1) if sparse else 1
    a, b = draw(parts * rank, inside), draw(out, parts * rank)
    if parts > 1:  # one small adapter for each of the parts
      bounds = np.cumsum([0, width, width, width, 4 * width])
      for i in range(parts):
        own = b[bounds[i] : bounds[i + 1], i * rank : (i + 1) * rank].copy()
        b[bounds[i] : bounds[i + 1]] = 0
        b[bounds[i] : bounds[i + 1], i * rank : (i + 1) * rank] = own
    if style == "kohya":
      name = "lora_unet_" + name.replace(".", "_")
      tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
      tensors[f"{name}.alpha"] = np.asarray(2.0 * parts, np.float32)
    else:
      name = f"diffusion_model.{name}"
      tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
  safetensors.numpy.save_file(tensors, path)
  return tensors


@pytest.mark.parametrize(
  "style, sparse, alpha", [("kohya", False, 2.0), ("kohya", True, 2.0), ("authors", False, 4.0)]
)
def test_adapters_under_the_names_of_flux_1s_authors_are_read(tmp_path, style, sparse, alpha):
  tensors = flux_authors_file(tmp_path / "theirs.safetensors", style, sparse=sparse)
  found = hf.load_lora(tmp_path / "theirs.safetensors", FLUX, flux_with(("attn.to_q",))[2])
  assert (found.rank, found.alpha) == (4, alpha)
  single = found.trainable["single_transformer_blocks"]
  parts = [single["attn"][f"to_{side}"] for side in "qkv"] + [single["proj_mlp"]]
  ours = np.concatenate([(p["lora_a"][1] @ p["lora_b"][1]).T for p in parts])
  name = (
    "lora_unet_single_blocks_1_linear1"
    if style == "kohya"
    else "diffusion_model.single_blocks.1.linear1"
  )
  a, b = (tensors[k] for k in tensors if k.startswith(name) and "alpha" not in k)
  np.testing.assert_allclose(ours, b @ a, rtol=1e-4, atol=1e-5)
  assert {"attn.to_q", "attn.add_v_proj", "proj_mlp", "norm1.linear"} <= {*found.targets}


@pytest.mark.parity
@pytest.mark.parametrize("sparse", [False, True])
def test_kohyas_names_of_flux_1_become_diffusers_own(tmp_path, monkeypatch, sparse):
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
  tensors = flux_authors_file(tmp_path / "theirs.safetensors", "kohya", sparse=sparse)
  given = {
    k: torch.from_numpy(v) for k, v in tensors.items() if "linear1" not in k
  }  # has FLUX.1's width
  wanted = utils._convert_kohya_flux_lora_to_diffusers(given)
  found = hf_flux.rename_adapters(tensors)
  for name, tensor in wanted.items():
    if not name.endswith("lora_A.weight"):
      continue
    module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
    a, b = (found[f"{module}.lora_{end}.weight"] for end in ("down", "up"))
    theirs = wanted[name.replace("lora_A", "lora_B")].numpy() @ tensor.numpy()
    ours = b @ a * (found[f"{module}.alpha"] / len(a))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# FLUX.2's authors' names, as ai-toolkit writes them.


def authors_file(path, rank=4):
  """Adapters of the small FLUX.2 of families.py, under the names of its authors."""
  rng, width = np.random.default_rng(0), 32
  shapes = {
    f"double_blocks.{i}.{name}": shape
    for i in range(2)
    for name, shape in {
      "img_attn.qkv": (3 * width, width), "txt_attn.qkv": (3 * width, width),
      "img_attn.proj": (width, width), "txt_attn.proj": (width, width),
      "img_mlp.0": (6 * width, width), "txt_mlp.2": (width, 3 * width),
    }.items()
  } | {f"single_blocks.{i}.linear1": (9 * width, width) for i in range(2)}  # fmt: skip
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  tensors = {}
  for name, (out, inside) in shapes.items():
    tensors[f"diffusion_model.{name}.lora_A.weight"] = draw(rank, inside)
    tensors[f"diffusion_model.{name}.lora_B.weight"] = draw(out, rank)
  safetensors.numpy.save_file(tensors, path)
  return tensors


def test_adapters_under_the_names_of_flux_2s_authors_are_read(tmp_path):
  tensors = authors_file(tmp_path / "theirs.safetensors")
  config = families.config_of(families.FAMILIES["flux2"])
  found = hf.load_lora(tmp_path / "theirs.safetensors", config, families.weights_of("flux2"))
  assert (found.rank, found.alpha) == (4, 4.0)
  attention = found.trainable["transformer_blocks"]["attn"]
  fused = "diffusion_model.double_blocks.1.img_attn.qkv"
  b = [attention[name]["lora_b"][1].T for name in ("to_q", "to_k", "to_v")]
  np.testing.assert_array_equal(np.concatenate(b), tensors[f"{fused}.lora_B.weight"])
  for name in ("to_q", "to_k", "to_v"):
    np.testing.assert_array_equal(attention[name]["lora_a"][1].T, tensors[f"{fused}.lora_A.weight"])
  assert {"attn.to_q", "attn.add_v_proj", "attn.to_qkv_mlp_proj", "ff.linear_in"} <= {
    *found.targets
  }


@pytest.mark.parity
def test_names_of_flux_2s_authors_become_diffusers_own(tmp_path):
  torch = pytest.importorskip("torch")
  utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
  tensors = authors_file(tmp_path / "theirs.safetensors")
  convert = utils._convert_non_diffusers_flux2_lora_to_diffusers
  wanted = convert({k: torch.from_numpy(v) for k, v in tensors.items()})
  found = hf_flux2.rename_adapters(tensors)
  assert {f"transformer.{name}" for name in found} == wanted.keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor, wanted[f"transformer.{name}"].numpy())
