"""Means, intervals and costs over seeds, on curves whose answers are known."""

import dataclasses
import json

import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.reporting import comparison, history


@pytest.fixture
def make_run(tmp_path):
  """Returns (label, seed, [(evaluations, score)]) -> Run; a tenth of a TFLOP for each evaluation."""

  def make(label, seed, points):
    folder = tmp_path / f"{label}_s{seed}"
    folder.mkdir()
    config = config_lib.Config(seed=seed, run=config_lib.Run(label=label))
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    rows = [
      {
        "epoch": i,
        "kind": "eval",
        "reward/ocr/mean": score,
        "image/edge_density": 0.3,
        "total/evaluations": spent,
        "total/teraflops": spent / 10,
        "time/total": 60.0 * spent,
      }
      for i, (spent, score) in enumerate(points)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return history.load_run(folder)

  return make


def test_interval_is_students():
  found = comparison.estimate([1.0, 2.0, 3.0, np.nan])
  assert found.mean == 2.0
  assert found.half == pytest.approx(4.302652729911275 / np.sqrt(3))  # t(.975, 2), s = 1


def test_one_seed_has_no_interval_and_none_no_mean():
  assert np.isnan(comparison.estimate([0.5]).half)
  assert str(comparison.estimate([0.5])) == ".500"
  assert str(comparison.estimate([np.nan])) == ""
  assert str(comparison.estimate([-0.01, 0.03])) == ".010 ± .254"


def test_scores_between_evaluations_lie_on_a_line(make_run):
  run = make_run("a", 0, [(0, 0.2), (100, 0.6), (200, 0.7)])
  assert comparison.score_at(run, "ocr", "evaluations", 50) == pytest.approx(0.4)
  assert comparison.score_at(run, "ocr", "teraflops", 15) == pytest.approx(0.65)
  assert comparison.area_to(run, "ocr", "evaluations", 100) == pytest.approx(0.4)
  assert comparison.area_to(run, "ocr", "evaluations", 150) == pytest.approx(
    (0.4 * 100 + 0.625 * 50) / 150
  )


def test_methods_are_compared_at_what_all_have_spent(make_run):
  cheap = [make_run("flow_grpo", s, [(0, 0.2), (100, 0.4 + s / 10)]) for s in (0, 1)]
  dear = [make_run("tp_grpo", s, [(0, 0.2), (400, 0.6 + s / 10)]) for s in (1, 0)]
  groups = {"flow_grpo": cheap, "tp_grpo": dear}
  assert comparison.common_budget(groups, "ocr", "evaluations") == 100
  head, *rows = comparison.table(groups, "ocr")
  first, second = (dict(zip(head, row, strict=True)) for row in rows)
  assert first["at equal evaluations"].startswith(".450 ±")
  assert second["at equal evaluations"].startswith(".312 ±")  # .300 and .325
  assert second["final"].startswith(".650 ±") and second["minutes"] == "400.0"
  # Seed by seed: .300 - .400 and .325 - .500, whatever order the runs came in.
  assert first["minus flow_grpo"] == ""
  difference = comparison.paired(dear, cheap, "ocr", "evaluations", 100)
  assert difference == pytest.approx(comparison.estimate([-0.1, -0.175]))
  assert second["minus flow_grpo"] == str(difference)


def with_turning_points(run, names, shares):
  rows = [
    {"epoch": epoch, **{f"{name}/{k}": share for name in names for k, share in enumerate(each)}}
    for epoch, each in enumerate(shares, start=1)
  ]
  return dataclasses.replace(run, train=rows)


def test_turning_points_are_counted_step_by_step_over_epochs_and_seeds(make_run):
  runs = [make_run("tp_grpo", seed, [(0, 0.2)]) for seed in range(2)]
  both = ("turning_point_found", "turning_point")
  few = with_turning_points(runs[0], both, [(0.2, 0.0), (0.4, 0.0)])
  none = with_turning_points(runs[1], both, [(0.0, 0.0), (0.0, 0.0)])
  old = with_turning_points(make_run("old", 0, [(0, 0.2)]), both[1:], [(0.1, 0.25, 0.5)])
  plain = make_run("flow_grpo", 0, [(0, 0.2)])
  table = comparison.turning_points({"tp_grpo": [few, none], "flow_grpo": [plain], "old": [old]})
  assert table == [
    ("found / paid at step", "0", "1", "2"),
    ("`tp_grpo`", ".150 / .150", ".000 / .000", ""),
    ("`old`", ".100", ".250", ".500"),
  ]
  assert comparison.turning_points({"flow_grpo": [plain], "never": [none]}) == []
  _, row = comparison.turning_points({"mixed": [old, few]})
  assert row == ("`mixed`", ".300 / .300", ".000 / .000")  # of the one that counted both
  unpaid = dataclasses.replace(none, train=[r | {"turning_point_found/0": 0.3} for r in none.train])
  _, row = comparison.turning_points({"unpaid": [unpaid]})
  assert row == ("`unpaid`", ".300 / .000", ".000 / .000")


def test_seconds_of_an_epoch_are_the_median_of_the_quickest_seed(make_run):
  runs = [make_run("a", seed, [(0, 0.2), (1, 0.3)]) for seed in (0, 1)]
  for run, seconds in zip(runs, ([90, 90, 5, 6, 50], [90, 90, 3, 9, 70])):
    run.train.extend({"epoch": i, "time/epoch": s} for i, s in enumerate(seconds))
  head, row = comparison.table({"a": runs}, "ocr")
  assert dict(zip(head, row, strict=True))["s an epoch"] == "6.0"


def test_equal_minutes_are_those_of_the_quickest_seeds_epochs(make_run):
  points = [(0, 0.2), (1, 0.3), (2, 0.4), (3, 0.5), (4, 0.6)]
  groups = {"slow": [make_run("slow", 0, points)], "quick": [make_run("quick", 0, points)]}
  for label, seconds in (("slow", 6.0), ("quick", 3.0)):
    groups[label][0].train.extend({"epoch": i, "time/epoch": seconds} for i in range(1, 5))
  head, *rows = comparison.table(groups, "ocr")
  slow, quick = (dict(zip(head, row, strict=True))["at equal minutes"] for row in rows)
  assert (slow, quick) == (".400", ".600")  # 12 seconds are two epochs and four
  head, *rows = comparison.table(groups, "ocr", seconds={"slow": 2.0, "quick": 4.0})
  assert [dict(zip(head, row))["at equal minutes"] for row in rows] == [".600", ".400"]
  assert [dict(zip(head, row))["s an epoch"] for row in rows] == ["2.0", "4.0"]


def test_equal_minutes_begin_before_a_calibration(make_run):
  points = [(0, 0.2), (1, 0.3), (2, 0.4), (3, 0.5), (4, 0.6)]
  groups = {label: [make_run(label, 0, points)] for label in ("late", "quick")}
  for row in groups["late"][0].evals:
    row["time/total"] += 6.0
  head, *rows = comparison.table(groups, "ocr", seconds={"late": 3.0, "quick": 3.0})
  late, quick = (dict(zip(head, row, strict=True))["at equal minutes"] for row in rows)
  assert (late, quick) == (".400", ".600")  # of 12 seconds it has 6 left


def test_best_is_not_the_last(make_run):
  runs = [make_run("a", 0, [(0, 0.2), (1, 0.9), (2, 0.7)])]
  head, row = comparison.table({"a": runs}, "ocr")
  cells = dict(zip(head, row, strict=True))
  assert (cells["final"], cells["best"]) == (".700", ".900")


def test_run_that_has_just_begun_has_empty_cells(make_run):
  head, row = comparison.table({"a": [make_run("a", 0, [(0, 0.2)])]}, "ocr")
  assert dict(zip(head, row, strict=True))["on the way there"] == ""


def test_judged_scores_are_those_of_other_prompts(make_run):
  runs = [make_run("a", seed, [(0, 0.2), (100, 0.9)]) for seed in (0, 1)]
  for run, last, best in zip(runs, (0.5, 0.7), (0.6, 0.8)):
    judged = {"epoch": 1, "kind": "judge"}
    judged |= {"last/reward/ocr/mean": last, "best/reward/ocr/mean": best}
    with (run.folder / "metrics.jsonl").open("a") as file:
      file.write(json.dumps(judged) + "\n")
  runs = [history.load_run(run.folder) for run in runs]
  cells = dict(zip(*comparison.table({"a": runs}, "ocr")))
  assert cells["judged"].startswith(".600 ±")
  assert cells["judged, best weights"].startswith(".700 ±")
  assert cells["final"].startswith(".900")


def test_operations_of_rewards_count_where_every_run_knows_them(make_run):
  known, silent = make_run("a", 0, [(0, 0.2), (100, 0.6)]), make_run("b", 0, [(0, 0.2), (100, 0.8)])
  for row in known.evals:
    row["total/teraflops_with_rewards"] = 3 * row["total/teraflops"]
  cheaper = dataclasses.replace(known, evals=[dict(row) for row in known.evals])
  cheaper.evals[-1]["total/teraflops_with_rewards"] = 15.0
  head, first, second = comparison.table({"a": [known], "c": [cheaper]}, "ocr")
  first, second = (dict(zip(head, row, strict=True)) for row in (first, second))
  assert (first["model TFLOP"], first["TFLOP with rewards"]) == ("10", "30")
  assert second["TFLOP with rewards"] == "15"
  assert first["at equal TFLOP with rewards"] == ".400"  # half of its way
  assert second["at equal TFLOP with rewards"] == ".600"
  for row in comparison.table({"a": [known], "b": [silent]}, "ocr")[1:]:
    assert dict(zip(head, row, strict=True))["at equal TFLOP with rewards"] == ""


def test_a_calibration_is_spent_at_the_score_of_the_base(make_run):
  run = make_run("a", 0, [(50, 0.2), (100, 0.6)])
  assert comparison.area_to(run, "ocr", "evaluations", 100) == pytest.approx(0.5 * 0.2 + 0.5 * 0.4)


def test_judged_says_how_many_runs_it_is_of_where_some_were_not(make_run):
  runs = [make_run("a", seed, [(0, 0.2), (10, 0.6)]) for seed in (0, 1, 2)]
  for run, score in zip(runs, (0.5, 0.7)):
    run.judged["last/reward/ocr/mean"] = score
  head, row = comparison.table({"a": runs}, "ocr")
  cells = dict(zip(head, row, strict=True))
  assert cells["judged"] == f"{comparison.estimate([0.5, 0.7])} (2)"
  assert cells["judged, best weights"] == ""
