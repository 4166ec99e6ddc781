"""Only better weights replace the best ones, and who comes back finds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.runs import best

METRIC = "reward/mean"


def weights(value):
  return {"w": jnp.full((2, 3), float(value))}


def abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=device)}


def offer(run_dir, scores, *, start=False, metric=METRIC, first=0):
  """(what each offer said, epoch, score) of evaluations after the epochs first, first + 10, ..."""
  kept = best.BestWeights(run_dir, metric, start=start)
  said = [
    kept.offer(first + 10 * i, weights(first + 10 * i), {metric: score})
    for i, score in enumerate(scores)
  ]
  kept.close()
  return said, kept.epoch, kept.score


def stored(run_dir):
  """(value of the weights, epoch) on disk."""
  found, extra = best.load(run_dir, abstract())
  values = np.unique(found["w"])
  assert len(values) == 1 and extra["metric"] == METRIC
  return values[0], extra["step"]


def test_only_better_weights_are_kept(tmp_path):
  assert offer(tmp_path, [0.5, 0.7, 0.7, 0.6], start=True) == ([True, True, False, False], 10, 0.7)
  assert stored(tmp_path) == (10, 10)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["10"]


def test_who_comes_back_goes_on_from_the_best_so_far(tmp_path):
  offer(tmp_path, [0.5, 0.7], start=True)
  assert offer(tmp_path, [0.6, 0.8], first=20) == ([False, True], 30, 0.8)
  assert stored(tmp_path) == (30, 30)


def test_evaluations_that_come_again_change_nothing(tmp_path):
  offer(tmp_path, [0.5, 0.7, 0.9], start=True)
  # Of another machine, whose rounding brings other scores.
  assert offer(tmp_path, [0.5, 0.95, 0.91]) == ([False] * 3, 20, 0.9)
  assert stored(tmp_path) == (20, 20)


@pytest.mark.parametrize("options", [{"start": True}, {"metric": "reward/ocr/mean"}])
@pytest.mark.filterwarnings("ignore:.*chosen anew")
def test_best_of_another_run_or_metric_is_put_aside_and_lost_by_nobody(tmp_path, options):
  offer(tmp_path, [0.9], start=True, first=30)
  said, epoch, score = offer(tmp_path, [0.1], **options)
  assert (said, epoch, score) == ([True], 0, 0.1)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["0"]
  offer(tmp_path, [0.2], first=40, **options | {"start": True})  # the 0th are no one's work
  offer(tmp_path, [0.3], first=50, **options | {"start": True})
  folders = {p.name for p in tmp_path.iterdir() if any(p.iterdir())}
  assert folders == {"best", "best_before_1", "best_before_2"}
  (tmp_path / "best").rename(tmp_path / "newest")
  (tmp_path / "best_before_1").rename(tmp_path / "best")  # what `--weights best` opens
  assert stored(tmp_path) == (30, 30)


def test_an_empty_folder_of_best_weights_goes(tmp_path):
  (tmp_path / "best").mkdir()
  assert offer(tmp_path, [0.1], start=True)[1] == 0
  assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_damaged_best_is_reported_and_replaced(tmp_path):
  offer(tmp_path, [0.9], start=True, first=30)
  for path in (tmp_path / "best").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.warns(UserWarning, match="its best weights cannot be read"):
    assert offer(tmp_path, [0.1], first=40)[1:] == (40, 0.1)
  assert stored(tmp_path) == (40, 40)


def test_without_a_metric_nothing_is_kept(tmp_path):
  kept = best.BestWeights(tmp_path, "", start=True)
  assert not kept.offer(10, weights(1), {METRIC: 1.0}) and kept.epoch is None
  kept.close()
  assert not (tmp_path / "best").exists()
  with pytest.raises(ValueError, match="holds no best"):
    best.load(tmp_path, abstract())


def test_a_run_has_stalled_when_as_many_evaluations_as_its_patience_were_no_better(tmp_path):
  kept = best.BestWeights(tmp_path, METRIC, start=True)
  stalled = lambda epoch, patience: kept.has_stalled(epoch, every=5, patience=patience)
  assert not stalled(100, 2)  # nothing was evaluated
  kept.offer(10, weights(1), {METRIC: 1.0})
  kept.close()
  assert [stalled(epoch, 2) for epoch in (10, 15, 20, 25)] == [False, False, True, True]
  assert not stalled(1000, 0)


def test_scores_of_another_evaluation_are_not_compared(tmp_path):
  def offered(epoch, score, kind):
    kept = best.BestWeights(tmp_path, METRIC, start=False, kind=kind)
    said = kept.offer(epoch, weights(epoch), {METRIC: score})
    kept.close()
    return said

  few = {"prompts": 8, "rewards": ()}
  assert offered(10, 0.9, few) and not offered(20, 0.8, few)
  with pytest.warns(UserWarning, match="after epoch 10.*chosen anew.*are kept: best_before_1"):
    assert offered(30, 0.5, few | {"prompts": 16})
  assert stored(tmp_path) == (30, 30)
