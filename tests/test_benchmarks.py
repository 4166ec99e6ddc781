"""The benchmarks of the true models run at small sizes, and print what they say."""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


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


@pytest.mark.slow
def test_compile_time_compares_scanned_with_unrolled_blocks():
  small = ("--model=flux_dev", "--small=2", "--repeats=1", "--batch=1", "--remat=none")
  (line,) = run("compile_time", *small)
  assert line["operations"]["unrolled"] > line["operations"]["scanned"]
  assert line["ratio"] > 0 and line["phases"].keys() == {"scanned", "unrolled"}


@pytest.mark.slow
def test_quantize_reports_both_kinds():
  lines = run("quantize", "--small", "--blocks=1")
  assert [line["kind"] for line in lines] == ["int8", "nf4"]
  assert all(line["weight_error"] < 0.1 for line in lines)
  assert all(line["gib"][line["kind"]] <= line["gib"]["bfloat16"] for line in lines)


@pytest.mark.slow
def test_accelerator_measures_a_small_model_on_a_cpu():
  lines = run(
    "accelerator", "--small", "--model=flux_dev", "--batch=1", "--repeats=1", "--no-torch"
  )
  figures = {line["figure"]: line for line in lines}
  assert figures.keys() == {"matmul_peak", "evaluation_jax", "rollout", "update"}
  work = [figures[name]["tflop"] for name in ("evaluation_jax", "rollout", "update")]
  assert all(line.get("of_peak", 1) > 0 and not line.get("uncounted") for line in lines)
  assert 0 < work[0] < min(work[1:])


@pytest.mark.slow
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
  {"kind": "train", "total/evaluations": 150, "total/teraflops": 0.3, "time/epoch": 90.0},
  {"kind": "eval"},
  {"kind": "train", "total/evaluations": 250, "total/teraflops": 0.5, "time/epoch": 6.0},
  {"kind": "train", "total/evaluations": 350, "total/teraflops": 0.7, "time/epoch": 18.0},
]


@pytest.mark.parametrize(
  "budget, epochs",
  [
    ("evaluations=1000", 10),
    ("evaluations=1099", 10),
    ("teraflops=.4", 2),
    ("minutes=1", 5),
    ("minutes=.01", 1),
  ],
)
def test_budget_pays_whole_epochs_of_what_one_takes_after_the_first(
  compare, tmp_path, budget, epochs
):
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  assert compare.affordable(tmp_path, *compare.parse_budget(budget)) == epochs


@pytest.mark.parametrize("text", ["hours=3", "minutes", "minutes=", "minutes=-1", "minutes=nan"])
def test_budget_that_is_none_is_refused(compare, text):
  with pytest.raises(argparse.ArgumentTypeError, match="must be evaluations=N, teraflops=N"):
    compare.parse_budget(text)


@pytest.mark.slow
def test_compare_trains_what_is_missing_and_prints_a_table(tmp_path):
  sizes = ["train.prompts_per_epoch=2", "train.microbatch=16", "eval.prompts=8"]
  methods = ["--methods=flow_grpo,tempflow", "--seeds=1", f"--output={tmp_path}"]
  methods += ["--budget=evaluations=420"]  # three epochs of 32 x 4, two of 32 x 6.25
  sizes += ["eval.judge_prompts=8"]
  fields = [f"--config.{size}" for size in (*sizes, "eval.batch=8", "eval.every=0")]
  table = output_of("compare", *methods, "--", *fields)
  rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
  assert [row[0] for row in rows] == ["| `flow_grpo`", "| `tempflow`"]
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
