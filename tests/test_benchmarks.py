"""The benchmarks of the true models run at small sizes, and print what they say."""

import argparse
import gzip
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tpgrpo_jax.config import presets
from tpgrpo_jax.reporting import history
from tpgrpo_jax.training import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def output_of(name, *arguments):
  """What a benchmark prints, run on one CPU device."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  return done.stdout


def run(name, *arguments):
  """The JSON lines of a benchmark."""
  lines = output_of(name, *arguments).splitlines()
  return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.exhaustive
def test_compile_time_compares_scanned_with_unrolled_blocks():
  small = ("--model=flux_dev", "--small=2", "--repeats=1", "--batch=1", "--remat=none")
  (line,) = run("compile_time", *small)
  assert line["operations"]["unrolled"] > line["operations"]["scanned"]
  assert line["ratio"] > 0 and line["phases"].keys() == {"scanned", "unrolled"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35_medium", "flux_dev", "flux2_klein", "z_image"])
def test_true_models_of_every_family_are_whole_runs(monkeypatch, name):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  true_models = importlib.import_module("true_models")
  model = true_models.shrink(true_models.TRUE_MODELS[name], 2)
  run = true_models.open_run(model, batch=2, remat="none")
  assert {k for k, v in run.trainable.items() if v} <= run.frozen.keys()
  x, sigma = (jax.ShapeDtypeStruct((2, *rest), jnp.float32) for rest in (model.latent, ()))
  params = {"frozen": run.frozen, "trainable": run.trainable}
  given = true_models.conditions(model, 2)
  assert jax.eval_shape(run.method.velocity_fn, params, x, sigma, given).shape == x.shape


@pytest.mark.exhaustive
def test_quantize_reports_both_kinds():
  lines = run("quantize", "--small", "--blocks=1")
  assert [line["kind"] for line in lines] == ["int8", "nf4"]
  assert all(line["weight_error"] < 0.1 for line in lines)
  assert all(line["gib"][line["kind"]] <= line["gib"]["bfloat16"] for line in lines)


@pytest.mark.exhaustive
def test_accelerator_measures_a_small_model_on_a_cpu():
  lines = run(
    "accelerator", "--small", "--model=flux_dev", "--batch=1", "--repeats=1", "--no-torch"
  )
  figures = {line["figure"]: line for line in lines}
  assert figures.keys() == {"matmul_peak", "evaluation_jax", "rollout", "update"}
  work = [figures[name]["tflop"] for name in ("evaluation_jax", "rollout", "update")]
  assert all(line.get("of_peak", 1) > 0 and not line.get("uncounted") for line in lines)
  assert 0 < work[0] < min(work[1:])


@pytest.fixture
def gpu(monkeypatch):
  """benchmarks/gpu.py as a module."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("gpu")


OF_A_PART = {
  "correctness": {"on_policy": 4, "attention": 1, "blocks": 2},
  "sd35": {"matmul_peak": 1, "evaluation_jax": 1, "rollout": 1, "update": 2, "trace": 1},
  "torch": {"torch_evaluation": 2, "torch_update": 4},
  "epoch": {
    "matmul_peak": 1, "vae_decode": 5, "pickscore": 1, "epoch_rollout": 1, "epoch_update": 1,
    "epoch": 1,
  },
  "flux": {
    "matmul_peak": 1, "vae_decode": 1, "pickscore": 1, "flux_rollout": 1, "flux_update": 1,
    "flux": 1,
  },
  "tiny_text": {"tiny_text": 1},
}  # fmt: skip


@pytest.mark.parametrize(
  "flag",
  ["--batches=a", "--batches=0", "--batches=4,,8", "--minutes=-1", "--minutes=nan", "--repeats=0"],
)
def test_numbers_that_the_gpu_script_cannot_use_are_refused(gpu, tmp_path, capsys, flag):
  with pytest.raises(SystemExit) as ended:
    gpu.main(["--small", f"--output={tmp_path / 'out'}", flag])
  assert ended.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", OF_A_PART)
def test_every_part_of_the_gpu_script_gives_its_figures(gpu, tmp_path, monkeypatch, capsys, part):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  make_mesh = mesh_lib.make_mesh
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
  arguments = ["--small", f"--parts={part}", "--repeats=1", f"--output={tmp_path}"]
  gpu.main([*arguments, "--minutes=10", "--until=9e9"])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
  names = [line["figure"] for line in lines]
  assert {name: names.count(name) for name in names} == OF_A_PART[part], lines
  assert all(line.get("seconds", 1) > 0 and line.get("of_peak", 1) > 0 for line in lines)
  if part == "correctness":
    assert all(line["first_log_ratio"] == 0.0 for line in lines if line["figure"] == "on_policy")
    errors = [line["relative_error"] for line in lines if "relative_error" in line]
    assert max(error for found in errors for error in found.values()) < 0.03  # of bfloat16
  if part == "sd35":
    assert (tmp_path / "kernels.txt").read_text().count("ms") > 5


# What a part's process does is told to this one, which prints and hangs as it is asked to.
PART = """
import json, sys, time
print("no figure"); print(json.dumps({"figure": "first", "batch": 2, "seconds": 3.0}), flush=True)
if "--parts=torch" in sys.argv: time.sleep(60)
if "--parts=sd35" in sys.argv: raise ValueError("no memory left")
"""


def test_gpu_script_keeps_what_is_known_when_a_part_fails_or_hangs(gpu, tmp_path, monkeypatch):
  (tmp_path / "part.py").write_text(PART)
  monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
  monkeypatch.setattr(gpu, "SHORTEST", 1.0)
  arguments = ["--parts=sd35,torch,epoch", "--minutes=0.05", f"--output={tmp_path}"]
  gpu.main(arguments)
  lines = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
  assert [line["figure"] for line in lines] == ["first", "cut", "first", "cut", "left_out"]
  assert "ValueError: no memory left" in lines[1]["why"] and "time was over" in lines[3]["why"]


def test_our_seconds_are_compared_with_torchs_of_the_same_batch_and_remat(gpu):
  lines = [
    {"figure": "evaluation_jax", "batch": 4, "remat": "full", "seconds": 1.0},
    {"figure": "update", "batch": 4, "remat": "full", "seconds": 6.0},
    {"figure": "update", "batch": 4, "remat": "none", "seconds": 5.0},
    {"figure": "update", "batch": 8, "remat": "none", "seconds": 50.0},
    {"figure": "torch_evaluation", "batch": 4, "mode": "eager", "seconds": 2.0},
    {"figure": "torch_update", "batch": 4, "remat": "none", "mode": "compiled", "seconds": 4.0},
    {"figure": "torch_update", "batch": 16, "remat": "none", "mode": "compiled", "seconds": 4.0},
  ]
  found = [(line["figure"], line["mode"], line["ratio"]) for line in gpu.compare(lines)]
  assert found == [
    ("evaluation_over_torch", "eager", 0.5),
    ("update_over_torch", "compiled", 1.25),
  ]


def test_missing_packages_are_named_with_a_line_to_fetch_them(gpu, monkeypatch, capsys):
  wheels = importlib.import_module("wheels")
  monkeypatch.setitem(wheels.NEEDED, "no_such_module.part", ("no-such-wheel", "torch"))
  monkeypatch.setattr(sys, "argv", ["wheels.py"])
  wheels.main()
  text = capsys.readouterr().out
  assert "missing: no-such-wheel, for torch" in text
  assert "pip download --no-deps" in text and text.count("no-such-wheel") == 2
  monkeypatch.setitem(wheels.NEEDED, "no_such_module", ("another-wheel", ""))
  with pytest.raises(SystemExit, match="no figure at all"):
    wheels.main()


@pytest.mark.exhaustive
def test_forecast_of_the_memory_of_an_update_is_what_it_takes():
  figures = {line["figure"]: line for line in run("forecast_memory", "--microbatch=256")}
  assert figures.keys() == {"forecast_memory_rollout", "forecast_memory_update"}
  assert figures["forecast_memory_update"]["ratio"] == pytest.approx(1.0, abs=0.1)


@pytest.fixture
def compare(monkeypatch):
  """benchmarks/compare.py as a module."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("compare")


ROWS = [
  {
    "kind": "train",
    "total/evaluations": 150,
    "total/teraflops": 0.3,
    "total/teraflops_with_rewards": 1.5,
    "time/epoch": 90.0,
  },
  {"kind": "eval"},
  {
    "kind": "train",
    "total/evaluations": 250,
    "total/teraflops": 0.5,
    "total/teraflops_with_rewards": 2.5,
    "time/epoch": 6.0,
  },
  {
    "kind": "train",
    "total/evaluations": 350,
    "total/teraflops": 0.7,
    "total/teraflops_with_rewards": 3.5,
    "time/epoch": 18.0,
  },
]


@pytest.mark.parametrize(
  "budget, epochs",
  [
    ("evaluations=1000", 10),
    ("evaluations=1099", 10),
    ("teraflops=.4", 2),
    ("teraflops_with_rewards=3", 3),
    ("minutes=1", 5),
  ],
)
def test_budget_pays_whole_epochs_of_what_one_takes_after_the_first(
  compare, tmp_path, budget, epochs
):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  assert compare.affordable(tmp_path, *compare.parse_budget(budget)) == epochs


@pytest.mark.parametrize("budget", ["minutes=.01", "evaluations=1e300"])
def test_budget_that_pays_no_epoch_or_too_many_is_refused(compare, tmp_path, budget):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  with pytest.raises(
    ValueError, match=r"--budget .*: must pay 1 to a million epochs, of which each"
  ):
    compare.affordable(tmp_path, *compare.parse_budget(budget))


def test_probe_that_lost_a_row_is_refused(compare, tmp_path):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:-1]))
  with pytest.raises(ValueError, match="has 2 rows of epochs, not 3. Delete it"):
    compare.affordable(tmp_path, "minutes", 1.0)


def test_budget_of_a_reward_that_does_not_say_what_it_takes_is_refused(compare, tmp_path):
  silent = [{k: v for k, v in row.items() if not k.endswith("rewards")} for row in ROWS]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in silent))
  with pytest.raises(
    ValueError, match="--budget teraflops_with_rewards: a reward of .* does not say"
  ):
    compare.affordable(tmp_path, "teraflops_with_rewards", 3.0)


@pytest.mark.parametrize("text", ["hours=3", "minutes", "minutes=", "minutes=-1", "minutes=nan"])
def test_budget_that_is_none_is_refused(compare, text):
  with pytest.raises(argparse.ArgumentTypeError, match="must be evaluations=N, teraflops=N"):
    compare.parse_budget(text)


def test_methods_with_changes_are_parted_at_commas_outside_of_brackets(compare):
  found = compare.split_methods("flow_grpo,tp_grpo+sampler.window=(0,2)+train.epochs=9,branch")
  assert found == ["flow_grpo", "tp_grpo+sampler.window=(0,2)+train.epochs=9", "branch"]


@pytest.mark.parametrize("each, shares", [(1, [[0], [2], [3]]), (2, [[0, 2]]), (3, [[0, 2, 3]])])
def test_runs_at_once_have_cores_of_their_own(compare, each, shares):
  assert compare.share_out([0, 2, 3], each) == shares


@pytest.mark.parametrize("each", [0, 4])
def test_more_cores_for_a_run_than_there_are_are_refused(compare, each):
  with pytest.raises(SystemExit, match=f"--cores_per_run {each}: must be 1 to 3"):
    compare.share_out([0, 2, 3], each)


def test_a_run_keeps_to_its_share_of_the_cores(compare):
  if not compare.CAN_BIND:
    pytest.skip("this system binds no process to cores")
  cores = sorted(os.sched_getaffinity(0))[:2]
  for share in (cores[:1], cores):
    command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    found = subprocess.run(
      compare.bound_to(share) + command, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(share)


@pytest.mark.parametrize(
  "arguments, said",
  [
    ("--seeds 0", "--seeds 0: must be at least 1"),
    ("--cores -1", "--cores -1: must be at least 0"),
    ("--output {file}", "--output {file}: must be a folder, and is a file"),
    ("--tasks tiny_txt", "task='tiny_txt': unknown name. Did you mean 'tiny_text'?"),
    ("--methods tempflo", "method='tempflo': unknown name. Did you mean 'tempflow'?"),
    ("--methods branch,tp_grpo+credit.balanc=0", "credit.balanc: unknown config key. Did you mean"),
    ("--methods tp_grpo+train.epochs=x", "invalid literal for int() with base 10: 'x'"),
    ("--methods tp_grpo+sampler.window=(0,9)", "the end must be <= sampler.num_steps=4"),
    ("-- --config.train.epochs=0", "flow_grpo on tiny_text: train.epochs=0: must be at least 1"),
    ("-- train.epochs=3", "unexpected arguments train.epochs=3"),
    ("-- --config.seed=3", "flow_grpo on tiny_text: seed: compare.py sets it for every run"),
    ("-- --config.seed 3", "seed: compare.py sets it for every run. Leave it out."),
    ("-- --config.run.dir=x", "run.dir: compare.py sets it for every run"),
    ("--methods tp_grpo+seed=7", "tp_grpo+seed=7 on tiny_text: seed: compare.py sets it"),
    (
      "--methods tp_grpo+train.epochs=7 --budget minutes=1",
      "train.epochs: --budget sets it. Leave it out.",
    ),
    ("--output {file}/sub", "--output {file}/sub: cannot be written ("),
    ("--tables --keep {file}/sub", "--keep {file}/sub: cannot be written ("),
  ],
)
def test_comparison_that_cannot_be_is_refused_before_a_run_starts(
  compare, tmp_path, monkeypatch, capsys, arguments, said
):
  monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("a run was started"))
  (file := tmp_path / "file").touch()
  monkeypatch.setattr(sys, "argv", ["compare.py", *arguments.format(file=file).split()])
  with pytest.raises(SystemExit):
    compare.main()
  assert said.format(file=file) in capsys.readouterr().err


@pytest.mark.parametrize("task", ["tiny_text", "tiny_shapes"])
def test_runs_behind_the_tables_had_the_recipes_of_today(task):
  for run in (RESULTS / task).glob("*_s*"):
    method, seed = run.name.rsplit("_s", 1)
    kept = history.load_run_config(run)
    today = presets.recipe(task, method)
    assert kept.seed == int(seed)
    for part in (
      "rewards",
      "prompts",
      "sampler",
      "completion",
      "credit",
      "advantage",
      "loss",
      "train",
    ):
      assert getattr(kept, part) == getattr(today, part), (run.name, part)
    assert kept.optimizer.learning_rate == pytest.approx(today.optimizer.learning_rate), run.name


def test_a_run_that_was_cut_is_named_and_not_in_the_tables(compare, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(compare.page, "write_report", lambda groups, output: output)
  whole = RESULTS / "two_threads" / "tiny_text" / "tempflow_s0"
  cut = tmp_path / "tempflow_s1"
  shutil.copytree(whole, tmp_path / "tempflow_s0")
  cut.mkdir()
  shutil.copy(whole / "config.json", cut)
  lines = gzip.decompress((whole / "metrics.jsonl.gz").read_bytes()).decode().splitlines(True)
  (cut / "metrics.jsonl").write_text("".join(lines[:40]))
  (damaged := tmp_path / "tempflow_s2").mkdir()
  (damaged / "config.json").write_text("{")
  shutil.copy(whole / "metrics.jsonl.gz", damaged)
  assert compare.show(tmp_path, ["tempflow"], failed := [])
  found = capsys.readouterr()
  assert "| `tempflow` | 1 |" in found.out
  assert f"{cut}: not finished, so not in the tables" in found.err
  assert f"{damaged}: not in the tables: " in found.err and failed == ["tempflow_s2"]


def test_a_run_that_cannot_start_is_named_and_the_others_go_on(
  compare, tmp_path, monkeypatch, capsys
):
  def start(folder, task, method, seed, share, fields):
    if not seed:
      raise FileNotFoundError("no such program")
    shutil.copytree(RESULTS / "two_threads" / "tiny_text" / "tempflow_s1", folder)
    return subprocess.Popen([sys.executable, "-c", ""])

  monkeypatch.setattr(compare, "start", start)
  monkeypatch.setattr(compare.page, "write_report", lambda groups, output: output)
  arguments = f"--methods tempflow --seeds 2 --cores 1 --output {tmp_path}"
  monkeypatch.setattr(sys, "argv", ["compare.py", *arguments.split()])
  with pytest.raises(SystemExit, match="error: failed, as said above: tempflow_s0"):
    compare.main()
  found = capsys.readouterr()
  assert "tempflow_s0: no such program" in found.err and "| `tempflow` | 1 |" in found.out


def test_a_finished_run_of_another_length_or_recipe_is_told_from_the_one_that_is_asked(compare):
  run = RESULTS / "two_threads" / "tiny_text" / "tempflow_s0"
  asked = lambda *fields: compare.parse("tiny_text", "tempflow", [*fields])
  assert not compare.differences(run, asked("--config.run.dir=elsewhere"))
  longer = asked("--config.train.epochs=240", "--config.sampler.noise_level=0.4")
  found = compare.differences(run, longer)
  assert found == "sampler.noise_level=0.7, not 0.4, train.epochs=120, not 240"


def test_a_run_that_was_killed_before_its_judging_is_finished_but_not_judged(compare, tmp_path):
  whole = RESULTS / "two_threads" / "tiny_text" / "tempflow_s0"
  assert compare.is_finished(whole) and compare.is_judged(whole)
  shutil.copy(whole / "config.json", tmp_path)
  lines = gzip.decompress((whole / "metrics.jsonl.gz").read_bytes()).decode().splitlines(True)
  (tmp_path / "metrics.jsonl").write_text("".join(x for x in lines if '"judge"' not in x))
  assert compare.is_finished(tmp_path) and not compare.is_judged(tmp_path)


@pytest.mark.exhaustive
def test_compare_trains_what_is_missing_and_prints_a_table(tmp_path):
  sizes = ["train.prompts_per_epoch=2", "train.microbatch=16", "eval.prompts=8"]
  methods = [
    "--methods=flow_grpo+sampler.window=(0,3),tempflow",
    "--seeds=1",
    f"--output={tmp_path}",
  ]
  methods += ["--budget=evaluations=420"]  # three epochs of 32 x 4, two of 32 x 6.25
  sizes += ["eval.judge_prompts=8"]
  fields = [f"--config.{size}" for size in (*sizes, "eval.batch=8", "eval.every=0")]
  table = output_of("compare", *methods, "--", *fields)
  rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
  assert [row[0] for row in rows] == ["| `flow_grpo+sampler.window=(0,3)`", "| `tempflow`"]
  assert [row[7] for row in rows] == ["384", "400"]
  assert all(row[3] and row[4] for row in rows)  # judged: the last weights and the best ones
  before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("metrics.jsonl"))]
  assert output_of("compare", *methods, "--", *fields) == table
  after = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("metrics.jsonl"))]
  assert before == after and len(before) == 4
  packed = tmp_path / "packed"
  assert output_of("compare", *methods, f"--keep={packed}", "--tables") == table
  again = output_of("compare", *methods[:2], f"--output={packed}", "--tables")
  assert again.replace(str(packed), str(tmp_path)) == table


@pytest.mark.slow
def test_load_on_a_reward_server_loses_and_swaps_nothing():
  (line,) = run("serve_load", "--clients=4", "--requests=20", "--pictures=2")
  assert (line["requests"], line["pictures"]) == (80, 160)
  assert line["lost"] == line["wrong"] == 0 and line["p50_ms"] <= line["p99_ms"]


@pytest.mark.exhaustive
def test_a_run_behind_a_server_has_the_same_numbers():
  (line,) = run("served", "--method=flow_grpo", "--epochs=3", "--rounds=1")
  assert line["same_metrics"] and line["ratio"] > 0
