"""Numbers of hand-made images and rewards come out as counted by hand, and rows survive the disk."""

import gzip
import json
import sys
import types

import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.types import StepCredit


def statistics_of(images):
  return metrics.image_statistics(metrics.statistics_of_each(images))


def images_of(*gray):
  """Gray pictures [H][W] in 0 ... 255 -> [N, H, W, 3]."""
  return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=-1)


def test_plain_image_has_no_contrast_and_no_edges():
  found = statistics_of(images_of(np.full((4, 6), 51)))
  assert found == {
    "image/mean": pytest.approx(0.2),
    "image/contrast": pytest.approx(0.0, abs=1e-6),
    "image/edge_density": 0.0,
  }


def test_half_black_half_white_image_has_its_contrast_and_one_edge():
  halves = np.zeros((5, 8))
  halves[:, 4:] = 255
  found = statistics_of(images_of(halves))
  assert found["image/mean"] == pytest.approx(0.5)
  assert found["image/contrast"] == pytest.approx(0.5)
  # Of the 7 columns that have a right neighbour one differs from it, in every row.
  assert found["image/edge_density"] == pytest.approx(1 / 7)


def test_checkerboard_is_all_edges():
  board = 255 * (np.indices((6, 6)).sum(axis=0) % 2)
  assert statistics_of(images_of(board))["image/edge_density"] == 1.0


def test_small_steps_are_no_edges():
  ramp = np.tile(np.arange(10) * 25, (4, 1))  # 25 / 255 is just under 0.1
  assert statistics_of(images_of(ramp))["image/edge_density"] == 0.0


def test_contrast_is_within_images_and_not_between_them():
  found = statistics_of(images_of(np.zeros((3, 3)), np.full((3, 3), 255)))
  assert found["image/mean"] == pytest.approx(0.5)
  assert found["image/contrast"] == 0.0


def test_colour_counts_by_its_brightness():
  image = np.zeros((1, 2, 2, 3), np.uint8)
  image[..., 0] = 255
  assert statistics_of(image)["image/mean"] == pytest.approx(1 / 3)


LAST, MEMBERS = slice(-1, None), slice(1, None)  # what is compared of trajectories, of branches


def gains_of(reward, compared):
  """What each step has brought: over the state before, or of branches over their anchor."""
  return reward[1:] - (reward[:1] if compared == MEMBERS else reward[:-1])


def row_of(completion_reward, is_turning_point=None, advantage=None, group_size=2, compared=LAST):
  reward = np.asarray(completion_reward, np.float32)
  window, batch = len(reward) - 1, reward.shape[1]
  turning = np.zeros((window, batch), bool) if is_turning_point is None else is_turning_point
  rollout = types.SimpleNamespace(
    completion_reward=reward[None],
    rewards={"mine": 2 * reward[None]},
    compared=compared,
    gains=gains_of(reward, compared),
    statistics=metrics.statistics_of_each(images_of(*[np.zeros((2, 2))] * batch)),
  )
  advantage = np.zeros((window, batch)) if advantage is None else advantage
  credit = StepCredit(np.zeros((window, batch)), np.asarray(turning))
  return metrics.epoch_metrics(rollout, credit, advantage, group_size)


def test_reward_is_that_of_the_finished_images():
  row = row_of([[9, 9, 9, 9], [0, 1, 2, 5]])
  assert row["reward/mean"] == 2.0
  assert row["reward/std"] == pytest.approx(3.5**0.5)
  assert row["reward/mine/mean"] == 4.0


def test_reward_of_branches_is_that_of_all_members_and_not_of_their_anchor():
  row = row_of([[9, 9, 9, 9], [0, 1, 2, 5], [2, 2, 2, 2]], compared=MEMBERS)
  assert row["reward/mean"] == 2.0
  assert row["reward/mine/mean"] == 4.0
  assert row["group/zero_spread"] == 0.5  # both groups of the second step
  assert row["completion_reward/0"] == 9.0
  assert [row[f"increment/{k}"] for k in range(2)] == [-7.0, -7.0]


def test_spread_within_groups_and_groups_without_any():
  row = row_of([[0, 0, 0, 0], [1, 1, 2, 6]])
  assert row["group/zero_spread"] == 0.5
  assert row["group/reward_std"] == 1.0


def test_rewards_and_increments_are_reported_by_step():
  row = row_of([[0, 2], [1, 5], [1, 1]])
  assert [row[f"completion_reward/{k}"] for k in range(3)] == [1, 3, 1]
  assert [row[f"increment/{k}"] for k in range(2)] == [2, -2]


def test_turning_point_density_is_reported_by_step():
  row = row_of([[0, 0], [1, 1], [1, 1]], is_turning_point=[[True, False], [False, False]])
  assert (row["turning_point/0"], row["turning_point/1"]) == (0.5, 0.0)
  assert row["turning_point/mean"] == 0.25


def test_turning_points_are_counted_before_balancing_too():
  # The first sample turns at step 1, the second at step 0 (Def. 4.1).
  reward = np.asarray([[0.5, 0.0], [0.0, 0.5], [1.0, 1.0]], np.float32)
  found = metrics.found_turning_points("tp_grpo", reward)
  assert found == {"turning_point_found/0": 0.5, "turning_point_found/1": 0.5}
  assert not metrics.found_turning_points("increments", reward)
  assert not metrics.found_turning_points("my_credit:function", reward)


def test_completions_that_were_not_made_have_no_rows():
  row = row_of([[np.nan, np.nan], [1, 3]])
  assert "completion_reward/0" not in row and "increment/0" not in row
  assert row["completion_reward/1"] == 2.0
  assert all(np.isfinite(value) for value in row.values())


def open_log(folder, **options):
  return metrics.MetricsLog(folder, config_lib.Log(**{"tensorboard": False} | options), {})


def test_rows_come_back_as_written(tmp_path):
  rows = [{"epoch": 1, "kind": "train", "a": 0.1}, {"epoch": 1, "kind": "eval", "b": 1e-30}]
  with open_log(tmp_path) as log:
    for row in rows:
      log.write(row)
  assert metrics.read_rows(tmp_path / "metrics.jsonl") == rows


def test_float32_rows_keep_every_bit(tmp_path):
  value = np.float32(0.1)
  with open_log(tmp_path) as log:
    log.write({"epoch": 1, "kind": "train", "a": value})
  assert np.float32(metrics.read_rows(tmp_path / "metrics.jsonl")[0]["a"]) == value


def test_second_log_appends(tmp_path):
  for epoch in (1, 2):
    with open_log(tmp_path) as log:
      log.write({"epoch": epoch, "kind": "train"})
  assert [row["epoch"] for row in metrics.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_row_is_on_disk_before_the_log_is_closed(tmp_path):
  with open_log(tmp_path) as log:
    log.write({"epoch": 1, "kind": "train"})
    assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 1


def test_half_written_last_row_is_left_out(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(json.dumps({"epoch": 1}) + '\n{"epoch": 2, "rew')
  assert metrics.read_rows(path) == [{"epoch": 1}]


@pytest.mark.parametrize("damage", [b'{"epoch": 1, "ki', b"\0\0\0\0", b"7", b'{"a": "\xc3'])
def test_rows_behind_a_damaged_one_are_read_and_it_is_named(tmp_path, damage):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"epoch": 0}\n' + damage + b'\n{"epoch": 2}\n')
  with pytest.warns(UserWarning, match=r"rows \[2\] cannot be read"):
    assert metrics.read_rows(path) == [{"epoch": 0}, {"epoch": 2}]


def test_number_that_json_cannot_hold_becomes_text(tmp_path):
  with open_log(tmp_path) as log:
    log.write({"epoch": 1, "kind": "train", "a": float("nan"), "b": float("inf")})
  text = (tmp_path / "metrics.jsonl").read_text()
  strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
  assert (strict["a"], strict["b"]) == ("nan", "inf")


def test_missing_wandb_is_named_with_the_pip_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ValueError, match="log.wandb=True: wandb is missing. pip install wandb"):
    open_log(tmp_path, wandb=True)


def test_packed_run_has_the_same_rows_in_the_same_bytes_each_time(tmp_path):
  run, first, second = (tmp_path / name for name in ("run", "first", "second"))
  run.mkdir()
  with open_log(run) as log:
    log.write({"epoch": 1, "kind": "train", "a": 0.5})
  (run / "config.json").write_text(json.dumps({"seed": 3, "run": {"dir": str(run), "label": "a"}}))
  metrics.pack(run, first)
  metrics.pack(run, second)
  metrics.pack(first, again := tmp_path / "again")
  assert (again / "metrics.jsonl.gz").read_bytes() == (first / "metrics.jsonl.gz").read_bytes()
  assert metrics.rows_of(first) == metrics.rows_of(run) == [{"epoch": 1, "kind": "train", "a": 0.5}]
  for name in ("config.json", "metrics.jsonl.gz"):
    assert (first / name).read_bytes() == (second / name).read_bytes()
  assert metrics.rows_of(tmp_path) == []
  kept = json.loads((first / "config.json").read_text())
  assert kept == {"seed": 3, "run": {"dir": "run", "label": "a"}}


def test_evaluations_of_other_prompts_steps_or_rewards_are_not_compared():
  row = {"epoch": 9, "prompts": 16, "num_steps": 4, "reward/mean": 0.5, "reward/ocr/mean": 0.5}
  older = {k: v for k, v in row.items() if k not in ("prompts", "num_steps")}
  others = [row | {"prompts": 8}, row | {"num_steps": 8}, row | {"reward/jpeg/mean": 1.0}]
  assert metrics.comparable([*others, row, older], row) == [row, older]
  assert metrics.comparable([row, older], older) == [row, older]


def test_packed_rows_that_were_cut_are_an_error_with_their_path(tmp_path):
  path = tmp_path / "metrics.jsonl.gz"
  path.write_bytes(gzip.compress(b'{"epoch": 1}\n' * 100)[:-12])
  with pytest.raises(ValueError, match="metrics.jsonl.gz: is damaged .* Copy it anew"):
    metrics.read_rows(path)


def test_a_row_whose_epoch_is_no_number_is_left_out_and_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"epoch": 1}\n{"epoch": "x"}\n{"epoch": 3}\n')
  with pytest.warns(UserWarning, match=r"rows \[2\] cannot be read"):
    assert [row["epoch"] for row in metrics.read_rows(path)] == [1, 3]
