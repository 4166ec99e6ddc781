"""FLUX.1-Kontext: the image that diffusers edits, an epoch whose reward sees both pictures, clear errors."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import stored_diffusers as stored

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets, rules, tasks
from tpgrpo_jax.data import pictures
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.forecasting import lowering
from tpgrpo_jax.models import prompt_embedding
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import build, editing, evaluation, loop, scoring
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.types import Prompt

TWO_LEVELS = 2 / 255  # of an 8-bit image


@pytest.fixture(scope="module")
def golden():
  with np.load(stored.GOLDEN / "kontext.npz") as file:
    return {key: file[key] for key in file.files} | stored.load()


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
  folder = stored.write_pipeline(golden, "flux", tmp_path_factory.mktemp("kontext"))
  (folder / "model_index.json").write_bytes(golden["model_index"].tobytes())
  return folder


@pytest.fixture(scope="module")
def work(golden, tmp_path_factory):
  """Prompts with pictures and, beside them, one cache for all tests."""
  work = tmp_path_factory.mktemp("work")
  (work / "pictures").mkdir()
  for n in (0, 1):
    Image.fromarray(golden[f"picture_{n}"]).save(work / f"pictures/{n}.png")
  for split in ("train", "test"):
    rows = [
      {"prompt": f'the blue sign says "{split} {i}"', "image": f"pictures/{i % 2}.png"}
      for i in range(4)
    ]
    (work / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return work


def make_config(folder, work, fields=None):
  fields = {
    "model.variant": "flux_kontext",
    "sampler.guidance_scale": 2.5,
    "prompts.name": "folder",
    "prompts.path": str(work),
  } | (fields or {})
  return stored.make_config("flux", folder, work, fields)


def asked(golden, names=("pictures/0.png", "pictures/1.png")):
  return [Prompt(text, {"image": n}) for text, n in zip(stored.prompts(golden), names)]


@pytest.mark.parametrize("scale", [2.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_our_edited_image_is_the_pipelines(golden, folder, work, single_mesh, scale):
  config = make_config(folder, work, {"sampler.guidance_scale": scale})
  right, swapped = asked(golden), asked(golden, ("pictures/0.png",) * 2)
  model = build.build_model(config, single_mesh, [*right, *swapped])
  condition = method_lib.build_condition(config, model, right)
  np.testing.assert_allclose(condition.image, golden["encoded"], atol=1e-4)
  sigmas = method_lib.make_sigmas(config.sampler, model, stored.NUM_STEPS)
  velocity_fn = method_lib.guide(config, model.velocity_fn)

  @jax.jit
  def run(params, x, condition):
    latents = sampler.sample_ode(velocity_fn, params, x, condition, sigmas=sigmas)
    return model.pipeline.decode(params["decoder"], latents)

  params, x = model.params(model.trainable), jnp.asarray(golden["pipeline/latents"])
  found = run(params, x, condition)
  assert np.abs(found - golden[f"images/{scale}"]).max() < TWO_LEVELS
  if scale == 2.5:
    others = run(params, x, method_lib.build_condition(config, model, swapped))
    assert np.abs(others - golden["images/swapped"]).max() < TWO_LEVELS
    assert np.abs(others - found)[1].max() > TWO_LEVELS  # the picture is seen


def test_a_picture_is_stretched_as_diffusers_does_and_shown_to_rewards(golden, tmp_path):
  path = tmp_path / "turned.jpg"
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  Image.fromarray(golden["picture_1"]).save(path, exif=exif, quality=100)
  with Image.open(path) as opened:
    wanted = opened.convert("RGB").transpose(Image.Transpose.ROTATE_270)
  found = pictures.read_picture(path, 48, 80)
  np.testing.assert_array_equal(found, wanted.resize((80, 48), Image.Resampling.LANCZOS))
  assert found.dtype == np.uint8 and found.shape == (48, 80, 3)


def make_nearness():
  """A reward that sees both pictures: minus their mean difference."""

  def reward(images, prompts, metadata):
    both = zip(images, metadata)
    scores = [-np.abs(i.astype(np.float32) - m["image"].astype(np.float32)).mean() for i, m in both]
    assert all(m["image"].dtype == np.uint8 for m in metadata)
    return np.asarray(scores, np.float32), {}

  return reward


def test_the_forecast_reads_pictures_of_the_painted_size(single_mesh):
  model = lowering.abstract_model(tasks.flux_kontext_pickscore(), single_mesh)
  condition = model.pipeline.condition(["A"] * 3)
  assert condition.image.shape == (3, 64, 64, 16) and condition.text.shape == (3, 512, 4096)
  assert model.pipeline.show([Prompt("A", {})]) == [Prompt("A", {})]


NEARNESS = {"nearness": {"weight": 1.0, "make": f"{__name__}:make_nearness"}}


def train(config):
  loop.train(config)
  rows = metrics.read_rows(pathlib.Path(config.run.dir) / "metrics.jsonl")
  return [row for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_an_epoch_of_tp_grpo_is_on_policy_and_its_reward_sees_both_pictures(
  folder, work, tmp_path, one_device
):
  fields = {"run.dir": str(tmp_path / "run"), "rewards": NEARNESS}
  (row,) = train(make_config(folder, work, fields))
  assert row["ratio/first_update_max_abs_log"] == 0.0
  assert row["reward/nearness/std"] > 0 and row["grad_norm"] > 0
  assert row["evaluations_per_sample"] == 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tempflow", "diffusion_nft", "vgpo"])
def test_an_epoch_of_other_methods_is_on_policy(folder, work, tmp_path, one_device, name):
  fields = {"run.dir": str(tmp_path / "run"), "rewards": NEARNESS}
  config = presets.apply(make_config(folder, work, fields), presets.METHODS[name])
  rules.validate(config)
  (row,) = train(config)
  is_policy = config.loss.objective == "policy"
  assert row.get("ratio/first_update_max_abs_log") == (0.0 if is_policy else None)
  assert row["grad_norm"] > 0 and row["reward/std"] > 0


@pytest.mark.exhaustive
def test_a_run_on_a_mesh_that_is_resumed_equals_one_that_is_not(folder, work, tmp_path):
  def run(name, epochs):
    fields = {
      "run.dir": str(tmp_path / name),
      "rewards": NEARNESS,
      "train.epochs": epochs,
      "eval.prompts": 4,
      "eval.batch": 4,
      "mesh": config_lib.Mesh(2, 2, 2),
    }
    kept = ("grad_norm", "reward/", "advantage/", "ratio/")
    rows = train(make_config(folder, work, fields))
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in rows]

  whole = run("whole", 2)
  assert run("parts", 1) == whole[:1]
  assert run("parts", 2) == whole


def test_known_pictures_need_no_encoder_and_others_are_encoded(
  golden, folder, work, single_mesh, monkeypatch
):
  config, known = make_config(folder, work), asked(golden)
  build.build_model(config, single_mesh, known)
  monkeypatch.setattr(prompt_embedding, "load_text_encoders", None)
  monkeypatch.setattr(editing, "_open_encoder", None)
  model = build.build_model(config, single_mesh, known)
  shown = model.pipeline.show(known * 2)
  assert shown[1].metadata["image"].shape == (48, 80, 3) and shown[1].text == known[1].text
  assert shown[1].metadata["image"] is shown[3].metadata["image"]
  np.testing.assert_array_equal(shown[0].metadata["image"], golden["picture_0"])
  sized = dataclasses.replace(config.sampler, height=32)
  with pytest.raises(TypeError):  # encoded again
    build.build_model(dataclasses.replace(config, sampler=sized), single_mesh, known)


def edit(folder, name, change):
  content = json.loads((folder / name).read_text())
  (folder / name).write_text(json.dumps(content | change))


PLAIN = {"_class_name": "FluxPipeline"}


@pytest.mark.parametrize(
  "fields, metadata, break_it, part",
  [
    ({}, {}, None, 'names no picture in "image"'),
    ({}, {"image": 3}, None, 'names no picture in "image"'),
    ({}, {"image": "pictures/none.png"}, None, "none.png: the picture of a prompt cannot be read"),
    ({}, {"image": "pictures"}, None, "the picture of a prompt cannot be read"),
    ({}, {"image": "pictures/\0.png"}, None, "the picture of a prompt cannot be read"),
    ({}, {"image": "~nobody_of_that_name/a.png"}, None, "the picture of a prompt cannot be read"),
    ({}, {"image": "train.jsonl"}, None, "train.jsonl: is no picture that Pillow can read"),
    ({}, {"image": "pictures/0.png"}, lambda f: edit(f, "model_index.json", PLAIN), "holds a FluxPipeline"),
    ({"model.variant": "flux"}, {"image": "pictures/0.png"}, None, "holds a FluxKontextPipeline"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
  folder, work, single_mesh, tmp_path, fields, metadata, break_it, part
):
  if break_it:
    folder = shutil.copytree(folder, tmp_path / "copy")
    break_it(folder)
  config = make_config(folder, work, fields)
  with pytest.raises(ValueError) as caught:
    build.build_model(config, single_mesh, [Prompt("a red cat", metadata)])
  assert part in str(caught.value)


def test_sample_asks_for_a_picture_where_one_is_edited(work, folder, single_mesh, golden):
  config = make_config(folder, work)
  with pytest.raises(ValueError, match="--image: model.variant='flux_kontext' edits a picture"):
    scoring.make_prompts(config, ["a red cat"], None)
  plain = dataclasses.replace(config, model=config_lib.Model("flux", str(folder)))
  with pytest.raises(ValueError, match="paints from text alone. Leave it out"):
    scoring.make_prompts(plain, ["a red cat"], "cat.png")
  prompts = scoring.make_prompts(config, ["a red cat"], str(work / "pictures/1.png"))
  model = build.build_model(config, single_mesh, prompts)
  sample = evaluation.make_sample_fn(config, model, single_mesh, num_steps=2)
  with jax.set_mesh(single_mesh):
    assert sample(model.params(model.trainable), prompts).shape == (1, 48, 80, 3)
