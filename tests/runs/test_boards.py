"""TensorBoard and Weights & Biases show a resumed run as one curve, read back from their own files."""

import functools
import json
import pathlib
import time

import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import boards, metrics

IMAGES = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
CAPTIONS = ['a "CAT" | CAT | ocr=1.000', 'a "DOG" | D0G | ocr=.667']


def write_run(run_dir, epochs, value, next_epoch=0, **options):
  log = config_lib.Log(**{"tensorboard": False} | options)
  with metrics.MetricsLog(run_dir, log, {"seed": 3}, next_epoch=next_epoch) as sink:
    for epoch in epochs:
      row = {"epoch": epoch, "reward/mean": value, "update": 2 * epoch, "bad": float("nan")}
      sink.write(row | {"kind": "train"})
      sink.write(row | {"kind": "eval"})
    sink.pictures("eval/samples", IMAGES[0], IMAGES, CAPTIONS, epochs[-1])


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path):
  reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  write_run(tmp_path, range(5), 0.25, tensorboard=True)
  time.sleep(1.1)  # files are named by the second
  write_run(tmp_path, range(3, 6), 0.5, next_epoch=3, tensorboard=True)
  found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
  found.Reload()
  for kind in ("train", "eval"):
    curve = [(each.step, each.value) for each in found.Scalars(f"{kind}/reward/mean")]
    assert curve == [(0, 0.25), (1, 0.25), (2, 0.25), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert [each.value for each in found.Scalars(f"{kind}/update")] == [0, 2, 4, 6, 8, 10]
  assert set(found.Tags()["scalars"]) == {
    f"{k}/{n}" for k in ("train", "eval") for n in ("reward/mean", "update")
  }
  assert [each.step for each in found.Images("eval/samples")] == [5]  # that of epoch 4 came again
  text = found.Tensors("eval/samples/text_summary")[-1]  # TensorBoard purges no texts
  shown = text.tensor_proto.string_val[0].decode()
  assert all(caption in shown for caption in CAPTIONS)


def records_of(path: pathlib.Path):
  """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
  pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
  data, at, parts = path.read_bytes(), 7, b""
  while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
    if at + 7 + length > len(data):  # still being written
      return
    parts += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or the last part
      record = pb2.Record()
      record.ParseFromString(parts)
      parts = b""
      yield record


def finished(path: pathlib.Path):
  """All records of a .wandb file: its process writes the last of them after `finish` has returned."""
  ends = time.monotonic() + 60
  while time.monotonic() < ends:
    records = [*records_of(path)]
    if any(r.WhichOneof("record_type") == "exit" for r in records):
      return records
    time.sleep(0.1)
  raise AssertionError(f"{path} has no end")


def test_weights_and_biases_shows_a_resumed_run_as_one_curve(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  for name, value in {
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HOME": str(tmp_path),
  }.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv("WANDB_RUN_ID", raising=False)
  run_dir = tmp_path / "my_run_seed2"
  run_dir.mkdir()
  options = dict(wandb=True, project="letters", group="tp_grpo")
  write_run(run_dir, range(3), 0.25, **options)
  kept = (run_dir / boards.ID_FILE).read_text().strip()
  write_run(run_dir, range(2, 4), 0.25, next_epoch=2, **options)
  files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
  assert [file.name for file in files] == [f"run-{kept}.wandb"] * 2
  for file, epochs in zip(files, (range(3), range(2, 4))):
    records = finished(file)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.project, run.run_group) == (kept, "letters", "tp_grpo")
    assert run.display_name == "my_run_seed2"
    history = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    items = [{i.key or "/".join(i.nested_key): i.value_json for i in h.item} for h in history]
    assert [int(each["epoch"]) for each in items] == [*epochs]
    for epoch, each in zip(epochs, items):
      assert int(each["train/update"]) == int(each["eval/update"]) == 2 * epoch
      assert float(each["eval/reward/mean"]) == 0.25 and "train/bad" not in each
    for caption in CAPTIONS:
      assert caption in json.loads(items[-1]["eval/samples/captions"])


def test_id_is_as_asked_or_kept_or_new(tmp_path, monkeypatch):
  monkeypatch.delenv("WANDB_RUN_ID", raising=False)
  (tmp_path / "other").mkdir()
  keep = functools.partial(boards.keep_id, tmp_path, goes_on=True)
  first = keep("")
  assert first and keep("") == first
  assert boards.keep_id(tmp_path / "other", "", goes_on=True) != first
  monkeypatch.setenv("WANDB_RUN_ID", "of_a_sweep")
  assert keep("") == first  # the run's own goes first
  assert keep("mine") == keep("") == "mine"


def test_a_run_that_begins_anew_in_its_folder_is_another_curve(tmp_path, monkeypatch):
  monkeypatch.delenv("WANDB_RUN_ID", raising=False)
  begin = functools.partial(boards.keep_id, tmp_path, goes_on=False)
  first = begin("")
  assert begin("") != first
  assert begin("mine") == begin("mine") == "mine"
