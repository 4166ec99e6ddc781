"""Checkpoints come back bit for bit, on any mesh, and a damaged one never passes for a good one."""

import logging
import threading
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np
import optax
import pytest

from tpgrpo_jax.runs import checkpoint


def make_state(seed=0):
  """All that a run's state may hold: two float dtypes, integers, optax's tuples, typed keys."""
  w, b = jax.random.split(jax.random.key(seed))
  params = {
    "blocks": {
      "w": jax.random.normal(w, (8, 16)),
      "b": jax.random.normal(b, (16,), jnp.bfloat16),
    },
    "heads": [jnp.full((4,), -0.0), jnp.array([jnp.nan, jnp.inf])],
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  updates, moments = optimizer.update(params, optimizer.init(params), params)
  return {
    "params": optax.apply_updates(params, updates),
    "optimizer": moments,
    "step": jnp.int32(7),
    "key": jax.random.key(seed + 1),
    "keys": jax.random.split(jax.random.key(seed + 2), 8),
  }


def on_one_device(tree):
  device = SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)


def on_mesh(tree):
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

  def leaf(x):
    spec = {(8, 16): ("data", "fsdp"), (16,): ("fsdp",), (8,): (("data", "fsdp"),)}.get(x.shape, ())
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)


def words(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf).tobytes()


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype, path
    assert words(x) == words(y), path


@pytest.fixture
def two_checkpoints(tmp_path):
  """A run with steps 10 and 20, made from seeds 10 and 20."""
  with checkpoint.RunCheckpoints(tmp_path, keep=5) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, make_state(step), {"epoch": step})
  return tmp_path


def test_state_and_extra_come_back_bit_for_bit(tmp_path):
  state = make_state()
  extra = {"epoch": 3, "seconds": 1.25, "counters": {"images": [1, 2]}, "note": None}
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, extra)
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    restored, restored_extra = checkpoints.restore(on_one_device(state))
  assert_same_bits(restored, state)
  assert restored_extra == extra | {"step": 3}


def test_one_device_checkpoint_restores_onto_a_mesh(two_checkpoints):
  state = make_state(20)
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    restored, _ = checkpoints.restore(on_mesh(state))
  assert_same_bits(restored, state)
  assert restored["params"]["blocks"]["w"].addressable_shards[0].data.shape == (4, 4)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(on_mesh(state))):
    assert x.sharding == y.sharding


def test_mesh_checkpoint_restores_onto_one_device(tmp_path):
  state = make_state()
  sharded = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, on_mesh(state))
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, sharded)
    restored, _ = checkpoints.restore(on_one_device(state))
  assert_same_bits(restored, state)


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  x = jax.random.normal(jax.random.key(0), (1024, 1024))
  before = np.array(x)
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"x": x})
    for _ in range(20):
      x = overwrite(x)
    restored, _ = checkpoints.restore(on_one_device({"x": x}))
  np.testing.assert_array_equal(restored["x"], before)


def test_only_the_newest_are_kept(tmp_path):
  with checkpoint.RunCheckpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, {"x": jnp.float32(step)})
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_latest_is_none_then_the_newest_step(tmp_path):
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() is None
    checkpoints.save(9, {"x": jnp.ones(2)})
    checkpoints.save(10, {"x": jnp.ones(2)})
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.latest() == 10


def test_save_acts_on_multiples_of_every_unless_forced(tmp_path):
  x = {"x": jnp.ones(2)}
  with checkpoint.RunCheckpoints(tmp_path, keep=9, every=2) as checkpoints:
    begun = [checkpoints.save(step, x) for step in (1, 2, 3, 4)]
    assert begun == [False, True, False, True]
    assert checkpoints.save(5, x, force=True)
    assert not checkpoints.save(5, x, force=True)
    assert checkpoints.steps() == [2, 4, 5]


def test_save_refuses_a_step_before_the_newest(two_checkpoints):
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.raises(ValueError, match="step=15: .* already has step 20"):
      checkpoints.save(15, make_state())


def test_given_step_is_restored(two_checkpoints):
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    restored, extra = checkpoints.restore(on_one_device(make_state()), step=10)
  assert_same_bits(restored, make_state(10))
  assert extra["epoch"] == 10


def test_unknown_step_names_the_steps_there_are(two_checkpoints):
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.raises(ValueError, match=r"step=11: .* has \[10, 20\]"):
      checkpoints.restore(on_one_device(make_state()), step=11)


def test_half_written_checkpoint_is_ignored_and_cleared_by_the_next_save(two_checkpoints):
  half_written = two_checkpoints / "checkpoints" / "30.orbax-checkpoint-tmp"
  half_written.mkdir()
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    assert checkpoints.latest() == 20
    checkpoints.save(21, {"x": jnp.ones(2)})
  assert not half_written.exists()


# orbax leaves a failed read's other coroutines behind; Python complains when it frees them.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
@pytest.mark.parametrize("how", ["truncated data", "no metadata", "no extra", "empty manifest"])
def test_damaged_newest_is_skipped_with_a_warning(two_checkpoints, how):
  folder = two_checkpoints / "checkpoints" / "20"
  if how == "truncated data":
    largest = max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  elif how == "no metadata":
    (folder / "state" / "_METADATA").unlink()
  elif how == "no extra":
    (folder / "_CHECKPOINT_METADATA").write_text('{"item_hand')
  else:
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.warns(UserWarning, match="checkpoints/20 cannot be read"):
      restored, extra = checkpoints.restore(on_one_device(make_state()))
  assert_same_bits(restored, make_state(10))
  assert extra == {"epoch": 10, "step": 10}


def test_run_goes_on_after_a_damaged_checkpoint(two_checkpoints):
  (two_checkpoints / "checkpoints" / "20" / "state" / "_METADATA").unlink()
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.warns(UserWarning, match="cannot be read"):
      checkpoints.restore(on_one_device(make_state()))
    assert checkpoints.steps() == [10]
    assert checkpoints.save(20, make_state(20))
    assert checkpoints.latest() == 20
  assert len(list((two_checkpoints / "checkpoints").glob("20.unreadable-*"))) == 1


def test_no_readable_checkpoint_is_an_error(two_checkpoints):
  for step in (10, 20):
    (two_checkpoints / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"tried \[20, 10\]"):
      checkpoints.restore(on_one_device(make_state()))


def test_read_only_changes_nothing_on_disk(two_checkpoints):
  (two_checkpoints / "checkpoints" / "20" / "state" / "_METADATA").unlink()
  (two_checkpoints / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
  before = sorted(two_checkpoints.rglob("*"))
  with checkpoint.RunCheckpoints(two_checkpoints, keep=1, read_only=True) as checkpoints:
    with pytest.warns(UserWarning):
      _, extra = checkpoints.restore(on_one_device(make_state()))
    with pytest.raises(ValueError, match="read-only"):
      checkpoints.save(40, make_state())
  assert extra["step"] == 10
  assert sorted(two_checkpoints.rglob("*")) == before


def test_read_only_creates_no_folder(tmp_path):
  with pytest.raises(ValueError, match="holds no checkpoints"):
    checkpoint.RunCheckpoints(tmp_path / "typo", read_only=True)
  assert not (tmp_path / "typo").exists()


def test_mismatch_lists_shapes_dtypes_and_names(two_checkpoints):
  state = make_state()
  blocks = state["params"]["blocks"]
  blocks["w"] = jnp.ones((8, 4))
  blocks["b"] = blocks["b"].astype(jnp.float32)
  blocks["lora"] = jnp.ones(1)
  del state["step"]
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.raises(ValueError) as error:
      checkpoints.restore(on_one_device(state))
    assert checkpoints.steps() == [10, 20]
  message = str(error.value)
  assert "params/blocks/w: the checkpoint has float32[8,16], you ask for float32[8,4]" in message
  assert "params/blocks/b: the checkpoint has bfloat16[16], you ask for float32[16]" in message
  assert "params/blocks/lora: not in the checkpoint" in message
  assert "step: only in the checkpoint" in message


@pytest.mark.parametrize("impls", [("threefry2x32", "rbg"), ("rbg", "unsafe_rbg")])
def test_other_kind_of_key_is_a_mismatch(tmp_path, impls):
  saved, asked = ({"key": jax.random.key(0, impl=impl)} for impl in impls)
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    checkpoints.save(1, saved)
    with pytest.raises(ValueError, match="key: the checkpoint has .*, you ask for "):
      checkpoints.restore(on_one_device(asked))


def test_abstract_leaf_without_sharding_is_named(two_checkpoints):
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.raises(ValueError, match="has no sharding"):
      checkpoints.restore(jax.eval_shape(make_state))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("said_before", [False, True])
def test_failed_background_save_raises_once_and_keeps_the_older_one(tmp_path, said_before):
  resource = pytest.importorskip("resource")
  state = {"x": jax.random.normal(jax.random.key(0), (1024, 1024))}
  checkpoints = checkpoint.RunCheckpoints(tmp_path)
  checkpoints.save(1, state)
  checkpoints.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, hard))  # Stands in for a full disk.
  try:
    checkpoints.save(2, state)
    with pytest.raises(RuntimeError, match="could not be written .*The ones before it are whole"):
      checkpoints.wait() if said_before else checkpoints.close()
    if said_before:
      checkpoints.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]


def test_folder_that_cannot_be_written_to_is_named_before_anything_is_saved(tmp_path):
  (tmp_path / "checkpoints").write_text("a file")
  with pytest.raises(ValueError, match="checkpoints: cannot be written to"):
    checkpoint.RunCheckpoints(tmp_path)


def test_what_ends_a_block_is_not_hidden_by_a_failure_to_close(tmp_path, monkeypatch):
  with pytest.raises(KeyError, match="the cause"):
    with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
      close = checkpoints.close

      def fail():
        close()
        raise ValueError("another")

      monkeypatch.setattr(checkpoints, "close", fail)
      raise KeyError("the cause")


def test_checkpoint_that_may_not_be_read_is_not_set_aside(two_checkpoints, monkeypatch):
  def refuse(*unused):
    raise checkpoint.UnreadableError("ValueError: PERMISSION_DENIED: Error opening file")

  monkeypatch.setattr(checkpoint.RunCheckpoints, "_restore_one", refuse)
  with checkpoint.RunCheckpoints(two_checkpoints) as checkpoints:
    with pytest.raises(ValueError, match="Mend its permissions"):
      checkpoints.restore(on_one_device(make_state()))
    assert checkpoints.steps() == [10, 20]


def test_checkpoint_of_a_newer_version_is_refused(tmp_path, monkeypatch):
  state = {"x": jnp.ones(2)}
  with monkeypatch.context() as patch, checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    checkpoints.save(1, state)
    checkpoints.wait()
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1"):
      checkpoints.restore(on_one_device(state))


def test_steps_that_are_to_stay_for_ever_do(tmp_path):
  with checkpoint.RunCheckpoints(tmp_path, keep=1, keep_every=3) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, {"x": jnp.ones(2)})
      checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 7]


def test_saves_leave_no_thread_behind(tmp_path):
  before = threading.active_count()
  with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
    for step in range(1, 7):
      checkpoints.save(step, {"x": jnp.ones(2)})
  # orbax keeps one pool thread for metadata; six saves must not leave six.
  assert threading.active_count() - before <= 2


def test_saving_and_restoring_prints_nothing(tmp_path, capfd, caplog):
  state = make_state()
  # At INFO, because that is what absl.app.run shows.
  with warnings.catch_warnings(), caplog.at_level(logging.INFO, logger="absl"):
    warnings.simplefilter("error")
    with checkpoint.RunCheckpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state)
      checkpoints.restore(on_one_device(state))
  assert capfd.readouterr() == ("", "")
  assert not caplog.records
