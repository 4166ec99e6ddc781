"""What a user brings: a credit method, a ratio and a trust region, and broken ones."""

import jax.numpy as jnp

from tpgrpo_jax.credit import stepwise
from tpgrpo_jax.objective import surrogate
from tpgrpo_jax.types import CreditMethod, StepCredit


def credit(completion_reward):
  """The increments, twice."""
  reward = 2 * stepwise.increments(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape, bool))


def credit_without_turning_points(completion_reward):
  """A mistake: half of what it should return."""
  return StepCredit(stepwise.increments(completion_reward), None)


def credit_of_numbers(completion_reward):
  """A mistake: turning points as numbers."""
  reward = stepwise.increments(completion_reward)
  return StepCredit(reward, jnp.zeros(reward.shape))


def credit_that_decides(completion_reward):
  """A mistake: Python's if on an array."""
  return credit(completion_reward if completion_reward[0, 0] > 0 else -completion_reward)


def credit_of_two(completion_reward, prompts):
  """A mistake: another signature."""
  del prompts
  return credit(completion_reward)


outcome_alone = CreditMethod(credit, completions="none")
unknown_extra = CreditMethod(credit, completions="all", extras=("prompts",))
text_extra = CreditMethod(credit, completions="all", extras="key")
aligned = CreditMethod(
  lambda completion_reward, alignment: credit(completion_reward * alignment), "all", ("alignment",)
)
number = 5


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
