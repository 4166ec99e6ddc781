"""Noise levels that follow the balance of the increments."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
import pytest

from tpgrpo_jax.credit import calibration

W, N = 4, 7
properties = settings(max_examples=25, deadline=None)
INCREMENTS = hnp.arrays(np.int32, (W, N), elements=st.integers(-2, 2)).map(lambda a: a / 8)
LEVELS = hnp.arrays(np.int32, W, elements=st.integers(1, 16)).map(lambda a: a / 16)


def of_signs(*signs):
  """One step's increments."""
  return np.array([signs], np.float32)


@properties
@given(LEVELS, INCREMENTS, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_level_rises_with_balance_and_falls_without_step_by_step(levels, increments, tolerance):
  new = calibration.adjust(levels, increments, step=1 / 32, tolerance=tolerance)
  for k in range(W):
    up = sum(1 for d in increments[k] if d > 0)
    down = sum(1 for d in increments[k] if d < 0)
    if abs(up - down) <= tolerance * N:
      assert new[k] == levels[k] + 1 / 32
    else:
      assert new[k] == levels[k] - 1 / 32


@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (-1, -1, -1, -1)])
def test_a_level_falls_whichever_sign_prevails(signs):
  new = calibration.adjust(np.array([0.5]), of_signs(*signs), tolerance=0.5)
  np.testing.assert_allclose(new, 0.49)


def test_the_tolerance_itself_still_is_balance():
  increments = of_signs(1, 1, 1, -1)
  adjust = lambda tolerance: calibration.adjust(np.array([0.5]), increments, tolerance=tolerance)
  np.testing.assert_allclose(adjust(0.5), 0.51)
  np.testing.assert_allclose(adjust(0.49), 0.49)


def test_increments_of_zero_are_neither():
  increments = of_signs(0, 0, 0, 1, -1)
  np.testing.assert_allclose(calibration.adjust(np.array([0.5]), increments, tolerance=0.0), 0.51)


@properties
@given(LEVELS, INCREMENTS)
def test_no_level_falls_below_one_step(levels, increments):
  new = levels
  for _ in range(30):
    new = calibration.adjust(new, increments, step=1 / 16, tolerance=0.0)
    assert new.min() >= 1 / 16


def test_the_levels_given_are_left_alone():
  levels = np.array([0.5, 0.25])
  calibration.adjust(levels, np.ones((2, 3)))
  np.testing.assert_array_equal(levels, [0.5, 0.25])


def test_levels_settle_where_noise_begins_to_harm():
  # A toy: up to .4 a step helps as often as it harms, beyond it harms more often.
  rng, levels = np.random.default_rng(0), np.array([0.1, 0.7])
  for _ in range(200):
    harm = 0.5 + 2 * np.maximum(levels - 0.4, 0)[:, None]
    levels = calibration.adjust(levels, np.where(rng.random((2, 4000)) < harm, -1.0, 1.0))
  # The default tolerance .1 is passed where 4 (level - .4) = .1, to a step and some chance.
  np.testing.assert_allclose(levels, 0.425, atol=0.025)
