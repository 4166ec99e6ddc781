"""What the built-in models are pretrained on, and that a run leaves a model that can be used."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import names
from tpgrpo_jax.data import shapes, words
from tpgrpo_jax.models import hf, tiny
from tpgrpo_jax.training import build, pretraining


@pytest.mark.parametrize("variant", names.BUILT_IN_VARIANTS)
def test_lessons_have_the_shape_of_the_model_and_texts_that_it_reads(variant):
  model, lessons = tiny.BUILT_IN[variant], pretraining.LESSONS[variant]
  texts, pixels = lessons.draw(np.random.default_rng(0), 12)
  assert pixels.shape == (12, *model.latent_shape) and pixels.dtype == np.uint8
  condition = model.encode(model.config, texts)
  assert condition.text.shape[0] == 12
  assert condition.text.shape[2] == model.config.joint_attention_dim
  assert condition.pooled.shape[1] == model.config.pooled_projection_dim


def test_every_built_in_model_has_lessons_and_a_name_in_the_config():
  assert set(pretraining.LESSONS) == set(tiny.BUILT_IN) == set(names.BUILT_IN_VARIANTS)


def test_lessons_are_of_the_train_split_alone():
  rng = np.random.default_rng(1)
  drawn, _ = pretraining.draw_words(rng, 2000)
  assert {words.split_of(word) for word in drawn} == {"train"}
  drawn, _ = pretraining.draw_shapes(rng, 2000)
  held_out = {
    row["prompt"] for tag in shapes.geneval.TAGS for row in shapes.prompts_of(tag, "test")
  }
  assert not held_out & set(drawn)


@pytest.mark.parametrize("model", tiny.BUILT_IN.values(), ids=tiny.BUILT_IN)
def test_pixels_become_latents_and_come_back(model):
  rng = np.random.default_rng(2)
  pixels = rng.integers(0, 256, (2, *model.latent_shape), dtype=np.uint8)
  latents = tiny.pixels_to_latents(pixels)
  assert (latents.min() >= -1) and (latents.max() <= 1)
  images = tiny.decode(latents)
  assert images.shape == (2, *model.latent_shape[:2], 3)
  np.testing.assert_allclose(images * 255, np.broadcast_to(pixels, images.shape), atol=1e-3)


def test_loss_of_the_true_velocity_is_zero():
  data = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, 2, 3)), jnp.float32)

  def exact(params, x, sigma, condition):
    s = sigma.reshape(-1, 1, 1, 1)  # x = (1 - s) data + s noise
    return (x - (1 - s) * data) / s - data

  loss = pretraining.flow_matching_loss(exact, {}, jax.random.key(0), data, None)
  assert float(loss) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_noise_levels_are_logit_normal_about_the_mean(mean):
  def as_given(params, x, sigma, condition):
    return x  # of data 0: sigma noise, so the loss is that of (1 - sigma)^2

  loss = pretraining.flow_matching_loss(
    as_given, {}, jax.random.key(0), jnp.zeros((8192, 2, 2, 3)), None, logit_mean=mean
  )
  z = np.linspace(-8, 8, 20001)
  weights = np.exp(-(z**2) / 2)
  wanted = np.average((1 - 1 / (1 + np.exp(-(mean + z)))) ** 2, weights=weights)
  assert float(loss) == pytest.approx(wanted, rel=0.05)  # 8,192 levels: a standard error of 1 %


@pytest.mark.slow
def test_a_run_writes_a_model_that_a_recipe_opens(tmp_path, single_mesh, one_device):
  config = config_lib.PretrainConfig(
    run=config_lib.Run(str(tmp_path / "run")),
    output=str(tmp_path / "model"),
    model=config_lib.Model("tiny_shapes"),
    train=config_lib.PretrainTrain(updates=2, batch=4, log_every=1, output_dtype="bfloat16"),
    eval=config_lib.Eval(every=2, num_steps=1, prompts=6, batch=6, rewards=("shapes",)),
  )
  assert pretraining.pretrain(config) == tmp_path / "model"
  rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
  assert [row["update"] for row in rows] == [1, 2, 2]
  assert "reward/shapes/exact" in rows[-1]
  assert hf.load_config(tmp_path / "model") == tiny.SHAPES.config
  with safetensors.safe_open(
    tmp_path / "model" / "diffusion_pytorch_model.safetensors", "np"
  ) as file:
    assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
  used = config_lib.Config(model=config_lib.Model("tiny_shapes", str(tmp_path / "model")))
  model = build.build_model(used, single_mesh, ["a red circle"])
  assert model.pipeline.latent_shape == (32, 32, 3)
