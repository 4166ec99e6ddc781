"""The benchmarks of the true models run at small sizes, and print what they say."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(name, *arguments):
  """The JSON lines of a benchmark, run on one CPU device."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments],
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
