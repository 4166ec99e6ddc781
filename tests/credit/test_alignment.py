"""Shares of the terminal reward by what each step brought the latent nearer."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.credit import alignment

W, B = 5, 4
COSINES = hnp.arrays(np.int32, (W + 1, B), elements=st.integers(-16, 16)).map(
  lambda a: jnp.asarray(a / 16, jnp.float32)
)
EPS = st.sampled_from([0.0, 1e-3, 0.5])
shares = jax.jit(alignment.shares, static_argnames="eps")
properties = settings(max_examples=25, deadline=None)


@properties
@given(COSINES, EPS)
def test_shares_are_the_gains_over_their_mean_step_by_step(cosine, eps):
  for b in range(B):
    c = [float(v) for v in cosine[:, b]]
    gain = [(c[k + 1] - c[k] if c[k + 1] > c[k] else 0.0) + eps for k in range(W)]
    mean = sum(gain) / W
    expected = [g / mean if mean else 1.0 for g in gain]
    np.testing.assert_allclose(shares(cosine, eps=eps)[:, b], expected, rtol=1e-5)


def test_shares_have_their_worked_values():
  # Gains 1/2, none, 1/4, none: of 3/4 in all.
  cosine = jnp.array([0, 0.5, 0.25, 0.5, 0.5])[:, None]
  np.testing.assert_allclose(
    alignment.shares(cosine, eps=0.0)[:, 0], [8 / 3, 0, 4 / 3, 0], rtol=1e-6
  )


@properties
@given(COSINES, EPS)
def test_shares_have_mean_one(cosine, eps):
  np.testing.assert_allclose(shares(cosine, eps=eps).mean(0), 1, rtol=1e-6)


@properties
@given(COSINES)
def test_every_step_has_a_share(cosine):
  assert np.all(shares(cosine, eps=1e-3) > 0)


@properties
@given(COSINES)
def test_a_large_eps_makes_the_shares_equal(cosine):
  np.testing.assert_allclose(shares(cosine, eps=1e6), 1, rtol=1e-5)


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("slope", [0.0, -0.1])
def test_shares_are_one_where_no_step_gains(eps, slope):
  cosine = slope * jnp.arange(W + 1.0)[:, None] * jnp.ones(B)
  np.testing.assert_allclose(alignment.shares(cosine, eps=eps), 1, rtol=1e-6)


@properties
@given(COSINES, EPS)
def test_coca_shares_out_the_terminal_reward(cosine, eps):
  reward = jnp.full((W + 1, B), jnp.nan).at[-1].set(jnp.arange(B))  # no completion is read
  credit = alignment.coca(reward, alignment=cosine, eps=eps)
  np.testing.assert_array_equal(credit.reward, np.tile(np.arange(B), (W, 1)))
  # Compiled and not: the roundings of a mean may differ.
  np.testing.assert_allclose(credit.share, shares(cosine, eps=eps), rtol=1e-6)
  assert not np.any(credit.is_turning_point)
