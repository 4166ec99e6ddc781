import numpy as np
import pytest

from tpgrpo_jax.data import groups

SIZES = {"seed": 3, "dataset_size": 10, "prompts_per_epoch": 4}


def stream(epochs, **changes):
  return np.concatenate([groups.epoch_indices(e, **(SIZES | changes)) for e in range(epochs)])


def test_a_pass_visits_every_prompt_once():
  # 5 epochs of 4 are two passes over 10 prompts, the first ending inside epoch 2.
  for one_pass in stream(5).reshape(2, 10):
    assert sorted(one_pass) == list(range(10))


def test_passes_differ_in_order():
  first, second = stream(2, prompts_per_epoch=10).reshape(2, 10)
  assert first.tolist() != second.tolist()


def test_an_epoch_larger_than_the_dataset_spans_several_passes():
  indices = groups.epoch_indices(0, seed=0, dataset_size=3, prompts_per_epoch=8)
  assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]


def test_a_restart_at_any_epoch_draws_the_same_prompts():
  uninterrupted = stream(7).reshape(7, 4)
  for epoch in reversed(range(7)):
    np.testing.assert_array_equal(groups.epoch_indices(epoch, **SIZES), uninterrupted[epoch])


def test_seeds_differ_in_order():
  assert stream(5).tolist() != stream(5, seed=4).tolist()


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_shares_of_the_processes_tile_the_epoch(process_count):
  for epoch in range(5):  # epoch 2 spans two passes
    shares = [
      groups.epoch_indices(epoch, process_index=i, process_count=process_count, **SIZES)
      for i in range(process_count)
    ]
    assert {len(s) for s in shares} == {4 // process_count}
    np.testing.assert_array_equal(np.concatenate(shares), groups.epoch_indices(epoch, **SIZES))


def test_repetition_is_prompt_major():
  repeated = groups.repeat_groups(np.array([7, 2, 7]), 2)
  assert repeated.tolist() == [7, 7, 2, 2, 7, 7]


def test_prompts_that_processes_cannot_share_equally_are_refused():
  with pytest.raises(ValueError, match="train.prompts_per_epoch=4.*processes, 3.*Set it to 6"):
    groups.epoch_indices(0, process_count=3, **SIZES)


@pytest.mark.parametrize(
  "field, value",
  [
    ("epoch", -1),
    ("seed", -1),
    ("dataset_size", 0),
    ("prompts_per_epoch", 0),
    ("process_count", 0),
    ("process_index", -1),
    ("process_index", 1),
  ],
)
def test_numbers_out_of_range_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}={value}"):
    groups.epoch_indices(**({"epoch": 0} | SIZES | {field: value}))


def test_empty_groups_are_refused():
  with pytest.raises(ValueError, match="group_size=0"):
    groups.repeat_groups(np.array([1]), 0)
