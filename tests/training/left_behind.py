"""What a run leaves, without its times: the rows of its metrics, its last state, its best weights."""

import dataclasses
from typing import Any

from etils import epath
import jax
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import best, checkpoint, metrics
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

_shapes: dict[tuple[str, jax.sharding.Mesh], Any] = {}


def abstract_state(config):
  """What the checkpoints of a run are restored into, made once for all runs of one kind."""
  kind = repr(dataclasses.replace(config, run=config_lib.Run())), mesh_lib.make_mesh(config.mesh)
  if kind not in _shapes:
    session = session_lib.open_session(config)
    with jax.set_mesh(session.mesh):
      _shapes[kind] = session_lib.abstract_state(session)
  return _shapes[kind]


def final_state(config):
  """(arrays of the last checkpoint by name, what lies beside them)."""
  with checkpoint.RunCheckpoints(config.run.dir, read_only=True) as checkpoints:
    restored, extra = checkpoints.restore(abstract_state(config))
  named = jax.tree.leaves_with_path(restored)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in named}, extra


def best_state(config):
  """(epoch, arrays) of the best weights."""
  weights, extra = best.load(config.run.dir, abstract_state(config).ema)
  return extra["step"], [np.asarray(leaf) for leaf in jax.tree.leaves(weights)]


def rows(config, without=()):
  """The rows of metrics.jsonl; `without`: metrics that are left out too."""
  read = metrics.read_rows(epath.Path(config.run.dir) / "metrics.jsonl")
  return [
    {k: v for k, v in row.items() if not k.startswith("time/") and k not in without} for row in read
  ]


def assert_same_run(found, wanted, without=()):
  """Bit for bit. `without`: metrics that one of the two has no way to know."""
  assert rows(found, without) == rows(wanted, without)
  (a, extra), (b, _) = final_state(found), final_state(wanted)
  assert extra["epoch"] == found.train.epochs
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  (epoch, a), (wanted_epoch, b) = best_state(found), best_state(wanted)
  assert epoch == wanted_epoch
  jax.tree.map(np.testing.assert_array_equal, a, b)
