"""Utilisation is operations over time over peak."""

import jax
import jax.numpy as jnp
import pytest

from tpgrpo_jax.training import hardware, utilisation


def test_rate_and_share_of_the_peak(monkeypatch):
  kind = jax.devices()[0].device_kind.lower()
  monkeypatch.setitem(hardware.CHIPS, kind, hardware.Chip(1, 1e9, 1, 1))
  meter = utilisation.Meter()
  x = jnp.ones((10, 20))
  for calls in (3, 5):  # the second is not looked at
    meter.count("rollout", calls, lambda a: a @ a.T, x)
  row = meter.row({"rollout": 0.5, "update": 1.0})
  operations = 3 * 2 * 10 * 20 * 10
  assert row["time/rollout_teraflops"] == pytest.approx(operations / 0.5 / 1e12)
  assert row["time/rollout_utilisation"] == pytest.approx(
    operations / 0.5 / 1e9 / jax.device_count()
  )
  assert row.keys() == {"time/rollout_teraflops", "time/rollout_utilisation"}


def test_unknown_devices_have_no_share():
  meter = utilisation.Meter()
  meter.count("update", 1, lambda a: a @ a, jnp.ones((4, 4)))
  assert meter.row({"update": 1.0}).keys() == {"time/update_teraflops"}
