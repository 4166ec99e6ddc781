"""Noise-level grids against diffusers, and windows that stay where they are told to."""

import pathlib

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from tpgrpo_jax.flow import schedule

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sd3_sigmas.npz"
FLUX_GOLDEN = GOLDEN.with_name("flux_sigmas.npz")


def grids(arrays):
  """(T, shift, sigmas) of every "T_shift" entry."""
  for name, sigmas in arrays.items():
    if name not in ("script", "diffusers_version"):
      num_steps, shift = name.split("_")
      yield int(num_steps), float(shift), sigmas


def assert_equal_to_ours(arrays):
  # diffusers computes in float32: 1e-6 is a few of its ulps at 1.
  for num_steps, shift, sigmas in grids(arrays):
    ours = schedule.sd3_sigmas(num_steps, shift=shift)
    np.testing.assert_allclose(ours, sigmas, atol=1e-6, err_msg=f"T={num_steps}, shift={shift}")


def test_sd3_sigmas_are_those_of_diffusers():
  assert_equal_to_ours(np.load(GOLDEN))


@pytest.mark.parity
def test_sd3_sigmas_are_those_of_the_installed_diffusers():
  pytest.importorskip("diffusers")
  script = {"__name__": "golden"}
  exec(str(np.load(GOLDEN)["script"]), script)
  assert_equal_to_ours(script["make"]())


def test_sd3_sigmas_of_ten_steps_are_the_published_ones():
  published = [
    1,
    0.96013,
    0.91335,
    0.85769,
    0.79037,
    0.70728,
    0.60215,
    0.46488,
    0.27805,
    0.00893,
    0,
  ]
  np.testing.assert_allclose(schedule.sd3_sigmas(10, shift=3.0), published, atol=5e-6)


def assert_equal_to_our_flux_grids(arrays):
  for name, sigmas in arrays.items():
    if name not in ("script", "diffusers_version"):
      model, num_steps, tokens = name.split("_")
      num_steps, tokens = int(num_steps), int(tokens)
      dev, schnell = schedule.flux_sigmas(num_steps, tokens), schedule.linear_sigmas(num_steps)
      ours = dev if model == "dev" else schnell
      np.testing.assert_allclose(ours, sigmas, atol=1e-6, err_msg=name)  # as above


def test_flux_sigmas_are_those_of_diffusers_pipeline():
  assert_equal_to_our_flux_grids(np.load(FLUX_GOLDEN))


def test_golden_flux_sigmas_were_made_by_the_script_beside_them():
  script = FLUX_GOLDEN.with_name("make_flux_sigmas.py").read_text()
  assert str(np.load(FLUX_GOLDEN)["script"]) == script


@pytest.mark.parity
def test_flux_sigmas_are_those_of_the_installed_diffusers():
  pytest.importorskip("diffusers")
  script = {"__name__": "golden"}
  exec(str(np.load(FLUX_GOLDEN)["script"]), script)
  assert_equal_to_our_flux_grids(script["make"]())


def test_flux_shifts_by_its_ends_at_the_ends():
  for tokens, mu in [(256, 0.5), (4096, 1.15)]:
    wanted = schedule.shift_sigmas(schedule.linear_sigmas(7), np.exp(mu))
    np.testing.assert_allclose(schedule.flux_sigmas(7, tokens), wanted, rtol=1e-14)
  own = schedule.flux_sigmas(7, 10, base_shift=0.0, max_shift=2.0, base_tokens=10, max_tokens=30)
  np.testing.assert_allclose(own, schedule.linear_sigmas(7), rtol=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 50), st.integers(1, 8192))
def test_flux_sigmas_fall_from_one_to_zero_and_rise_with_the_image(num_steps, tokens):
  sigmas = schedule.flux_sigmas(num_steps, tokens)
  assert (len(sigmas), sigmas[0], sigmas[-1]) == (num_steps + 1, 1.0, 0.0)
  assert np.all(np.diff(sigmas) < 0)
  assert np.all(schedule.flux_sigmas(num_steps, 2 * tokens)[1:-1] > sigmas[1:-1])


def test_linear_sigmas_are_evenly_spaced():
  np.testing.assert_array_equal(schedule.linear_sigmas(4), [1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_every_schedule_falls_from_one_to_zero(name, num_steps):
  sigmas = schedule.SCHEDULES[name](num_steps, 3.0, 1024)
  assert (len(sigmas), sigmas[0], sigmas[-1]) == (num_steps + 1, 1.0, 0.0)
  assert np.all(np.diff(sigmas) < 0)


def test_no_shift_leaves_the_levels_alone():
  sigmas = np.linspace(0, 1, 11)
  np.testing.assert_array_equal(schedule.shift_sigmas(sigmas, 1.0), sigmas)


def test_shifts_compose_by_multiplication():
  sigmas = np.linspace(0, 1, 11)
  twice = schedule.shift_sigmas(schedule.shift_sigmas(sigmas, 3.0), 2.0)
  np.testing.assert_allclose(schedule.shift_sigmas(sigmas, 6.0), twice, rtol=1e-14)


def test_a_fixed_window_is_not_drawn():
  rng = np.random.default_rng(0)
  before = rng.bit_generator.state
  assert schedule.draw_window(rng, (2, 5), ()) == (2, 5)
  assert rng.bit_generator.state == before


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32))
def test_a_drawn_window_keeps_its_length_and_its_range(low, length, room, seed):
  drawn = schedule.draw_window(
    np.random.default_rng(seed), (1, 1 + length), (low, low + length + room)
  )
  assert drawn[1] - drawn[0] == length
  assert low <= drawn[0] and drawn[1] <= low + length + room


def test_every_window_of_the_range_is_drawn_equally_often():
  rng = np.random.default_rng(0)
  starts = [schedule.draw_window(rng, (0, 2), (1, 6))[0] for _ in range(4000)]
  counts = np.bincount(starts, minlength=5)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:], 1000, atol=150)  # 5 standard deviations


def test_one_generator_draws_one_window():
  draws = [schedule.draw_window(np.random.default_rng(7), (0, 2), (0, 9)) for _ in range(2)]
  assert draws[0] == draws[1]


def starts_of(epochs, **options):
  windows = [schedule.progressive_window(epoch, **options) for epoch in range(epochs)]
  assert {end - start for start, end in windows} == {4}
  return [start for start, _ in windows]


# MixGRPO's 4 of 25 steps, moved every 25 epochs; the caller passes T - 1 where the last step has no noise.
@pytest.mark.parametrize("num_steps, places", [(25, 22), (24, 21)])
def test_progressive_window_visits_every_place_in_order_then_begins_again(num_steps, places):
  starts = starts_of(25 * places + 50, window=(0, 4), num_steps=num_steps, every=25)
  assert starts == [*np.repeat(range(places), 25), *np.repeat([0, 1], 25)]
  assert max(starts) + 4 == num_steps


def test_progressive_window_begins_again_at_its_own_first_place():
  assert starts_of(7, window=(3, 7), num_steps=9, every=1) == [3, 4, 5, 3, 4, 5, 3]


def test_progressive_window_that_fills_the_grid_stays():
  assert starts_of(3, window=(0, 4), num_steps=4, every=1) == [0, 0, 0]


def test_all_steps_of_the_window_are_taken_where_none_are_drawn():
  rng = np.random.default_rng(0)
  before = rng.bit_generator.state
  np.testing.assert_array_equal(schedule.draw_steps(rng, (2, 6), 0), [2, 3, 4, 5])
  assert rng.bit_generator.state == before


@settings(max_examples=25)
@given(st.integers(0, 5), st.integers(1, 8), st.data())
def test_drawn_steps_are_distinct_ascending_and_of_the_window(start, length, data):
  count = data.draw(st.integers(1, length))
  rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
  drawn = schedule.draw_steps(rng, (start, start + length), count)
  assert len(drawn) == count
  assert np.all(np.diff(drawn) > 0)
  assert start <= drawn[0] and drawn[-1] < start + length


def test_every_step_of_the_window_is_drawn_equally_often():
  rng = np.random.default_rng(0)
  drawn = np.concatenate([schedule.draw_steps(rng, (1, 6), 2) for _ in range(2000)])
  counts = np.bincount(drawn, minlength=6)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:], 800, atol=110)  # sqrt(2000 .4 .6) = 22; 5 of those


FOURTEEN = schedule.sd3_sigmas(14)


def numbers_of(levels, sigmas=FOURTEEN):
  """Which entries of the grid the levels are."""
  found = np.asarray(levels)[..., None] == sigmas.astype(np.float32)
  assert found.any(-1).all()
  return found.argmax(-1)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_permuted_levels_are_distinct_levels_of_the_window_for_each_sample(count):
  levels = schedule.permuted_levels(np.random.default_rng(0), FOURTEEN, (1, 12), count, 64)
  assert (levels.shape, levels.dtype) == ((count, 64), np.float32)
  for sample in numbers_of(levels).T:
    assert len({*sample}) == count
    assert {*sample} <= {*range(1, 12)}


def test_permuted_levels_are_each_samples_own_and_in_random_order():
  levels = schedule.permuted_levels(np.random.default_rng(0), FOURTEEN, (1, 12), 11, 64)
  assert len({*map(tuple, numbers_of(levels).T)}) == 64  # of 11! orders


def test_permuted_levels_take_every_place_equally_often():
  levels = schedule.permuted_levels(np.random.default_rng(0), FOURTEEN, (1, 12), 3, 11_000)
  counts = [np.bincount(row, minlength=12)[1:] for row in numbers_of(levels)]
  np.testing.assert_allclose(counts, 1000, atol=5 * 30)  # sqrt(1000 10 / 11) = 30.2; 5 of those


# AWM: T = 14, the first level and the last two left out, one level of each of six parts.
PARTS = [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}]


def test_stratified_levels_come_one_from_each_part_and_every_level_comes():
  rng, seen = np.random.default_rng(0), [set() for _ in PARTS]
  for _ in range(100):
    levels = schedule.stratified_levels(rng, FOURTEEN, (1, 12), 6, 3)
    assert levels.shape == (6, 3)
    for found, row in zip(seen, numbers_of(levels), strict=True):
      found.update(row.tolist())
  assert seen == PARTS


def test_stratified_levels_are_the_same_for_all_samples():
  levels = schedule.stratified_levels(np.random.default_rng(1), FOURTEEN, (1, 12), 6, 5)
  np.testing.assert_array_equal(levels, np.broadcast_to(levels[:, :1], levels.shape))


@pytest.mark.parametrize("name", schedule.LEVEL_DRAWS)
def test_as_many_levels_as_the_window_has_are_all_of_them(name):
  levels = schedule.LEVEL_DRAWS[name](np.random.default_rng(0), FOURTEEN, (2, 9), 7, 4)
  np.testing.assert_array_equal(np.sort(numbers_of(levels), axis=0).T, [range(2, 9)] * 4)


def test_flux2_mu_lies_on_the_lines_that_its_authors_fitted():
  assert schedule.flux2_mu(10, 1024) == pytest.approx(1.9878, abs=1e-4)  # of 10 steps
  assert schedule.flux2_mu(200, 1024) == pytest.approx(0.00016927 * 1024 + 0.45666666)
  half = schedule.flux2_mu(105, 1024)
  assert half == pytest.approx((schedule.flux2_mu(10, 1024) + schedule.flux2_mu(200, 1024)) / 2)
  assert schedule.flux2_mu(10, 5000) == schedule.flux2_mu(200, 5000)


def test_shifted_grid_is_the_even_one_shifted_once():
  found = schedule.SCHEDULES["shifted"](4, 6.0, 0)
  even = np.asarray([1, 0.75, 0.5, 0.25, 0])
  np.testing.assert_allclose(found, 6 * even / (1 + 5 * even))


@pytest.mark.parity
@pytest.mark.parametrize("num_steps", [4, 8, 50])
def test_flux2_and_z_image_grids_are_those_of_the_installed_diffusers(num_steps):
  diffusers = pytest.importorskip("diffusers")
  from diffusers.pipelines.flux2 import pipeline_flux2_klein
  from diffusers.pipelines.z_image import pipeline_z_image

  kind = diffusers.FlowMatchEulerDiscreteScheduler
  for tokens in (576, 1024, 4096, 4400):
    mu = pipeline_flux2_klein.compute_empirical_mu(tokens, num_steps)
    scheduler = kind(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    ours = schedule.SCHEDULES["flux2"](num_steps, 3.0, tokens)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
  for shift in (3.0, 6.0):
    scheduler = kind(shift=shift)
    scheduler.set_timesteps(sigmas=pipeline_z_image.get_default_z_image_sigmas(num_steps), mu=1.0)
    ours = schedule.SCHEDULES["shifted"](num_steps, shift, 0)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
