"""Utilisation is operations over time over peak."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import tasks
from tpgrpo_jax.cost import flops, hardware, utilisation
from tpgrpo_jax.forecasting import lowering
from tpgrpo_jax.training import build, step
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib


def test_rate_and_share_of_the_peak(monkeypatch):
  kind = jax.devices()[0].device_kind.lower()
  monkeypatch.setitem(hardware.CHIPS, kind, hardware.Chip(1, 1e9, 1, 1))
  meter = utilisation.Meter({"rollout": lambda a: a @ a.T})
  x = jnp.ones((10, 20))
  for calls in (3, 5):  # the second is not looked at
    meter.count("rollout", calls, x)
  row = meter.row({"rollout": 0.5, "update": 1.0})
  operations = 3 * 2 * 10 * 20 * 10
  assert row["time/rollout_teraflops"] == pytest.approx(operations / 0.5 / 1e12)
  assert row["time/rollout_utilisation"] == pytest.approx(
    operations / 0.5 / 1e9 / jax.device_count()
  )
  assert row.keys() == {"time/rollout_teraflops", "time/rollout_utilisation"}


def test_what_a_program_skips_is_not_counted_as_done():
  meter = utilisation.Meter({"rollout": lambda a: a @ a})
  meter.count("rollout", 1, jnp.ones((4, 4)))
  whole, asked = meter.total(), []
  for number in (3, 2, 0):
    meter.skip("rollout", number, lambda number=number: asked.append(number) or 0.25 * whole)
    assert meter.total() == (1 - 0.25 * number) * whole > 0
    done = meter.row({"rollout": 1.0})["time/rollout_teraflops"]
    assert done == (1 - 0.25 * number) * whole / 1e12
  assert asked == [3]


def test_unknown_devices_have_no_share():
  meter = utilisation.Meter({"update": lambda a: a @ a})
  meter.count("update", 1, jnp.ones((4, 4)))
  assert meter.row({"update": 1.0}).keys() == {"time/update_teraflops"}


@pytest.mark.slow
def test_what_rematerialisation_repeats_is_no_work_of_the_model():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  base, found = tasks.tiny_text(), {}
  for remat in ("none", "full", "dots"):
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, remat=remat))
    plan = lowering.open_plan(config, mesh)
    method = method_lib.build_method(config, build.without_remat(config, plan.model))
    with jax.set_mesh(mesh):
      function, args, _ = lowering.update_program(plan)
      ran = flops.count(function, *args).total
      found[remat] = (ran, flops.count(step.make_train_step(config, method), *args).total)
  assert found["none"][0] == found["none"][1] == found["full"][1] < 0.9 * found["full"][0]
  assert found["dots"][0] < 1.1 * found["none"][0]  # which keeps the products
