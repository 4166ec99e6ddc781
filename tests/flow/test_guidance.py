"""Guidance in one batch equals two calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax.flow import guidance
from tpgrpo_jax.types import Condition, GuidedCondition

B = 3


def velocity_fn(params, x, sigma, condition):
  """Depends on every input, sample by sample."""
  shift = condition.text.sum((1, 2)) + condition.pooled.sum(1) ** 2
  return jnp.tanh(params * x + (sigma * shift)[:, None, None, None])


def condition(seed):
  text, pooled = jax.random.split(jax.random.key(seed))
  return Condition(jax.random.normal(text, (B, 4, 5)), jax.random.normal(pooled, (B, 6)))


PARAMS = jnp.float32(1.3)
X = jax.random.normal(jax.random.key(0), (B, 2, 2, 1))
SIGMA = jnp.array([0.9, 0.5, 0.2])
PAIR = GuidedCondition(positive=condition(1), negative=condition(2))


def guided(scale):
  return guidance.classifier_free(velocity_fn, scale)(PARAMS, X, SIGMA, PAIR)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guided_velocity_equals_two_separate_calls(scale):
  positive = velocity_fn(PARAMS, X, SIGMA, PAIR.positive)
  negative = velocity_fn(PARAMS, X, SIGMA, PAIR.negative)
  # atol: roundings of a difference of numbers below 1, times the scale.
  expected = (1 - scale) * negative + scale * positive
  np.testing.assert_allclose(guided(scale), expected, atol=2e-6)


def test_scale_zero_is_the_negative_alone():
  alone = velocity_fn(PARAMS, X, SIGMA, PAIR.negative)
  np.testing.assert_allclose(guided(0.0), alone, atol=1e-6)


def test_guidance_evaluates_the_model_once_at_twice_the_batch():
  sizes = []

  def recording(params, x, sigma, condition):
    sizes.append((x.shape[0], sigma.shape[0], condition.text.shape[0], condition.pooled.shape[0]))
    return x

  guidance.classifier_free(recording, 2.0)(PARAMS, X, SIGMA, PAIR)
  assert sizes == [(2 * B,) * 4]


def test_neighbours_that_share_a_row_are_guided_as_if_each_had_its_own():
  def repeating(params, x, sigma, condition):
    each = lambda a: jnp.repeat(a, len(x) // len(a), axis=0)
    return velocity_fn(params, x, sigma, jax.tree.map(each, condition))

  x, sigma = jnp.concatenate([X, -X]), jnp.concatenate([SIGMA, SIGMA / 2])
  found = guidance.classifier_free(repeating, 4.5)(PARAMS, x, sigma, PAIR)
  whole = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), PAIR)
  np.testing.assert_allclose(
    found, guidance.classifier_free(velocity_fn, 4.5)(PARAMS, x, sigma, whole), atol=1e-6
  )


def test_a_sample_is_guided_independently_of_its_neighbours():
  one = jax.tree.map(lambda a: a[1:2], (X, SIGMA, PAIR))
  alone = guidance.classifier_free(velocity_fn, 4.5)(PARAMS, *one)
  np.testing.assert_allclose(guided(4.5)[1:2], alone, atol=1e-6)
