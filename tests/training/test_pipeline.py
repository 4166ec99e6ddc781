"""Complete small pipelines of diffusers, SD3 and FLUX.1: the same image, a TP-GRPO epoch, clear errors."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored_diffusers as stored

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.config import presets, rules
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.models import hf, prompt_cache, prompt_embedding
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import build, evaluation, loop
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

FAMILIES = stored.FAMILIES
TWO_LEVELS = 2 / 255  # of an 8-bit image
pytestmark = pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")


@pytest.fixture(scope="module")
def golden():
  return stored.load()


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
  make = lambda family: stored.write_pipeline(golden, family, tmp_path_factory.mktemp(family))
  return {family: make(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def work(tmp_path_factory, folders):
  """Prompts and, below it, one cache of embeddings for all tests."""
  folder = tmp_path_factory.mktemp("work")
  for split in ("train", "test"):
    lines = [f'the blue sign says "{split} {i}"' for i in range(4)]
    (folder / f"{split}.txt").write_text("\n".join(lines))
  return folder


def paint(config, mesh, texts, latents):
  """Images [N, H, W, 3] in [0, 1] from initial latents, by the functions that training uses."""
  model = build.build_model(config, mesh, texts)
  sigmas = method_lib.make_sigmas(config.sampler, model, stored.NUM_STEPS)
  velocity_fn = method_lib.guide(config, model.velocity_fn)
  condition = method_lib.build_condition(config, model, texts)

  @jax.jit
  def run(params, x, condition):
    latents = sampler.sample_ode(velocity_fn, params, x, condition, sigmas=sigmas)
    return model.pipeline.decode(params["decoder"], latents)

  assert model.pipeline.latent_shape == latents.shape[1:]
  return run(model.params(model.trainable), jnp.asarray(latents), condition)


def image_cases():
  """(family, size, guidance): all of the older families; in CI's first tier, one of the newer."""
  for family in FAMILIES:
    for place in stored.SIZES if family in stored.QWEN else [""]:
      for which in (0, 1):
        later = family in stored.QWEN and (place, which) != ("small/", 1)
        yield pytest.param(family, place, which, marks=[pytest.mark.exhaustive] * later)


@pytest.mark.parametrize("family, place, which", [*image_cases()])
def test_our_image_is_the_pipelines(golden, folders, work, single_mesh, family, place, which):
  scale = stored.GUIDANCE[family][which]
  height, width = stored.SIZES[place]
  fields = {
    "sampler.guidance_scale": scale, "sampler.height": height, "sampler.width": width
  }  # fmt: skip
  config = stored.make_config(family, folders[family], work, fields)
  texts, latents = stored.prompts(golden, family), stored.latents(golden, family, place)
  found = paint(config, single_mesh, texts, latents)
  wanted, other = (
    golden[f"{family}/{place}images/{s}"] for s in (scale, stored.GUIDANCE[family][1 - which])
  )
  assert np.abs(np.asarray(found) - wanted).max() < TWO_LEVELS
  assert np.abs(other - wanted).max() > TWO_LEVELS  # guidance is seen


@pytest.mark.slow
def test_pictures_on_a_mesh_are_those_of_one_device(golden, folders, work, single_mesh):
  config = stored.make_config("sd3", folders["sd3"], work)
  texts, latents = stored.prompts(golden) * 4, np.tile(stored.latents(golden), (4, 1, 1, 1))
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  with jax.set_mesh(mesh):
    found = paint(config, mesh, texts, latents)
  np.testing.assert_allclose(found, paint(config, single_mesh, texts, latents), atol=1e-4)


def rows_of(config):
  rows = metrics.read_rows(pathlib.Path(config.run.dir) / "metrics.jsonl")
  return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize(
  "family",
  [
    pytest.param(f, marks=pytest.mark.slow if f == "sd3" else pytest.mark.exhaustive)
    for f in FAMILIES
  ],
)
def test_an_epoch_of_tp_grpo_with_pickscore_and_ocr_is_on_policy(
  folders, work, tmp_path, one_device, family
):
  import stored_models

  pick = stored_models.write_folder(stored_models.load(), "clip_h", tmp_path / "pick")
  fields = {
    "run.dir": str(tmp_path / "run"),
    "prompts.name": "folder",
    "prompts.path": str(work),
    "rewards": {"pickscore": {"weight": 1.0, "path": str(pick)}, "ocr": 0.5},
  }
  config = stored.make_config(family, folders[family], work, fields)
  loop.train(config)
  (row,) = rows_of(config)
  assert row["ratio/first_update_max_abs_log"] == 0.0
  assert row["reward/pickscore/std"] > 0 and row["grad_norm"] > 0
  assert row["evaluations_per_sample"] == 10 * (1 if family == "flux" else 2)
  again = stored.make_config(family, folders[family], work, fields | {"train.epochs": 2})
  loop.train(again)  # goes on from its checkpoint, with the embeddings of the new prompts
  assert len(rows_of(again)) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", stored.QWEN)
def test_a_run_on_a_mesh_that_is_resumed_equals_one_that_is_not(folders, work, tmp_path, family):
  def train(name, epochs):
    fields = {
      "run.dir": str(tmp_path / name),
      "prompts.name": "folder",
      "prompts.path": str(work),
      "train.epochs": epochs,
      "eval.prompts": 4,
      "eval.batch": 4,
      "mesh": config_lib.Mesh(2, 2, 2),
    }
    config = stored.make_config(family, folders[family], work, fields)
    loop.train(config)
    kept = ("grad_norm", "reward/", "advantage/", "ratio/")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows_of(config)]

  whole = train("whole", 2)
  assert train("parts", 1) == whole[:1]
  assert train("parts", 2) == whole


@pytest.mark.slow
def test_a_small_decoder_paints_completions_and_not_the_own_images(
  folders, work, tmp_path, one_device
):
  sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
  import test_tiny_vae

  sizes = hf.load_config(folders["sd3"] / "vae")
  blocks = [1] * len(sizes.block_out_channels)
  changes = {"num_decoder_blocks": blocks, "decoder_block_out_channels": [8] * len(blocks)}
  test_tiny_vae.write_folder(tmp_path / "small", latent_channels=sizes.latent_channels, **changes)

  def train(name, **fields):
    fields = {f"completion.{k}": v for k, v in fields.items()} | {
      "run.dir": str(tmp_path / name),
      "prompts.name": "folder",
      "prompts.path": str(work),
    }
    config = stored.make_config("sd3", folders["sd3"], work, fields)
    loop.train(config)
    (row,) = rows_of(config)
    return row

  small, own = train("small_run", decoder=str(tmp_path / "small")), train("own_run")
  assert small["ratio/first_update_max_abs_log"] == 0.0
  assert small["reward/mean"] == own["reward/mean"]
  last = max(name for name in own if name.startswith("completion_reward/"))
  assert small[last] == own[last] and small["completion_reward/0"] != own["completion_reward/0"]
  with pytest.raises(ValueError, match="completion.decoder='nowhere/here'"):
    train("nowhere", decoder="nowhere/here")


# In CI: branches and samples without a trajectory, with and without guidance; the test above has
# trajectories. The rest: pytest -m exhaustive.
IN_CI = {("sd3", "tempflow"), ("flux", "diffusion_nft")}


@pytest.mark.parametrize(
  "family, name",
  [
    pytest.param(
      family,
      name,
      marks=pytest.mark.slow if (family, name) in IN_CI else pytest.mark.exhaustive,
    )
    for family in FAMILIES
    for name in presets.METHODS
  ],
)
def test_an_epoch_of_every_method_learns_and_is_on_policy(
  folders, work, tmp_path, one_device, family, name
):
  fields = {
    "run.dir": str(tmp_path / "run"),
    "prompts.name": "folder",
    "prompts.path": str(work),
  }
  base = stored.make_config(family, folders[family], work, fields)
  config = presets.apply(base, presets.METHODS[name])
  if config.sampler.calibration:
    config = presets.apply(config, {"sampler.calibration_rounds": 2})
  rules.validate(config)
  assert method_lib.is_guided(config) == (family != "flux" and config.sampler.guidance_scale != 1.0)
  loop.train(config)
  (row,) = rows_of(config)
  is_policy = config.loss.objective == "policy"
  assert row.get("ratio/first_update_max_abs_log") == (0.0 if is_policy else None)
  assert row["grad_norm"] > 0 and row["advantage/std"] > 0 and row["reward/std"] > 0


@pytest.mark.slow
def test_quantised_base_is_on_policy_and_near_the_whole_one(
  golden, folders, work, single_mesh, tmp_path, one_device
):
  fields = {
    "model.quantize": "int8",
    "model.remat": "full",
    "credit.method": "flow_grpo",
    "run.dir": str(tmp_path / "run"),
    "prompts.name": "folder",
    "prompts.path": str(work),
  }
  config = stored.make_config("sd3", folders["sd3"], work, fields)
  loop.train(config)
  assert rows_of(config)[0]["ratio/first_update_max_abs_log"] == 0.0
  found = paint(config, single_mesh, stored.prompts(golden), stored.latents(golden))
  wanted = golden[f"sd3/images/{stored.GUIDANCE['sd3'][-1]}"]
  difference = np.abs(np.asarray(found) - wanted).mean()
  assert 0 < difference < 0.01


def test_text_encoders_are_gone_before_the_transformer_comes(
  folders, work, single_mesh, monkeypatch
):
  alive = []
  load = build.hf.load_params
  monkeypatch.setattr(
    build.hf, "load_params", lambda *a, **k: alive.append(len(jax.live_arrays())) or load(*a, **k)
  )
  config = stored.make_config("sd3", folders["sd3"], work, {"text.cache": str(work / "fresh")})
  before = len(jax.live_arrays())
  model = build.build_model(config, single_mesh, ["a red cat"])
  decoder = len(jax.tree.leaves(model.pipeline.decoder))
  adapters = len(jax.tree.leaves(model.trainable))
  assert alive[-1] - before <= decoder + adapters + 4  # keys, not a single encoder's weight


def test_known_prompts_need_no_encoders(folders, work, single_mesh, monkeypatch):
  config = stored.make_config("flux", folders["flux"], work)
  build.build_model(config, single_mesh, ["a red cat"])
  monkeypatch.setattr(prompt_embedding, "load_text_encoders", None)
  assert prompt_cache.prompt_embedding.load_text_encoders is None
  build.build_model(config, single_mesh, ["a red cat"])


def test_sampling_takes_any_size_that_the_patches_divide(folders, work, single_mesh):
  fields = {"sampler.height": 64, "sampler.width": 32}
  config = stored.make_config("flux", folders["flux"], work, fields)
  model = build.build_model(config, single_mesh, ["a red cat"])
  sample = evaluation.make_sample_fn(config, model, single_mesh, num_steps=2)
  prompts = [types.Prompt("a red cat", {})]
  with jax.set_mesh(single_mesh):
    assert sample(model.params(model.trainable), prompts).shape == (1, 64, 32, 3)


def edit(folder, name, change):
  content = json.loads((folder / name).read_text())
  (folder / name).write_text(json.dumps(content | change))


@pytest.mark.parametrize(
  "family, fields, break_it, part",
  [
    ("sd3", {"sampler.height": 50}, None, "sampler.height=50: must be a multiple of 16"),
    ("flux", {"sampler.width": 88}, None, "sampler.width=88: must be a multiple of 16"),
    ("sd3", {"sampler.width": 160}, None, "positions for 128 pixels at most"),
    ("sd3", {"model.variant": "flux"}, None, "holds a SD3Transformer2DModel, but model.variant='flux'"),
    ("flux", {"model.variant": "sd3"}, None, "Use model.variant='flux'"),
    ("sd3", {}, lambda f: shutil.rmtree(f / "vae"), "vae"),
    ("sd3", {}, lambda f: shutil.rmtree(f / "text_encoder_2"), "no text_encoder_2 in it"),
    ("sd3", {}, lambda f: (f / "model_index.json").unlink(), "no model_index.json in it"),
    ("sd3", {}, lambda f: shutil.rmtree(f / "transformer"), "no config.json in it"),
    ("flux", {}, lambda f: edit(f, "transformer/config.json", {"guidance_embeds": False}), "Set it to 1."),
    ("sd3", {}, lambda f: edit(f, "vae/config.json", {"latent_channels": 8}), "the autoencoder has 8"),
    ("flux2", {"sampler.width": 88}, None, "sampler.width=88: must be a multiple of 16"),
    ("flux2", {"model.variant": "z_image"}, None, "Use model.variant='flux2'"),
    ("flux2", {}, lambda f: edit(f, "vae/config.json", {"_class_name": "AutoencoderKL"}), "not fields of"),
    ("flux2", {}, lambda f: edit(f, "vae/config.json", {"patch_size": [1, 1]}), "must be [2, 2]"),
    ("flux2", {}, lambda f: edit(f, "model_index.json", {"is_distilled": True}), "distilled to do without"),
    ("flux2", {}, lambda f: edit(f, "transformer/config.json", {"axes_dims_rope": [4, 6, 6]}), "four even"),
    ("flux2", {}, lambda f: edit(f, "transformer/config.json", {"guidance_embeds": True}), "FLUX.2-dev"),
    ("z_image", {}, lambda f: edit(f, "transformer/config.json", {"axes_dims": [4, 6, 4]}), "must be three"),
    ("z_image", {"sampler.height": 272}, None, "positions for 256 pixels at most"),
    ("z_image", {}, lambda f: edit(f, "transformer/config.json", {"axes_lens": [97, 16, 16]}),
     "places for 64 tokens of a caption at most (axes_lens=(97, 16, 16)). Set it to 64 or less."),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
  folders, work, single_mesh, tmp_path, family, fields, break_it, part
):
  folder = folders[family]
  if break_it:
    folder = shutil.copytree(folder, tmp_path / "copy")
    break_it(folder)
  config = stored.make_config(family, folder, work, fields)
  with pytest.raises(ValueError) as caught:
    build.build_model(config, single_mesh, ["a red cat"])
  assert part in str(caught.value)


def test_another_schedule_than_the_pipelines_is_warned_of(folders, work, single_mesh):
  config = stored.make_config("flux", folders["flux"], work, {"sampler.schedule": "linear"})
  with pytest.warns(UserWarning, match="sampler.schedule='linear'.*made for 'flux'"):
    build.build_model(config, single_mesh, ["a red cat"])


def test_long_prompts_are_warned_of_and_counted(folders, work, single_mesh):
  config = stored.make_config("sd3", folders["sd3"], work)
  long = "the red house of the blue dog on the sign " * 4
  with pytest.warns(UserWarning, match="1 of 1 prompts have more than the 13 tokens"):
    build.build_model(config, single_mesh, [long])
