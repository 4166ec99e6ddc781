"""A user's own credit, ratio and trust region train; broken ones are refused before anything is sampled."""

import pathlib

import pytest

from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import loop, losses, session

OWN = {
  "credit.method": "own_functions:credit",
  "loss.ratio": "own_functions:ratio",
  "loss.trust_region": "own_functions:trust_region",
  "loss.clip_range": 1e-4,
}
BRANCHES = {
  "sampler.rollout": "branch",
  "sampler.branches": 4,
  "sampler.window_range": (),
  "advantage.group": "state",
}


def train_row(config):
  loop.train(config)
  rows = metrics.read_rows(pathlib.Path(config.run.dir) / "metrics.jsonl")
  (row,) = [row for row in rows if row["kind"] == "train"]
  return row


@pytest.mark.parametrize(
  "states",
  [
    pytest.param({}, marks=pytest.mark.exhaustive, id="trajectory"),
    pytest.param(BRANCHES, marks=pytest.mark.slow, id="branch"),
  ],
)
def test_an_epoch_with_all_three_is_on_policy_and_learns(make_config, one_device, states):
  row = train_row(make_config(OWN | states | {"train.epochs": 1}))
  assert row["ratio/first_update_max_abs_log"] == 0.0
  assert row["ratio/max_abs_log"] > 0 and row["grad_norm"] > 0
  assert row["clip/inactive"] == 0.0


@pytest.mark.parametrize(
  "fields, parts",
  [
    (
      {"loss.ratio": "own_functions:ratio_of_every_dimension"},
      ("loss.ratio=", "log-ratios float32 [3]", "returns"),
    ),
    (
      {"loss.ratio": "own_functions:ratio_of_the_batch"},
      ("loss.ratio=", "[3] for latents [3, 4, 4, 2]"),
    ),
    ({"loss.ratio": "own_functions:pair_of_ratios"}, ("loss.ratio=", "docs/bring_your_own.md")),
    (
      {"loss.ratio": "own_functions:none"},
      ("loss.ratio=", "cannot import 'none' from 'own_functions'"),
    ),
    (
      {"loss.trust_region": "own_functions:bare_region"},
      ("loss.trust_region=", "surrogate.Terms(loss float32, active bool)"),
    ),
    (
      {"loss.trust_region": "own_functions:mean_region"},
      ("loss.trust_region=", "of the shape [3, 2]"),
    ),
    ({"loss.trust_region": "own_functions:weighing_region"}, ("loss.trust_region=", "active bool")),
    ({"loss.ratio": "own_functions:number"}, ("loss.ratio=", "and is 5")),
    ({"loss.trust_region": "own_functions:number"}, ("loss.trust_region=", "and is 5")),
    ({"loss.trust_region": "own_functions:ratio"}, ("loss.trust_region=", "raises TypeError")),
    ({"credit.method": "own_functions:number"}, ("credit.method=", "must be a function")),
    (
      {"credit.method": "own_functions:credit_without_turning_points"},
      ("credit.method=", "is_turning_point bool [2, 16]", "returns StepCredit"),
    ),
    ({"credit.method": "own_functions:credit_of_numbers"}, ("is_turning_point bool", "returns")),
    (
      {"credit.method": "own_functions:credit_that_decides"},
      ("credit.method=", "raises TracerBoolConversionError", "must use jax.numpy"),
    ),
    ({"credit.method": "own_functions:credit_of_two"}, ("credit.method=", "raises TypeError")),
    (
      {"credit.method": "own_functions:unknown_extra"},
      ("extras=('prompts',)", "('key', 'alignment')"),
    ),
    ({"credit.method": "own_functions:text_extra"}, ("extras='key'", "must be a tuple")),
    (
      BRANCHES | {"credit.method": "own_functions:outcome_alone"},
      ("credit.method=", "completions='none'", "use completions='all'"),
    ),
    (
      BRANCHES | {"credit.method": "own_functions:aligned"},
      ("credit.method=", "extras=('alignment',)", "without 'alignment'"),
    ),
    (
      {
        "credit.method": "own_functions:outcome_alone",
        "sampler.calibration": 1,
        "sampler.window_range": (),
      },
      ("sampler.calibration=1:", "outcome_alone", "makes no completions"),
    ),
  ],
)
def test_a_broken_one_is_refused_before_a_model_is_opened(
  make_config, one_device, monkeypatch, fields, parts
):
  monkeypatch.setattr(session.build, "build_model", None)
  with pytest.raises(ValueError) as caught:
    loop.train(make_config(OWN | fields))
  for part in parts:
    assert part in str(caught.value)


def test_one_bool_may_stand_for_all_terms(make_config):
  config = make_config(OWN | {"loss.trust_region": "own_functions:constant_region"})
  losses.make_policy_loss(config, method=None)


def test_own_functions_get_the_velocity_of_the_rollout(make_config):
  assert losses.reads_old_velocity(make_config(OWN))
  assert losses.reads_old_velocity(make_config({"loss.trust_region": OWN["loss.trust_region"]}))
  assert not losses.reads_old_velocity(make_config())
