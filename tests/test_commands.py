"""evaluate, sample and report: on a run, on a base model, and on what they cannot use."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax import command, models, types
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.models import byte_text, hf, lora, mmdit
from tpgrpo_jax.reporting import history, run_recipe
from tpgrpo_jax.runs import best, checkpoint, run_folder
from tpgrpo_jax.training import build, comparing, restore, scoring
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import state as state_lib

ROOT = pathlib.Path(__file__).parents[1]
SMALL = mmdit.MMDiTConfig(
  sample_size=48,
  patch_size=8,
  in_channels=1,
  num_layers=1,
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=byte_text.embedding_dim(6),
  caption_projection_dim=16,
  pooled_projection_dim=byte_text.embedding_dim(6),
  out_channels=1,
  pos_embed_max_size=6,
  qk_norm="rms_norm",
)
REWARD = """
import numpy as np
def make():
  return lambda images, prompts, metadata: (np.arange(len(images), dtype=np.float32), {})
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """A folder with a very small model, prompts, a recipe and a reward."""
  folder = tmp_path_factory.mktemp("work")
  create = models.build_transformer(SMALL)
  split = jax.jit(lambda key: lora.split_trainable(create(key), rank=0)[1:])
  hf.save_transformer(folder / "model", SMALL, lora.merge_trees(*split(jax.random.key(0))))
  (folder / "prompts").mkdir()
  for split in ("train", "test"):
    (folder / "prompts" / f"{split}.txt").write_text("CAT\nDOG\nELK\n")
  (folder / "mine.py").write_text(REWARD)
  (folder / "recipe.py").write_text(
    "from tpgrpo_jax import config as c\ndef get_config():\n"
    f"  r = c.to_config_dict(c.Config())\n  r.model.path = {str(folder / 'model')!r}\n"
    f"  r.prompts.name = 'folder'\n  r.prompts.path = {str(folder / 'prompts')!r}\n"
    "  r.eval.num_steps = 1\n  return r\n"
  )
  return folder


@pytest.fixture(scope="module")
def config(work):
  return dataclasses.replace(
    config_lib.Config(),
    model=config_lib.Model(path=str(work / "model")),
    prompts=config_lib.Prompts("folder", str(work / "prompts")),
    eval=config_lib.Eval(num_steps=1),
  )


@pytest.fixture(scope="module")
def run_dir(work, config):
  """A run whose EMA is the base model's weights plus 1, whose last ones are plus 2 and best ones plus 3."""
  folder = work / "run"
  mesh = mesh_lib.make_mesh(config.mesh)
  model = build.build_model(config, mesh)
  state = state_lib.init_state(model.trainable, state_lib.make_optimizer(config.optimizer))
  shift = jax.jit(lambda tree, by: jax.tree.map(lambda x: x + by, tree))
  state = dataclasses.replace(
    state, trainable=shift(state.trainable, 2), ema=shift(state.ema, 1), update=jnp.int32(14)
  )
  run_folder.save_config(folder, config)
  row = {"epoch": 0, "kind": "eval", "reward/ocr/mean": 0.5, "time/total": 0.0}
  (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  with checkpoint.RunCheckpoints(folder) as checkpoints:
    checkpoints.save(7, state, force=True)
  kept = best.BestWeights(folder, "reward/mean", start=True)
  kept.offer(5, shift(model.trainable, 3), {"reward/mean": 0.5})
  kept.close()
  return folder


# Prints what must not have been imported, after the command has run as `python -m` runs it.
DRIVER = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
  print("imported:", sorted({"torch", "tensorflow"} & set(sys.modules)))
"""


def run_command(work, name, *arguments):
  """Runs a command in `work`, on one device; returns the finished process."""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TFDS_DATA_DIR": str(work / "data"),
    "PYTHONPATH": root,
  }
  return subprocess.run(
    [sys.executable, "-c", DRIVER, f"tpgrpo_jax.{name}", *map(str, arguments)],
    cwd=work,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def assert_shifted(tree, base, by):
  """The sums are the same float32 operation, so they are equal to the last bit."""
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + np.float32(by)), tree, base)


def test_opened_run_holds_its_ema_weights(config, run_dir):
  base = restore.open_model(config)
  opened = restore.open_model(restore.choose_config(str(run_dir), None), run_dir)
  assert_shifted(opened.params["trainable"], base.params["trainable"], 1)


@pytest.mark.parametrize(
  "weights, strength, shift, name",
  [
    ("last", 1.0, 2, "after epoch 7, last weights"),
    ("best", 1.0, 3, "after epoch 5, best weights"),
    ("ema", 0.0, 0, "after epoch 7, EMA weights at strength 0.0"),
  ],
)
def test_opened_run_holds_the_weights_that_were_asked_for(
  config, run_dir, weights, strength, shift, name
):
  base = restore.open_model(config)
  opened = restore.open_model(config, run_dir, weights=weights, strength=strength)
  assert_shifted(opened.params["trainable"], base.params["trainable"], shift)
  assert opened.name == f"{run_dir} {name}"


def test_strength_lies_on_the_line_from_the_base_to_what_was_learned(config, run_dir):
  base = restore.open_model(config).params["trainable"]
  opened = restore.open_model(config, run_dir, strength=0.25).params["trainable"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a - b, 0.25, atol=1e-6), opened, base)


def test_what_a_base_model_has_not_is_refused(config):
  with pytest.raises(ValueError, match="--weights=best, --strength=1.0: .* Give --run"):
    restore.open_model(config, weights="best")


def test_run_without_best_weights_says_why(config, run_dir, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("best"))
  with pytest.raises(ValueError, match="unless checkpoint.best=''. The newest: --weights ema"):
    restore.open_model(config, folder, weights="best")


def test_judging_prompts_that_are_not_there_are_explained(config):
  with pytest.raises(ValueError, match="--split=judge: of the 3 held-out prompts .* leaves 0"):
    scoring.load_split(config, "judge")
  few = dataclasses.replace(config, eval=dataclasses.replace(config.eval, prompts=1))
  texts = lambda *asked, **options: [p.text for p in scoring.load_split(*asked, **options)]
  assert texts(few, "test") == ["CAT"]
  assert texts(few, "judge") == ["DOG", "ELK"]
  assert texts(few, "judge", count=1) == ["DOG"]
  assert texts(few, "train", count=2) == ["CAT", "DOG"]


def test_opening_a_run_changes_nothing_in_it(config, run_dir):
  listing = lambda: {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
  before = listing()
  restore.open_model(config, run_dir)
  assert listing() == before


def test_run_of_another_mesh_opens_on_the_devices_here(config, run_dir):
  elsewhere = dataclasses.replace(config, mesh=config_lib.Mesh(data=64, fsdp=2))
  opened = restore.open_model(elsewhere, run_dir)
  assert opened.mesh.size == jax.device_count()


@pytest.mark.parametrize("made", [False, True], ids=["no_folder", "empty_folder"])
def test_run_without_checkpoint_says_when_there_will_be_one(config, tmp_path, made):
  run_folder.save_config(tmp_path, config)
  if made:
    (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match=r"no finished checkpoint.*checkpoint\.every=10"):
    restore.open_model(config, tmp_path)


@pytest.mark.parametrize("run, recipe", [("", None), ("a", {})], ids=["neither", "both"])
def test_exactly_one_of_run_and_config_is_asked_for(run, recipe):
  with pytest.raises(ValueError, match="must be exactly one"):
    restore.choose_config(run, recipe)


def test_same_seed_gives_the_same_images_and_another_does_not(config):
  opened = restore.open_model(config, prompts=["CAT"])
  prompts = [types.Prompt("CAT", {})]
  paint = lambda seed: scoring.sample_images(opened, prompts, num_steps=1, seed=seed)
  np.testing.assert_array_equal(paint(1), paint(1))
  assert np.any(paint(1) != paint(2))


def test_evaluation_reports_every_reward_and_every_sample():
  images = np.zeros((4, 8, 16, 3), np.uint8)
  prompts = [types.Prompt(word, {}) for word in "ABCD"]
  scores = np.array([0, 0, 1, 1], np.float32)
  infos = {"ocr": {"text": list("XXCD"), "exact": scores}, "other": {}}
  reward = lambda *_, rows: lambda: (scores, {"ocr": scores, "other": 2 * scores}, infos)
  result = scoring.evaluate_images(images, prompts, reward)
  expected = {"mean": 0.5, "std": 0.5, "standard_error": pytest.approx(3**-0.5 / 2), "exact": 0.5}
  assert result["rewards"]["ocr"] == expected
  assert result["rewards"]["other"]["mean"] == 1.0 and "exact" not in result["rewards"]["other"]
  assert result["samples"][2] == {
    "prompt": "C", "scores": {"ocr": 1.0, "other": 2.0}, "read": {"ocr": "C"},
  }  # fmt: skip


@pytest.mark.parametrize("strength", ["nan", "-0.5"])
def test_strength_that_no_weights_have_is_refused(work, run_dir, strength):
  done = run_command(work, "export", "--run", run_dir, f"--strength={strength}", "--output", "none")
  assert done.returncode == 1 and not (work / "none").exists()
  assert f"flag --strength={strength}: must be finite and >= 0" in done.stderr


def test_prompts_file_that_cannot_be_used_is_named(tmp_path):
  empty = tmp_path / "empty.txt"
  empty.write_text("\n \n")
  for path in (empty, tmp_path / "none.txt"):
    with pytest.raises(ValueError, match=f"--prompts_file='{path}'"):
      scoring.load_prompt_lines(path)


def test_prompts_file_is_read_as_the_files_of_a_dataset_are(tmp_path):
  lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
  lines.write_bytes("\ufeffa cat\r\n\r\n a dog \n".encode())
  rows.write_text('{"prompt": "a cat", "text": "CAT"}\n{"prompt": "a dog"}\n')
  assert scoring.load_prompt_lines(lines) == scoring.load_prompt_lines(rows) == ["a cat", "a dog"]
  for name, content in (
    ("b.txt", rows.read_text()),
    ("c.txt", '[{"prompt": "a cat"},\n'),
    ("d.txt", "id,prompt\n1,a\n"),
  ):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"--prompts_file='.*{name}'.*would be the prompts"):
      scoring.load_prompt_lines(tmp_path / name)


def test_a_run_that_is_compared_is_sampled_as_the_other_and_looked_for_first(run_dir, tmp_path):
  own = history.load_run_config(run_dir)
  config = dataclasses.replace(own, sampler=dataclasses.replace(own.sampler, guidance_scale=3.0))
  assert comparing.choose_other(config, "base") is config
  other = comparing.choose_other(config, str(run_dir))
  assert other.sampler == config.sampler and other.train == own.train
  with pytest.raises(ValueError, match="no such folder"):
    comparing.choose_other(config, str(tmp_path / "typo"))


@pytest.mark.slow
def test_evaluate_a_run_by_built_in_and_own_rewards(work, run_dir):
  done = run_command(
    work, "evaluate", "--run", run_dir, "--rewards", "jpeg_compressibility,mine:make",
    "--split", "train", "--prompts", 2, "--output", "scores", "--weights", "best",
    "--sampler", "stochastic", "--strength", 0.5,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((work / "scores" / "evaluation.json").read_text())
  assert result["rewards"]["mine:make"]["mean"] == 0.5  # the scores are 0 and 1
  assert [s["prompt"] for s in result["samples"]] == ["CAT", "DOG"]
  assert "after epoch 5, best weights at strength 0.5" in result["model"]
  assert result["split"] == "train" and result["sampler"] == "stochastic"
  assert "mine:make" in done.stdout and "imported: []" in done.stdout
  assert (work / "scores" / "grid.png").is_file()
  arguments = ("--run", run_dir, "--rewards", "mine:make", "--output", "scores")
  again = run_command(work, "evaluate", *arguments)
  assert again.returncode == 1 and "holds an earlier evaluation.json" in again.stderr
  assert json.loads((work / "scores" / "evaluation.json").read_text()) == result
  asked = run_command(work, "evaluate", *arguments, "--overwrite")
  assert asked.returncode == 0, asked.stderr
  assert json.loads((work / "scores" / "evaluation.json").read_text()) != result


def test_evaluate_compares_with_the_base_from_the_same_noise_with_fields_of_its_own(work, run_dir):
  (work / "others").mkdir(exist_ok=True)
  (work / "others" / "test.txt").write_text("OWL\nFOX\nEMU\n")
  done = run_command(
    work, "evaluate", "--run", run_dir, f"--config.prompts.path={work / 'others'}", "--compare", "base",
    "--rewards", "jpeg_compressibility,mine:make", "--output", "compared", "--epoch", 7,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads((work / "compared" / "evaluation.json").read_text())
  assert [s["prompt"] for s in result["samples"]] == ["OWL", "FOX", "EMU"]
  compared = result["compared"]
  assert compared["model"].startswith("base model") and "after epoch 7" in result["model"]
  # Its scores are the numbers of the pictures: the paired differences are all 0.
  assert compared["gain"]["mine:make"] == {"mean": 0.0, "standard_error": 0.0}
  gain = compared["gain"]["jpeg_compressibility"]
  before, after = (r["rewards"]["jpeg_compressibility"]["mean"] for r in (compared, result))
  assert gain["mean"] == pytest.approx(after - before, abs=1e-6) and gain["mean"] != 0
  assert "mine:make" in done.stdout and "a gain of +0.0000" in done.stdout


def test_fields_that_change_the_weights_of_a_run_are_refused(run_dir):
  recipe = run_recipe.get_config(str(run_dir))
  recipe.sampler.guidance_scale = 2.0
  assert restore.choose_config(str(run_dir), recipe).sampler.guidance_scale == 2.0
  recipe.lora.rank = 4
  with pytest.raises(ValueError, match=r"--config.lora.rank=4: the run has 0"):
    restore.choose_config(str(run_dir), recipe)


def test_how_processes_meet_is_the_commands_own(run_dir):
  recipe = run_recipe.get_config(str(run_dir))
  assert recipe.distributed.coordinator == config_lib.Distributed().coordinator
  recipe.distributed.coordinator = "localhost:23456"
  chosen = restore.choose_config(str(run_dir), recipe)
  assert chosen.distributed.coordinator == "localhost:23456"


def test_an_epoch_that_is_not_kept_is_refused_with_those_that_are(config, run_dir):
  with pytest.raises(ValueError, match=r"--epoch=3: the run has checkpoints after \[7\]"):
    restore.open_model(config, run_dir, epoch=3)
  with pytest.raises(ValueError, match="best weights have an epoch of their own"):
    restore.open_model(config, run_dir, epoch=7, weights="best")


def test_paired_differences_have_the_smaller_error():
  rng = np.random.default_rng(0)
  base = rng.normal(size=200)
  scored = lambda values: {"rewards": {"a": {}}, "samples": [{"scores": {"a": v}} for v in values]}
  found = comparing.gains(scored(base + 0.1 + 0.01 * rng.normal(size=200)), scored(base))["a"]
  assert found.mean == pytest.approx(0.1, abs=0.003)
  assert found.standard_error == pytest.approx(0.01 / np.sqrt(200), rel=0.2)


def test_evaluate_names_an_unknown_reward(work):
  done = run_command(work, "evaluate", "--config", "recipe.py", "--rewards", "jpeg_compresibility")
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith("error: ") and "Did you mean 'jpeg_compressibility'?" in last
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "arguments, part",
  [
    (("--config", "recipe.py", "--config.trian.epochs=2"), "Did you mean 'train'?"),
    (("--config", "recipe.py", "more.py"), "unexpected arguments more.py"),
    ((), "--config: no recipe"),
    (("--config", "nowhere.py"), "--config='nowhere.py': no such file"),
    (("--confg", "nowhere.py"), "Did you mean: config"),
    (("--config", "recipe.py", "--config.train.epochs=abc"), "config.train.epochs=abc"),
  ],
)
def test_train_says_in_one_line_what_it_cannot_use(work, arguments, part):
  done = run_command(work, "train", *arguments)
  assert done.returncode == 1
  assert part in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


def test_train_checks_a_run_and_starts_nothing(work):
  sizes = (
    "--config.train.prompts_per_epoch=2",
    "--config.train.group_size=4",
    "--config.train.microbatch=8",
  )
  done = run_command(
    work, "train", "--check", "--config", "recipe.py", "--config.rewards={'mine:make': 1.0}",
    "--config.train.updates_per_epoch=1", "--config.run.dir=unborn", *sizes,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "mine:make=.000" in done.stdout and "nothing was started" in done.stdout
  assert "imported: []" in done.stdout and not (work / "unborn").exists()


def test_own_warnings_are_their_message_and_others_keep_their_place():
  own, other = str(command.PACKAGE / "runs" / "best.py"), "/elsewhere/mine.py"
  assert command._format_warning("said", UserWarning, own, 1) == "warning: said\n"
  assert "mine.py:7: UserWarning: said" in command._format_warning(
    "said", UserWarning, other, 7, ""
  )
  assert "best.py:7: DeprecationWarning" in command._format_warning(
    "x", DeprecationWarning, own, 7, ""
  )


@pytest.mark.parametrize("name", ["export", "report", "train"])
def test_help_is_no_error(name):
  done = subprocess.run(
    [sys.executable, "-m", f"tpgrpo_jax.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0 and "--" in done.stdout and not done.stderr


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(flag):
  process = subprocess.Popen(
    [sys.executable, "-m", "tpgrpo_jax.train", flag],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  process.stdout.close()
  assert process.wait(timeout=120) == 141 and process.stderr.read() == b""


def test_an_error_that_is_not_the_users_keeps_its_traceback(work):
  (work / "broken.py").write_text("def make():\n  return lambda *_: int('one')\n")
  done = run_command(work, "evaluate", "--config", "recipe.py", "--rewards", "broken:make")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "int('one')" in done.stderr


def test_sample_paints_every_prompt_of_the_base_model(work):
  (work / "more.txt").write_text("ELK\n")
  done = run_command(
    work, "sample", "--config", "recipe.py", "--config.seed=3", "CAT", "A/B", "--samples", 2,
    "--prompts_file", "more.txt", "--guidance_scale", 2.0, "--output", "painted",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  names = sorted(p.name for p in (work / "painted").iterdir())
  words = ["CAT", "CAT", "A_B", "A_B", "ELK", "ELK"]
  assert names == [f"{i:04d}_{word}.png" for i, word in enumerate(words)] + ["grid.png"]
  assert Image.open(work / "painted" / names[0]).size == (48, 24)
  again = run_command(work, "sample", "--config", "recipe.py", "EMU", "--output", "painted")
  assert again.returncode == 1 and "earlier grid.png" in again.stderr
  assert sorted(p.name for p in (work / "painted").iterdir()) == names


def test_sample_without_prompts_says_where_to_put_them(work):
  done = run_command(work, "sample", "--config", "recipe.py")
  assert done.returncode != 0 and "--prompts_file" in done.stderr


def test_report_writes_a_page_and_prints_the_table(work, run_dir):
  done = run_command(work, "report", f"first={run_dir}", "--output", "drawn")
  assert done.returncode == 0, done.stderr
  assert (work / "drawn" / "report.html").is_file()
  assert "first" in done.stdout and "0.500" in done.stdout and "imported: []" in done.stdout


@pytest.mark.parametrize("command", ["evaluate", "sample", "pretrain"])
def test_output_that_cannot_be_used_is_refused_before_any_work(work, command):
  (work / "full").mkdir(exist_ok=True)
  (work / "full" / "thesis.txt").write_text("mine")
  (work / "plain").write_text("")
  arguments = {
    "evaluate": ("--config", "recipe.py", "--output", "plain"),
    "sample": ("CAT", "--config", "recipe.py", "--output", "plain"),
    "pretrain": (
      "--config", str(ROOT / "configs/tiny_text_pretrain.py"), "--config.output=full",
    ),
  }[command]  # fmt: skip
  done = run_command(work, command, *arguments)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert "thesis.txt" in last if command == "pretrain" else "'plain': must be a folder" in last
  assert (work / "full" / "thesis.txt").read_text() == "mine"
