"""The judgement of a run: other prompts, paired differences, and a summary that names what to do next."""

import sys

import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets
from tpgrpo_jax.training import evaluation, judging, scoring
from tpgrpo_jax.training import session as session_lib
from tpgrpo_jax.types import Prompt

BASE, LAST = np.array([0.1, 0.3, 0.5, 0.7]), np.array([0.3, 0.4, 0.8, 0.7])


def evaluate(asked):
  def run(params):
    asked.append(params)
    scores = {"ocr": {"b": BASE, "l": LAST}[params]}
    row = {"reward/mean": 0.0, "image/edge_density": 0.25}
    return evaluation.Evaluation(row, scores, np.zeros(0), [Prompt("A", {})] * 4)

  return run


def test_prompts_that_judge_are_those_that_no_evaluation_sees():
  prompts = list(range(10))
  choose = lambda **sizes: judging.choose_prompts(prompts, config_lib.Eval(**sizes))
  assert choose(prompts=4, judge_prompts=3) == [4, 5, 6]
  assert choose(prompts=4, judge_prompts=99) == [4, 5, 6, 7, 8, 9]
  assert choose(prompts=4, judge_prompts=0) == []
  assert choose(prompts=10, judge_prompts=5) == choose(prompts=99, judge_prompts=5) == []


@pytest.mark.parametrize("task, evaluated", [("tiny_text", 0), ("tiny_shapes", 558)])
def test_prompts_that_are_evaluated_too_are_judged_with_other_noise(task, evaluated):
  config = presets.recipe(task, "tp_grpo")
  test, judge = (scoring.load_split(config, split) for split in ("test", "judge"))
  assert judging.count_evaluated(judge, test) == evaluated
  seeds = [scoring.noise_seed(config, *asked) for asked in (("test", test), ("judge", judge))]
  pictures = [
    {(seed, i, prompt.text) for i, prompt in enumerate(prompts)}
    for seed, prompts in zip(seeds, (test, judge))
  ]
  assert len(pictures[0]) == len(test) and pictures[0].isdisjoint(pictures[1])
  assert (seeds[0] == seeds[1] == evaluation.NOISE_SEED) == (not evaluated)


def test_one_prompt_has_no_interval():
  assert str(judging.estimate(np.array([0.25]))) == "0.250"
  assert str(judging.estimate(np.array([0.25, 0.25]))) == "0.250 ± 0.000"


@pytest.mark.parametrize("task, offset", [("tiny_text", 0), ("tiny_shapes", 1)])
def test_a_run_judges_with_that_noise(task, offset, monkeypatch):
  seeds = []
  make = lambda *asked: seeds.append(asked[5] if len(asked) > 5 else evaluation.NOISE_SEED)
  monkeypatch.setattr(evaluation, "make_evaluate", make)
  session_lib.open_session(presets.recipe(task, "flow_grpo"))
  assert seeds == [evaluation.NOISE_SEED, evaluation.NOISE_SEED + offset]


def test_gain_is_the_mean_of_the_paired_differences_with_its_standard_error():
  row = judging.judge(evaluate([]), {"base": "b", "last": "l"})
  from scipy import stats

  difference = LAST - BASE
  assert row["base/reward/ocr/mean"] == pytest.approx(0.4)
  assert row["last/gain/ocr/mean"] == pytest.approx(0.15)
  assert row["last/gain/ocr/standard_error"] == pytest.approx(stats.sem(difference))
  assert row["last/reward/ocr/standard_error"] == pytest.approx(stats.sem(LAST))
  assert row["last/image/edge_density"] == 0.25 and row["prompts"] == 4


def test_weights_that_are_given_twice_are_evaluated_once():
  asked = []
  row = judging.judge(evaluate(asked), {"base": "b", "last": "l", "best": "l"})
  assert asked == ["b", "l"]
  assert row["best/gain/ocr/mean"] == row["last/gain/ocr/mean"]


@pytest.mark.parametrize("best", [None, 0, 30, 60])
def test_summary_says_before_after_and_the_next_command(best):
  weights = {"base": "b", "last": "l"} | ({} if best is None else {"best": "l"})
  row = {"epoch": 60, "kind": "judge"} | ({} if best is None else {"best/epoch": best})
  text = judging.summary("runs/mine", row | judging.judge(evaluate([]), weights))
  assert "ocr: 0.400 ± 0.253 -> 0.550 ± 0.233, a gain of 0.150 ± 0.127" in text
  assert f"{sys.orig_argv[0]} -m tpgrpo_jax.evaluate --run runs/mine" in text
  assert ("after epoch 30" in text) == (best == 30)
  assert ("--weights best" in text) == (best == 30)
  assert ("runs/mine/best/" in text) == (best in (30, 60))
  assert ("better than the base" in text) == (best == 0)


def test_summary_says_how_many_prompts_evaluations_saw_too():
  row = {"epoch": 60, "kind": "judge"} | judging.judge(evaluate([]), {"base": "b", "last": "l"})
  said = lambda twice: judging.summary("runs/mine", row | {"prompts_evaluated": twice})
  assert said(0).startswith("On 4 held-out prompts that no evaluation saw (mean")
  assert said(3).startswith(
    "On 4 held-out prompts that no evaluation saw, or with other noise: 3 were seen (mean"
  )


@pytest.mark.parametrize("best", [None, 0, 30, 60])
def test_a_run_without_prompts_to_judge_it_sums_up_its_evaluations(best):
  row = {
    "kind": "eval",
    "reward/mean": 0.3,
    "reward/ocr/mean": 0.4,
    "reward/ocr/standard_error": 0.1,
  }
  rows = [row | {"epoch": 0}, row | {"epoch": 60, "reward/ocr/mean": 0.55}]
  text = judging.summary_of_evaluations("runs/mine", rows, best)
  assert "ocr: 0.400 ± 0.196 -> 0.550 ± 0.196, a gain of 0.150" in text
  assert f"{sys.orig_argv[0]} -m tpgrpo_jax.evaluate --run runs/mine" in text
  assert "--split judge" not in text and ("--weights best" in text) == (best == 30)
  assert ("runs/mine/best/" in text) == (best in (30, 60))
  assert ("better than the base" in text) == (best == 0)
  assert judging.summary_of_evaluations("runs/mine", [], None).startswith("To see it:")
