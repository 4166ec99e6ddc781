"""Pairs that an update evaluates side by side share what is gathered, and give the same gradient."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mesh import FLUX
from test_step import make_method

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, types
from tpgrpo_jax.cost import collectives, flops
from tpgrpo_jax.models import flux, lora
from tpgrpo_jax.training import batches, state, step
from tpgrpo_jax.training import mesh as mesh_lib

ROWS, BATCH = 4, 4


@pytest.fixture(scope="module")
def parts():
  """(velocity function, adapters, frozen weights, batch) of a small FLUX."""
  model = flux.Flux(FLUX, guidance=3.5, remat="full", rngs=nnx.Rngs(params=0))
  targets = ("attn.to_q", "proj_mlp")
  lora.add_lora(model, jax.random.key(1), rank=2, alpha=4.0, init="gaussian", targets=targets)
  graphdef, trainable, frozen = lora.split_trainable(model, rank=2)
  jitter = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)
  trainable, frozen = jax.tree.map(jitter, (trainable, frozen))
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  sigma = jnp.linspace(0.9, 0.3, ROWS + 1)
  x, velocity = draw(2, ROWS, BATCH, 4, 4, 4), draw(3, ROWS, BATCH, 4, 4, 4)
  transitions = types.Transitions(
    states=x,
    members=x[:, :, None] + 0.1 * draw(4, ROWS, BATCH, 1, 4, 4, 4),
    velocity=velocity,
    log_prob=jnp.full((ROWS, BATCH, 1), -0.5),
    sigma=sigma[:-1],
    sigma_next=sigma[1:],
    final=x[-1],
  )
  condition = types.Condition(draw(5, BATCH, 5, 12), draw(6, BATCH, 10))
  advantage, weight = draw(7, 1, ROWS, BATCH), jnp.ones((1, ROWS, BATCH))
  batch = batches.Batch([transitions], [condition], advantage, weight)
  return models.make_velocity_fn(graphdef), trainable, frozen, batch


def run_of(parts, mesh, count):
  """(program, its arguments) of an update with `count` pairs side by side."""
  velocity_fn, trainable, frozen, batch = parts
  method = make_method(
    velocity_fn=velocity_fn,
    reference_velocity_fn=velocity_fn,
    sigmas=np.linspace(0.9, 0.3, ROWS + 1),
    window=ROWS,
  )
  config = config_lib.Config(
    loss=config_lib.Loss(clip_range=0.9), train=config_lib.Train(steps_per_call=count)
  )
  place = lambda tree: jax.device_put(tree, mesh_lib.param_shardings(mesh, tree))
  across = jax.NamedSharding(mesh, jax.P(None, mesh_lib.BATCH))
  lay = lambda a: jax.device_put(a, across if a.ndim > 1 else jax.NamedSharding(mesh, jax.P()))
  transitions = jax.tree.map(lay, batch.transitions)
  conditions = jax.device_put(batch.conditions, mesh_lib.batch_sharding(mesh))
  final = jax.device_put(batch.transitions[0].final, mesh_lib.batch_sharding(mesh))
  laid = dataclasses.replace(
    batch,
    transitions=[dataclasses.replace(transitions[0], final=final)],
    conditions=conditions,
  )
  with jax.set_mesh(mesh):
    laid = batches.stacked(config, laid)
  before = place(state.init_state(trainable, method.optimizer))
  return step.make_train_step(config, method), (before, place(frozen), {}, laid)


@pytest.mark.slow
def test_pairs_side_by_side_gather_once_and_change_nothing(parts):
  mesh = mesh_lib.make_mesh(config_lib.Mesh(1, 4, 1), jax.devices()[:4])
  found = {}
  with jax.set_mesh(mesh):
    for count in (1, 4):
      run, args = run_of(parts, mesh, count)
      work = flops.count(run, *args).total
      program = run.lower(*args).compile()
      traffic = collectives.read_traffic(program.as_text(), devices=4)
      after, metrics = program(*args)
      found[count] = work, traffic.received, *jax.device_get((after.trainable, metrics))
  assert found[4][0] <= found[1][0]  # no pass more
  assert found[4][1]["all-gather"] < 0.3 * found[1][1]["all-gather"]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, found[4][2], found[1][2])
  for name, value in found[1][3].items():
    assert found[4][3][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
