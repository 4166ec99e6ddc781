"""What an optimizer update learns from: an epoch's samples, cut and stacked."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.flow import schedule
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.training import mesh as mesh_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What one optimizer update learns from: C microbatches of B samples, W rows each.

  `split_updates` makes it of the rollout's microbatches; an update takes it as `stacked` leaves it.

  Attributes:
    transitions: C of them, S M = B; stacked, one with a leading axis C.
    conditions: C of them, leading axis S or a divisor of it; stacked, one with a leading axis C (or 1).
    advantage: [C, W, B].
    weight: [C, W, B], 0 where a sample is left out.
    levels: [C, W, S] noise levels, where the objective is one of the forward process; else None.
    key: of the update.
    limit: scalar; the state stays as it was where a log-ratio is above it. None does without.
    phase: scalar, of `make_rescoring_step`: SCORE, FIRST or LATER; else None.
  """

  transitions: Any
  conditions: Any
  advantage: Any
  weight: Any
  levels: Any = None
  key: Any = None
  limit: Any = None
  phase: Any = None


SCORE, FIRST, LATER = range(3)  # what a rescoring step does with a batch


def split_updates(
  config: config_lib.Config, rollout, advantage: np.ndarray, weight: np.ndarray, epoch: int
) -> list[Batch]:
  """Cuts an epoch into `updates_per_epoch` batches: of whole microbatches, or of steps, in order.

  Args:
    config: of the run.
    rollout: of the epoch.
    advantage: [W, B].
    weight: [B].
    epoch: its number, from 0, for what is drawn.
  """
  rng = np.random.default_rng((config.seed, epoch, 2))
  chunks, updates = len(rollout.transitions), config.train.updates_per_epoch
  weights = _row_weights(config.loss, rng, *advantage.shape) * weight
  # As the microbatches hold them.
  cut = lambda a: a[:, rollout.order].reshape(len(a), chunks, -1).swapaxes(0, 1)
  advantage, weights = cut(advantage), cut(weights).astype(np.float32)
  levels = _draw_levels(config, rollout, rng, chunks)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), epoch), 1)
  batches = []
  for number, (part, rows) in enumerate(_shares(config, chunks, advantage.shape[1])):
    transitions = rollout.transitions[part]
    if rows != slice(None):
      transitions = [_take_steps(t, rows) for t in transitions]
    batches.append(
      Batch(
        transitions,
        rollout.conditions[part],
        advantage[part, rows],
        weights[part, rows],
        None if levels is None else levels[part],
        None if levels is None else jax.random.fold_in(key, number),
      )
    )
  assert len(batches) == updates
  return batches


def _by_samples(updates, chunks, rows):
  del rows
  share = chunks // updates
  return [(slice(i, i + share), slice(None)) for i in range(0, chunks, share)]


def _by_steps(updates, chunks, rows):
  del chunks
  share = rows // updates
  return [(slice(None), slice(i, i + share)) for i in range(0, rows, share)]


_SHARES = {"samples": _by_samples, "steps": _by_steps}


def _shares(config, chunks, rows):
  """(microbatches, steps) of each update."""
  return _SHARES[config.train.updates_by](config.train.updates_per_epoch, chunks, rows)


def _take_steps(transitions, rows):
  """The Transitions of some of the steps."""
  take = functools.partial(jax.tree.map, lambda a: a[rows])
  names = ("states", "members", "velocity", "log_prob", "sigma", "sigma_next")
  taken = {name: take(getattr(transitions, name)) for name in names}
  if transitions.members is None:  # and what the last of them leads to
    taken["states"] = transitions.states[rows.start : rows.stop + 1]
  return dataclasses.replace(transitions, **taken)


def _row_weights(asked, rng, rows, batch):
  """[W, B]: 1, or with chunks what makes every chunk count the same, and 0 for those that are not drawn."""
  if not asked.chunks:
    return np.ones((rows, batch))
  weights = np.repeat(surrogate.chunk_weights(asked.chunks)[:, None], batch, axis=1)
  if asked.chunks_per_sample:
    number = np.tile(np.arange(len(asked.chunks)), (batch, 1))
    taken = rng.permuted(number, axis=1) < asked.chunks_per_sample  # [B, chunks]
    weights *= np.repeat(taken, asked.chunks, axis=1).T
  return weights


def _draw_levels(config, rollout, rng, chunks):
  """[C, W, S] of the forward process, or None."""
  if config.sampler.rollout != "ode":
    return None
  start, end = config.sampler.window
  draw = schedule.LEVEL_DRAWS[config.loss.level_draw]
  count, batch = config.loss.levels or end - start, config.train.microbatch
  drawn = [draw(rng, rollout.sigmas, (start, end), count, batch) for _ in range(chunks)]
  return np.stack(drawn).astype(np.float32)


def stacked(config: config_lib.Config, batch: Batch, like: Batch | None = None) -> Batch:
  """The batch as an update takes it, cut into microbatches of train.update_microbatch samples.

  It is made before the update, and not within its program, which would hold all of it twice.

  Args:
    config: of the run.
    batch: as `split_updates` makes it.
    like: a stacked batch of the same samples, with which this one shares final latents and conditions.
  """
  train = config.train
  parts = train.microbatch // (train.update_microbatch or train.microbatch)
  states = len(batch.transitions[0].final)
  rows = max(len(leaf) for leaf in jax.tree.leaves(batch.conditions[0]))
  unit = states // rows if rows > 1 else 1
  members = batch.advantage.shape[2] // states
  if like is None:
    transitions, conditions = _stack(batch.transitions, batch.conditions, parts, unit)
  else:
    steps = [dataclasses.replace(t, final=None) for t in batch.transitions]
    transitions = dataclasses.replace(
      _stack(steps, None, parts, unit)[0], final=like.transitions.final
    )
    conditions = like.conditions
  cut = lambda a, unit: a if a is None else _dealt(a, 2, parts, unit)
  return dataclasses.replace(
    batch,
    transitions=transitions,
    conditions=conditions,
    advantage=cut(batch.advantage, unit * members),
    weight=cut(batch.weight, unit * members),
    levels=cut(batch.levels, unit),
  )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _stack(transitions, conditions, parts, unit):
  """Microbatches and their conditions with a leading axis, each cut into `parts`."""

  def joined(leaves, axis, unit):
    whole = _dealt(jnp.stack(leaves), axis, parts, unit)
    return whole if whole.shape[axis] == 1 else mesh_lib.divided(whole, axis)

  def of_field(name) -> Any:
    leaves = [getattr(t, name) for t in transitions]
    if name in ("sigma", "sigma_next"):
      return jnp.stack(leaves).repeat(parts, axis=0)
    return None if leaves[0] is None else joined(leaves, 1 if name == "final" else 2, unit)

  def of_conditions(conditions):
    if isinstance(conditions[0], types.GuidedCondition):  # all are guided away from one
      positive = of_conditions([c.positive for c in conditions])
      return types.GuidedCondition(positive, of_conditions([conditions[0].negative]))
    return jax.tree.map(lambda *leaves: joined(leaves, 1, 1), *conditions)

  names = [field.name for field in dataclasses.fields(types.Transitions)]
  whole = types.Transitions(**{name: of_field(name) for name in names})
  return whole, conditions and of_conditions(conditions)


def _dealt(a, axis, parts, unit):
  """[C, ..., N, ...] -> [C parts, ..., N / parts, ...]: runs of `unit` neighbours, dealt out in turn.

  So each part has as many of every device. One row for all is repeated, unless all microbatches share it.
  """
  if a.shape[axis] == 1:
    return a if len(a) == 1 else a.repeat(parts, axis=0)
  before, size, after = a.shape[1:axis], a.shape[axis] // parts, a.shape[axis + 1 :]
  a = a.reshape(len(a), *before, size // unit, parts, unit, *after)
  order = [0, axis + 1, *(i for i in range(1, a.ndim) if i != axis + 1)]
  return a.transpose(order).reshape(len(a) * parts, *before, size, *after)


def with_scores(batch: Batch, scores: dict[str, jax.Array]) -> Batch:
  """The batch with the scores of `make_rescoring_step` in place of the rollout's."""
  # Laid out as they were, so that the next call is one of the same program.
  like = lambda name, a: jax.device_put(a, getattr(batch.transitions, name).sharding)
  replaced = {name: like(name, a) for name, a in scores.items()}
  transitions = dataclasses.replace(batch.transitions, **replaced)
  return dataclasses.replace(batch, transitions=transitions)
