"""A run does what was meant, or says that it does not: cases that were once silently something else."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import method_rules
from tpgrpo_jax.models import flux, text_source
from tpgrpo_jax.models.hf import files
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import build, notices, pipeline
from tpgrpo_jax.training import method as method_lib


def guided(scale, variant="sd3"):
  return config_lib.Config(
    model=config_lib.Model(variant), sampler=config_lib.Sampler(guidance_scale=scale)
  )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_one_and_below_is_none_as_in_diffusers(scale, tmp_path):
  assert not method_lib.is_guided(guided(scale))
  velocity_fn = lambda *inputs: inputs
  assert method_lib.guide(guided(scale), velocity_fn) is velocity_fn
  # Model cards of distilled models say 0.
  sizes = flux.FluxConfig(num_layers=1, num_single_layers=1, guidance_embeds=False)
  build.outline(guided(scale, "flux"), sizes)
  (tmp_path / "model_index.json").write_text(json.dumps({"is_distilled": True}))
  pipeline.check_distilled(config_lib.Sampler(guidance_scale=scale), tmp_path)
  forward = dataclasses.replace(guided(scale), loss=config_lib.Loss(objective="nft"))
  assert not any("without guidance" in each for each in method_rules.advise(forward))


def test_guidance_above_one_is_guidance(tmp_path):
  assert method_lib.is_guided(guided(1.5)) and not method_lib.is_guided(guided(1.5, "flux"))
  sizes = flux.FluxConfig(num_layers=1, num_single_layers=1, guidance_embeds=False)
  with pytest.raises(ValueError, match="knows no guidance"):
    build.outline(guided(1.5, "flux"), sizes)


@pytest.mark.parametrize(
  "name, word",
  [("FluxFillPipeline", "mask"), ("FluxControlPipeline", "Depth"), ("FluxKontextPipeline", "edits"),
   ("FluxControlImg2ImgPipeline", "Canny")],
)  # fmt: skip
def test_pipelines_that_need_more_than_text_are_named(tmp_path, name, word):
  (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
  with pytest.raises(ValueError, match=f"holds a {name}: FLUX.1-.*{word}"):
    text_source.check_from_text(tmp_path)
  for same_weights in ("FluxPipeline", "FluxImg2ImgPipeline"):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": same_weights}))
    text_source.check_from_text(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "float64"])
def test_weights_that_are_not_finite_end_at_reading_with_their_name(tmp_path, value, dtype):
  tensor = np.zeros((3, 5), dtype)
  files.check_finite(tensor, "good", tmp_path)
  files.check_finite(
    np.array([np.finfo(dtype).max if dtype != ml_dtypes.bfloat16 else 3e38], dtype),
    "large",
    tmp_path,
  )
  tensor[2, 4] = value
  with pytest.raises(ValueError, match="the tensor blocks.1.bad holds NaN or infinity"):
    files.check_finite(tensor, "blocks.1.bad", tmp_path)


def test_shares_of_the_advantages_variance_add_up_and_follow_the_scales():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=64), 100 * rng.normal(size=64)
  share = lambda **options: metrics.variance_shares(
    {"a": a, "b": b}, {"a": 1.0, "b": 1.0}, 8, **options
  )
  drowned, even = share(per_reward=False), share(per_reward=True)
  for found in (drowned, even):
    assert sum(found.values()) == pytest.approx(1)
  assert drowned["reward/b/share"] > 0.99 and abs(even["reward/b/share"] - 0.5) < 0.15
  # A level that all samples of a prompt share has no part in it.
  lifted = metrics.variance_shares(
    {"a": a + 1000 * np.repeat(np.arange(8), 8), "b": b}, {"a": 1.0, "b": 1.0}, 8, per_reward=False
  )
  assert lifted == pytest.approx(drowned)
  assert not metrics.variance_shares({"a": a}, {"a": 1.0}, 8, per_reward=False)


def test_a_reward_that_drowns_the_others_is_said_once_with_the_remedy(capsys):
  noticed = notices.Notices(config_lib.Config())
  row = {"reward/a/share": 0.03, "reward/b/share": 0.97, "reward/a/mean": 0.5}
  noticed.epoch(row)
  noticed.epoch(row)
  said = capsys.readouterr().err
  assert said.count("reward 'b' makes 97%") == 1
  assert "advantage.per_reward=True" in said and "'a' hardly counts" in said
  notices.Notices(config_lib.Config()).epoch(row | {"reward/b/share": 0.9})
  assert not capsys.readouterr().err
