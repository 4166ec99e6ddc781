"""What a user brings: a credit method, a ratio and a trust region, and broken ones."""

import jax.numpy as jnp

from tpgrpo_jax.credit import stepwise
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.types import StepCredit


def credit(completion_reward):
  """The increments, twice."""
  reward = 2 * stepwise.increments(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool))


def ratio(x_next, gaussian, old_gaussian):
  """How far the mean has moved along the noise, in standard deviations (RatioNorm / std)."""
  noise = (x_next - old_gaussian.mean) / old_gaussian.std
  moved = (gaussian.mean - old_gaussian.mean) / old_gaussian.std
  return jnp.mean(noise * moved, axis=(1, 2, 3))


def trust_region(log_ratio, advantage, divergence, *, limit):
  """-A log r, less where the step has moved: no clip."""
  loss = -advantage * log_ratio + divergence / limit
  return surrogate.Terms(loss, jnp.ones(loss.shape, bool))


def constant_region(log_ratio, advantage, divergence, *, limit):
  """A surrogate whose terms are always active, said with one bool."""
  del divergence, limit
  return surrogate.Terms(-advantage * jnp.exp(log_ratio), jnp.array(True))


def ratio_of_every_dimension(x_next, gaussian, old_gaussian):
  """A mistake: no mean over the latent dimensions."""
  del old_gaussian
  return x_next - gaussian.mean


def ratio_of_the_batch(x_next, gaussian, old_gaussian):
  """A mistake: one number for all samples."""
  del old_gaussian
  return jnp.mean(x_next - gaussian.mean)


def pair_of_ratios(x_next, gaussian, old_gaussian):
  """A mistake: two arrays."""
  log_ratio = ratio(x_next, gaussian, old_gaussian)
  return log_ratio, log_ratio


def bare_region(log_ratio, advantage, divergence, *, limit):
  """A mistake: the loss alone."""
  del divergence, limit
  return -advantage * log_ratio


def mean_region(log_ratio, advantage, divergence, *, limit):
  """A mistake: the mean loss."""
  terms = trust_region(log_ratio, advantage, divergence, limit=limit)
  return surrogate.Terms(jnp.mean(terms.loss), terms.active)


def weighing_region(log_ratio, advantage, divergence, *, limit):
  """A mistake: numbers for active."""
  terms = trust_region(log_ratio, advantage, divergence, limit=limit)
  return surrogate.Terms(terms.loss, jnp.ones(terms.loss.shape))
