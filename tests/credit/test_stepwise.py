"""Increments of the completion reward."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax.credit import outcome, stepwise

# Sixteenths of small integers: float32 sums of them are exact, so no test here needs a tolerance.
REWARDS = hnp.arrays(np.int32, (6, 4), elements=st.integers(-64, 64)).map(
  lambda a: jnp.asarray(a / 16, jnp.float32)
)
increments = jax.jit(stepwise.increments)
properties = settings(max_examples=25, deadline=None)


def test_increments_have_their_worked_values():
  reward = jnp.array([0, 1, 0.5, 0.2, 0.8, 1.5])[:, None]
  np.testing.assert_allclose(
    stepwise.increments(reward)[:, 0], [1, -0.5, -0.3, 0.6, 0.7], atol=1e-7
  )


@properties
@given(REWARDS)
def test_increments_sum_to_what_the_whole_window_changed(reward):
  np.testing.assert_array_equal(increments(reward).sum(0), reward[-1] - reward[0])


@properties
@given(REWARDS, st.integers(-64, 64))
def test_increments_ignore_a_shift(reward, shift):
  np.testing.assert_array_equal(increments(reward + shift), increments(reward))


@properties
@given(REWARDS, st.integers(-8, 8))
def test_increments_scale_with_the_reward(reward, factor):
  np.testing.assert_array_equal(increments(reward * factor), increments(reward) * factor)


@properties
@given(REWARDS)
def test_one_trajectory_gives_its_column(reward):
  np.testing.assert_array_equal(stepwise.increments(reward[:, 1]), increments(reward)[:, 1])


@properties
@given(REWARDS)
def test_terminal_reward_is_that_of_the_finished_image_at_every_step(reward):
  np.testing.assert_array_equal(outcome.terminal(reward), np.tile(reward[-1], (5, 1)))


def test_terminal_reward_reads_no_completion():
  reward = jnp.full((4, 2), jnp.nan).at[-1].set(1.0)
  np.testing.assert_array_equal(outcome.terminal(reward), np.ones((3, 2)))
