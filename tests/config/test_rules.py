"""Bad input is refused before anything compiles, by a message with field, value, rule and fix."""

import dataclasses
import re
import sys

import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.config import rules
from tpgrpo_jax.data import prompts as prompts_lib


def changed(fields, config=None):
  config = config or config_lib.Config()
  for name, value in fields.items():
    group, _, field = name.partition(".")
    if field:
      value = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group: value})
  return config


def message_of(function, *arguments, **options):
  with pytest.raises((ValueError, ImportError)) as caught:
    function(*arguments, **options)
  return str(caught.value)


def assert_line(message, parts):
  """One line of the message holds all the parts."""
  assert any(all(part in line for part in parts) for line in message.splitlines()), message


# fields changed -> what one line of the message must say: field = value, rule, fix
BAD = {
  "group_of_one": (
    {"train.group_size": 1},
    ("train.group_size=1:", "must be at least 2", "The papers use 24"),
  ),
  "more_updates_than_can_be_counted": (
    {"train.epochs": 2_000_000_000},
    ("train.epochs=2000000000:", "train.updates_per_epoch=2", "at most 2,147,483,647", "fewer"),
  ),
  "window_past_the_end": (
    {"sampler.window": (2, 12)},
    ("sampler.window=(2, 12):", "the end must be <= sampler.num_steps=10", "set num_steps to 12"),
  ),
  "window_without_a_step": (
    {"sampler.window": (3, 3)},
    ("sampler.window=(3, 3):", "0 <= start < end", "such as (0, 9)"),
  ),
  "window_before_the_start": (
    {"sampler.window": (-1, 3)},
    ("sampler.window=(-1, 3):", "0 <= start"),
  ),
  "cps_window_with_the_last_step": (
    {"sampler.window": (0, 10)},
    ("sampler.window=(0, 10):", "the last step of cps has no noise", "Shorten the window"),
  ),
  "window_range_too_short": (
    {"sampler.window": (0, 4), "sampler.window_range": (0, 3)},
    ("sampler.window_range=(0, 3):", "must hold the window's 4 steps", "Widen it"),
  ),
  "window_range_past_the_end": (
    {"sampler.window": (0, 2), "sampler.window_range": (0, 11), "sampler.dynamics": "sde"},
    ("sampler.window_range=(0, 11):", "lie in 0 ... 10"),
  ),
  "window_range_of_three": ({"sampler.window_range": (0, 1, 2)}, ("(0, 1, 2):", "() or (lo, hi)")),
  "no_noise": (
    {"sampler.noise_level": 0.0},
    ("sampler.noise_level=0.0:", "must be finite and > 0", "The papers use 0.7"),
  ),
  "too_much_noise_for_cps": (
    {"sampler.noise_level": 1.5},
    ("noise_level=1.5:", "at most 1 for cps"),
  ),
  "shift_of_zero": (
    {"sampler.shift": 0.0},
    ("sampler.shift=0.0:", "must be finite and > 0", "SD3 uses 3"),
  ),
  "guidance_of_nan": (
    {"sampler.guidance_scale": float("nan")},
    ("sampler.guidance_scale=nan:", "must be finite and >= 0", "0 ... 1 is no guidance"),
  ),
  "negative_seed": ({"seed": -1}, ("seed=-1:", "must be 0 ... 2**32 - 1", "Use 0")),
  "seed_beyond_32_bits": ({"seed": 2**40}, ("must be 0 ... 2**32 - 1", "Use 0")),
  "one_slash": ({"run.dir": "gs:/bucket/run"}, ("run.dir='gs:/bucket/run'", "gs://bucket/folder")),
  "processes_without_address": (
    {"distributed.num_processes": 2},
    ("distributed.num_processes=2", "distributed.coordinator", "address of process 0"),
  ),
  "port_of_no_socket": (
    {"distributed.coordinator": "host:99999"},
    ("distributed.coordinator='host:99999'", "host:port", "10.0.0.2:8476"),
  ),
  "no_run_folder": ({"run.dir": ""}, ("run.dir='':", "must name a folder", "runs/mine")),
  "weight_decay_of_nan": (
    {"optimizer.weight_decay": float("nan")},
    ("optimizer.weight_decay=nan:", "must be finite and >= 0", "0 is none"),
  ),
  "decay_to_the_base": (
    {"optimizer.decay_to": "base"},
    ("optimizer.decay_to='base':", "zero", "start"),
  ),
  "decay_of_nothing_to_the_start": (
    {"optimizer.decay_to": "start", "optimizer.weight_decay": 0.0},
    ("optimizer.decay_to='start':", "nothing decays"),
  ),
  "decay_of_all_in_one_update": (
    {"optimizer.weight_decay": 1e4},
    ("optimizer.weight_decay=10000.0:", "learning_rate", "must be < 1", "Lower it"),
  ),
  "adapters_on_nothing": (
    {"lora.rank": 2, "lora.targets": ()},
    ("lora.targets=():", "must name layers", "attn.to_q"),
  ),
  "one_step_of_cps": (
    {"sampler.num_steps": 1, "sampler.window": (0, 1)},
    ("sampler.window=(0, 1):", "has no log-prob", "Raise sampler.num_steps"),
  ),
  "updates_that_do_not_divide_the_epoch": (
    {"train.updates_per_epoch": 3},
    ("train.updates_per_epoch=3:", "must divide", "= 128 samples", "Set it to 1"),
  ),
  "no_steps": ({"sampler.num_steps": 0}, ("sampler.num_steps=0:", "must be at least 1")),
  "no_epochs": ({"train.epochs": 0}, ("train.epochs=0:", "must be at least 1")),
  "negative_rank": ({"lora.rank": -1}, ("lora.rank=-1:", "must be at least 0")),
  "adapter_file_without_a_rank": (
    {"lora.path": "runs/mine/lora"},
    ("lora.path='runs/mine/lora':", "adapters need lora.rank > 0", "Set lora.rank"),
  ),
  "checkpoint_never": ({"checkpoint.every": 0}, ("checkpoint.every=0:", "must be at least 1")),
  "microbatch_that_does_not_divide": (
    {"train.microbatch": 48},
    (
      "train.microbatch=48:",
      "must divide the 64 samples of an update",
      "128 / 2",
      "Set microbatch to 32 or 64",
    ),
  ),
  "unknown_credit": (
    {"credit.method": "tp_gpro"},
    (
      "credit.method='tp_gpro':",
      "unknown name",
      "Did you mean 'tp_grpo'?",
      "package.module:function",
    ),
  ),
  "unknown_model": (
    {"model.variant": "tinny"},
    (
      "model.variant='tinny':",
      "unknown name",
      "Did you mean 'tiny'?",
      "Choices: flux, flux2, flux_kontext, sd3, tiny, tiny_shapes, z_image",
    ),
  ),
  "pipeline_without_a_path": (
    {"model.variant": "sd3"},
    ("model.path='':", "needs a pipeline in diffusers' layout", "Set model.path"),
  ),
  "flux_without_t5": (
    {"model.variant": "flux", "model.path": "x", "text.t5": False},
    ("text.t5=False:", "nothing but T5's tokens", "Set it to True"),
  ),
  "kontext_without_t5": (
    {"model.variant": "flux_kontext", "model.path": "x", "text.t5": False},
    ("text.t5=False:", "nothing but T5's tokens", "Set it to True"),
  ),
  "editing_without_pictures": (
    {"model.variant": "flux_kontext", "model.path": "x", "prompts.name": "words"},
    ("prompts.name='words':", "edits pictures, so each prompt needs one", 'have an "image"'),
  ),
  "schedule_of_another_model": (
    {"sampler.schedule": "flux"},
    ("sampler.schedule='flux':", "the model of that name", "Use 'sd3'"),
  ),
  "schedule_of_flux_1": (
    {"sampler.schedule": "flux", "model.variant": "flux2", "model.path": "x"},
    ("sampler.schedule='flux':", "model.variant='flux2' was made for another", "Use 'flux2'"),
  ),
  "t5_of_a_model_without": (
    {"model.variant": "z_image", "model.path": "x", "text.t5": False},
    ("text.t5=False:", "no T5 to leave out", "Set it to True"),
  ),
  "too_many_tokens": (
    {"text.max_sequence_length": 600},
    ("text.max_sequence_length=600:", "must be 1 ... 512", "0 for"),
  ),
  "quantised_weights_that_are_trained": (
    {"model.quantize": "int8"},
    ("model.quantize='int8':", "cannot be quantised", "Set lora.rank"),
  ),
  "unknown_text_device": ({"text.device": "gpu"}, ("text.device='gpu':", "Choices: cpu, mesh")),
  "no_image_a_chunk": ({"vae.images_per_chunk": 0}, ("vae.images_per_chunk=0:", "at least 1")),
  "negative_height": ({"sampler.height": -16}, ("sampler.height=-16:", "at least 0")),
  "unknown_dynamics": (
    {"sampler.dynamics": "spc"},
    ("sampler.dynamics='spc':", "unknown name", "Choices: cps, dance, sde"),
  ),
  "unknown_schedule": ({"sampler.schedule": "linaer"}, ("'linaer'", "Did you mean 'linear'?")),
  "unknown_solver": (
    {"completion.solver": "eular"},
    ("completion.solver", "Did you mean 'euler'?"),
  ),
  "unknown_eval_reward": (
    {"eval.rewards": ("orc",)},
    ("eval.rewards='orc':", "unknown name", "Did you mean 'ocr'?"),
  ),
  "unknown_prompts": (
    {"prompts.name": "word"},
    ("prompts.name='word':", "unknown name", "Did you mean 'words'?"),
  ),
  "folder_without_a_path": (
    {"prompts.name": "folder"},
    ("prompts.path='':", "needs a folder with train.txt and test.txt", "Set prompts.path"),
  ),
  "geneval_without_a_path": (
    {"prompts.name": "geneval"},
    ("prompts.path='':", "a folder with train_metadata.jsonl", "Set prompts.path"),
  ),
  "no_rewards": (
    {"rewards": {}},
    ("rewards={}:", "one reward or more", "Try rewards={'ocr': 1.0}"),
  ),
  "rewards_of_no_weight": (
    {"rewards": {"ocr": 0.0, "own": {"weight": 0, "make": "own:make"}}},
    ("all weights are 0 (ocr, own)", "Give one a weight"),
  ),
  "clip_range_of_zero": ({"loss.clip_range": 0.0}, ("loss.clip_range=0.0:", "finite and > 0")),
  "infinite_rate": (
    {"optimizer.learning_rate": float("inf")},
    ("optimizer.learning_rate=inf:", "must be finite and > 0"),
  ),
  "negative_kl": ({"loss.kl_coef": -0.1}, ("loss.kl_coef=-0.1:", "must be >= 0", "0 leaves")),
  "best_by_nothing_known": (
    {"checkpoint.best": "reward/orc/mean"},
    (
      "checkpoint.best='reward/orc/mean':",
      "reward/mean or reward/ocr/mean",
      "Did you mean 'reward/ocr/mean'?",
    ),
  ),
  "best_of_a_reward_that_is_not_evaluated": (
    {"checkpoint.best": "reward/ocr/mean", "eval.rewards": ("jpeg_compressibility",)},
    ("checkpoint.best='reward/ocr/mean':", "reward/jpeg_compressibility/mean"),
  ),
  "patience_without_best": (
    {"eval.patience": 3, "checkpoint.best": ""},
    ("eval.patience=3:", "checkpoint.best=''", "Set both of them"),
  ),
  "patience_without_evaluations": (
    {"eval.patience": 3, "eval.every": 0},
    ("eval.patience=3:", "eval.every=0", "patience to 0"),
  ),
  "negative_patience": ({"eval.patience": -1}, ("eval.patience=-1:", "at least 0")),
  "negative_judges": ({"eval.judge_prompts": -1}, ("eval.judge_prompts=-1:", "at least 0")),
  "decay_of_one": ({"ema.decay": 1.0}, ("ema.decay=1.0:", "in [0, 1)", "0 keeps no average")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused_with_field_value_rule_and_fix(name):
  fields, parts = BAD[name]
  assert_line(message_of(rules.validate, changed(fields)), parts)


def test_all_mistakes_are_listed_at_once():
  fields = {"train.group_size": 1, "sampler.window": (2, 12), "credit.method": "grpo"}
  message = message_of(rules.validate, changed(fields))
  for part in ("train.group_size=1", "sampler.window=(2, 12)", "credit.method='grpo'"):
    assert part in message


@pytest.mark.parametrize("microbatch", [24, 48, 40, 100, 256])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_microbatch_that_the_message_proposes_is_accepted(microbatch, updates):
  fields = {"train.updates_per_epoch": updates}
  config = changed(fields | {"train.microbatch": microbatch})
  message = message_of(rules.validate, config)
  proposed = int(re.search(r"Set microbatch to (\d+)", message)[1])
  rules.validate(changed({"train.microbatch": proposed}, config))


@pytest.mark.parametrize(
  "fields",
  [
    {"sampler.dynamics": "sde", "sampler.window": (0, 10)},
    {"sampler.window": (0, 2), "sampler.window_range": (0, 9)},
    {"credit.method": "my.module:credit"},
    {"eval.rewards": ("my.module:make",)},
    {"ema.decay": 0.0},
    {"eval.every": 0},
  ],
)
def test_config_at_the_edge_is_accepted(fields):
  rules.validate(changed(fields))


def test_unknown_reward_is_refused_with_the_nearest_name():
  message = message_of(rewards.make_rewards, {"jpeg_compressability": 1.0})
  parts = ("rewards.jpeg_compressability='jpeg_compressability':", "unknown name",
           "Did you mean 'jpeg_compressibility'?", "package.module:function")  # fmt: skip
  assert_line(message, parts)


def test_missing_ocr_packages_are_named_with_the_pip_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "rapidocr", None)
  message = message_of(rewards.make_rewards, {"ocr": 1.0})
  assert_line(message, ("the ocr reward needs packages that are not installed", "rapidocr"))
  assert "pip install 'rapidocr" in message


@pytest.mark.parametrize(
  "files, parts",
  [
    ({}, ("prompts.path=", "holds no prompts", "train.txt", "add at least one")),
    ({"test.txt": "CAT"}, ("prompts.path=", "holds no train prompts", "Add one of train.txt")),
    ({"train.txt": " \n\n"}, ("train.txt", "holds no prompts", "Write one a line")),
    (
      {"train.jsonl": '{"prompt": "a"}\n{"prompt": }\n'},
      ("train.jsonl:2:", "is not JSON", "Write one object a line"),
    ),
    (
      {"train.jsonl": '{"prompt": "a"}\n{"promt": "b"}\n'},
      ("train.jsonl:2:", '"prompt" is a text that is not empty', "Add the prompt"),
    ),
  ],
  ids=["no_file", "no_train_file", "empty_file", "broken_line", "line_without_prompt"],
)
def test_bad_prompt_folder_is_refused_with_the_file_and_line(files, parts, tmp_path):
  folder = tmp_path / "prompts"
  folder.mkdir()
  for name, content in files.items():
    (folder / name).write_text(content)
  load = prompts_lib.load_prompts
  message = message_of(load, "folder", str(folder), "train", data_dir=tmp_path / "prepared")
  assert_line(message, parts)


def test_missing_prompt_folder_is_refused(tmp_path):
  message = message_of(prompts_lib.load_prompts, "folder", str(tmp_path / "none"), "train")
  assert_line(message, ("prompts.path=", "none", "must be a folder", "Point it at one"))


def test_bad_pretraining_config_is_refused():
  config = config_lib.PretrainConfig(
    train=config_lib.PretrainTrain(text_dropout=1.0, updates=0, output_dtype="float8")
  )
  message = message_of(rules.validate_pretrain, config)
  assert_line(message, ("train.text_dropout=1.0:", "must be in [0, 1)"))
  assert_line(message, ("train.updates=0:", "must be at least 1"))
  assert_line(message, ("train.output_dtype='float8'", "bfloat16"))
  config = config_lib.PretrainConfig(model=config_lib.Model(path="somewhere"))
  message = message_of(rules.validate_pretrain, config)
  assert_line(message, ("model.path='somewhere':", "must be empty", "`output`"))
