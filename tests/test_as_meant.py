"""A run does what was meant, or says that it does not: cases that were once silently something else."""

import dataclasses
import errno
import json
import os
import pathlib
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from tpgrpo_jax import caches, models
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import advice, rules
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.models import flux, prompt_cache, text_source
from tpgrpo_jax.models.hf import files
from tpgrpo_jax.reporting import plots
from tpgrpo_jax.runs import distributed, metrics
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
  (tmp_path / "model_index.json").write_text(
    json.dumps({"_class_name": "FluxPipeline", "is_distilled": True})
  )
  pipeline.check_distilled(config_lib.Sampler(guidance_scale=scale), tmp_path)
  forward = dataclasses.replace(guided(scale), loss=config_lib.Loss(objective="nft"))
  assert not any("without guidance" in each for each in advice.advise(forward))


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


@pytest.mark.parametrize("kind", ["read-only", "absent", "a file"])
def test_a_cache_that_cannot_be_written_to_is_named_with_the_field_that_moves_it(
  tmp_path, monkeypatch, kind
):
  home = tmp_path / "home"
  if kind == "a file":
    home.write_text("")
  elif kind == "absent":
    home = pathlib.Path("~")  # what expanduser leaves where there is no home
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  else:
    full = lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(pathlib.Path, "mkdir", full)
  for name in ("TFDS_DATA_DIR", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(home))
  with pytest.raises(ValueError, match="the cache of prompts.*--config.prompts.cache="):
    prompts_lib.load_prompts("words", "", "test")
  set_to = []
  monkeypatch.setattr(distributed.jax.config, "update", lambda *pair: set_to.append(pair))
  with pytest.warns(UserWarning, match="the cache of compiled programs.*--config.run.programs="):
    distributed.share_programs("")
  assert not set_to
  source = SimpleNamespace()
  monkeypatch.setattr(prompt_cache, "identity", lambda _: "identity")
  cache = caches.place("prompts")
  with pytest.raises(ValueError, match="the cache of prompt embeddings.*--config.text.cache="):
    prompt_cache.embed_prompts(source, ["a"], cache=cache)  # pyright: ignore


def test_a_cache_that_fills_up_is_named():
  with pytest.raises(ValueError, match=r"text.cache='/full'.*No space left.*--config.text.cache="):
    with caches.writing("prompt embeddings", "/full", "text.cache"):
      raise OSError(errno.ENOSPC, "No space left on device")


def test_doubles_of_the_environment_are_off(monkeypatch):
  seen = []
  monkeypatch.setattr(distributed, "initialize", lambda _: seen.append(jax.config.jax_enable_x64))
  monkeypatch.setattr(distributed, "share_programs", lambda _: None)
  jax.config.update("jax_enable_x64", True)
  try:
    distributed.set_up(config_lib.Config())
  finally:
    jax.config.update("jax_enable_x64", False)
  assert seen == [False]


@pytest.mark.parametrize("backend", ["inline", "module://matplotlib_inline.backend_inline"])
def test_plots_need_no_backend_of_a_notebook(monkeypatch, backend):
  monkeypatch.setenv("MPLBACKEND", backend)
  for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
    monkeypatch.delitem(sys.modules, name)
  with plots.style():
    pass
  assert os.environ["MPLBACKEND"] == backend


SCHEDULER = {
  "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
  "use_dynamic_shifting": True, "base_shift": 0.6, "max_shift": 1.3, "base_image_seq_len": 100,
  "max_image_seq_len": 2000, "shift_terminal": 0.02, "time_shift_type": "exponential",
}  # fmt: skip


def read_scheduler(folder, variant, schedule, **changes):
  (folder / "scheduler").mkdir(exist_ok=True)
  text = json.dumps(SCHEDULER | changes)
  (folder / "scheduler" / "scheduler_config.json").write_text(text)
  sampler = config_lib.Sampler(schedule=schedule)
  return pipeline.read_scheduler(sampler, models.MODELS[variant], folder)


def grid(stored, schedule, num_steps=6, variant="flux"):
  around = SimpleNamespace(grid=stored, latent_shape=(32, 16, 4))
  model = SimpleNamespace(pipeline=around, config=SimpleNamespace(latents=SimpleNamespace(patch=2)))
  return method_lib.make_sigmas(config_lib.Sampler(schedule=schedule), model, num_steps)


def test_the_line_of_a_growing_shift_and_its_last_level_are_the_pipelines_own(tmp_path, recwarn):
  stored = read_scheduler(tmp_path, "flux", "flux")
  assert not recwarn and stored["base_shift"] == 0.6 and stored["max_tokens"] == 2000
  found = grid(stored, "flux")
  mu = 0.6 + (1.3 - 0.6) / 1900 * (128 - 100)
  even = np.linspace(1, 1 / 6, 6)
  shifted = np.exp(mu) / (np.exp(mu) + 1 / even - 1)
  stretched = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
  np.testing.assert_allclose(found, [*stretched, 0], rtol=1e-12)
  assert found[-2] == pytest.approx(0.02)
  np.testing.assert_allclose(
    grid({}, "flux")[1], np.exp(0.47833333) / (np.exp(0.47833333) + 0.2), rtol=1e-6
  )


def test_sd3_with_a_dynamic_shift_is_one_schedule_that_everything_agrees_on(tmp_path, recwarn):
  stored = read_scheduler(tmp_path, "sd3", "sd3_dynamic")
  assert not recwarn and grid(stored, "sd3_dynamic").shape == (7,)
  config = config_lib.Config(
    model=config_lib.Model("sd3", "x"), sampler=config_lib.Sampler(schedule="sd3_dynamic")
  )
  rules.validate(config)
  with pytest.warns(UserWarning, match="made for 'sd3_dynamic'"):
    read_scheduler(tmp_path, "sd3", "sd3")


def test_fields_of_a_scheduler_that_are_not_followed_are_named(tmp_path):
  with pytest.warns(
    UserWarning, match="use_karras_sigmas=True, use_beta_sigmas=True: not followed"
  ):
    read_scheduler(tmp_path, "flux", "flux", use_karras_sigmas=True, use_beta_sigmas=True)
  with pytest.warns(UserWarning, match="_class_name='UniPCMultistepScheduler'"):
    read_scheduler(tmp_path, "flux", "flux", _class_name="UniPCMultistepScheduler")
  with pytest.raises(ValueError, match="base_shift='x': must be a finite number"):
    read_scheduler(tmp_path, "flux", "flux", base_shift="x")


@pytest.mark.parity
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("schedule", ["flux", "sd3_dynamic", "sd3"])
def test_grids_with_the_pipelines_fields_are_diffusers_own(tmp_path, schedule, terminal):
  diffusers = pytest.importorskip("diffusers")
  fields = {k: v for k, v in SCHEDULER.items() if k[0] != "_"} | {
    "shift_terminal": terminal, "use_dynamic_shifting": schedule != "sd3"
  }  # fmt: skip
  theirs = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
  mu = 0.6 + (1.3 - 0.6) / 1900 * (128 - 100)
  given = {"sigmas": np.linspace(1, 1 / 6, 6)} if schedule == "flux" else {"num_inference_steps": 6}
  theirs.set_timesteps(**given, mu=mu if schedule != "sd3" else None)
  variant = "flux" if schedule == "flux" else "sd3"
  stored = read_scheduler(tmp_path, variant, schedule, **fields)
  np.testing.assert_allclose(grid(stored, schedule), theirs.sigmas.numpy(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
  "row, part",
  [
    ({"group/zero_spread": 1.0}, "no group of this epoch has any spread"),
    ({"ratio/first_update_max_abs_log": 2e-6}, "more than a tenth of loss.clip_range=1e-05"),
    ({"clip/inactive": 0.95}, "95% of the terms have no gradient"),
  ],
)
def test_what_an_epoch_knows_is_said_once(capsys, row, part):
  noticed = notices.Notices(config_lib.Config())
  noticed.epoch(
    {"group/zero_spread": 0.9, "ratio/first_update_max_abs_log": 9e-7, "clip/inactive": 0.9}
  )
  assert not capsys.readouterr().err
  noticed.epoch(row)
  noticed.epoch(row)
  said = capsys.readouterr().err
  assert said.count(part) == 1 and len(said.splitlines()) == 1


def test_utilisation_is_said_after_the_epoch_that_compiles(capsys):
  noticed = notices.Notices(config_lib.Config())
  row = {"time/rollout_utilisation": 0.31, "time/update_utilisation": 0.42}
  noticed.epoch(row)
  assert not capsys.readouterr().err
  noticed.epoch(row)
  assert "rollout 31%, update 42%" in capsys.readouterr().err


def test_an_evaluation_far_below_the_best_and_an_average_that_stands_still_are_said(capsys):
  row = {"reward/mean": 0.5, "reward/std": 0.2}
  earlier = [{"epoch": 0, "reward/mean": 0.3}, {"epoch": 10, "reward/mean": 0.6}]
  found = notices.below_best("reward/mean", row, 100, earlier)
  assert found == {"best/epoch": 10, "best/below": pytest.approx(5.0)}
  assert notices.below_best("reward/mean", row, 100, []) == {}
  noticed = notices.Notices(config_lib.Config())
  noticed.evaluation({"epoch": 0, "update": 0, "ema/moves": 0, **row})
  noticed.evaluation({"epoch": 9, "update": 9, "ema/moves": 1, "best/below": 1.9, "best/epoch": 3})
  assert not capsys.readouterr().err
  noticed.evaluation({"epoch": 20, "update": 6, "ema/moves": 0, **row, **found})
  said = capsys.readouterr().err
  assert "5.0 standard errors below its best, after epoch 10" in said
  assert "ema.every=8: the average has not moved after 6 updates" in said


@pytest.mark.parametrize(
  "error", [RuntimeError("write() failed: No space left on device"), OSError(30, "x")]
)
def test_a_cache_without_room_is_named_whoever_says_so(error):
  with pytest.raises(
    ValueError, match="prompts.cache='/full': the cache of prompts cannot be written to"
  ):
    with caches.writing("prompts", "/full", "prompts.cache"):
      raise error
  with pytest.raises(RuntimeError, match="something else"):
    with caches.writing("prompts", "/full", "prompts.cache"):
      raise RuntimeError("something else")
