"""How far a step has moved since the rollout: its log-ratio, per sample.

RATIOS is the table by name. `log_prob` compares two log-probs of x_next (means over latent dims);
`normalized` compares two Gaussians, and needs the rollout's, which follows from its velocity.
"""

import math

import jax
import jax.numpy as jnp

from tpgrpo_jax.types import Gaussian


def log_prob(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
  """log r = log_prob - old_log_prob, of log-probs that are means over latent dims (Flow-GRPO).

  With z the rollout's noise and m = mean - mean_old it is
  mean_dims(z m) / std - mean_dims(m^2) / (2 std^2) for a Gaussian step, and 2 std^2 times that for
  cps: both its size and its bias depend on the step and on the dynamics.

  Args:
    log_prob: [B] under the current weights.
    old_log_prob: [B] at the rollout.

  Returns:
    [B]; exactly 0 where the two are equal.
  """
  return log_prob - old_log_prob


def normalized(x_next: jax.Array, gaussian: Gaussian, old_gaussian: Gaussian) -> jax.Array:
  """log r = MEAN over latent dims of (x_next - mean_old)(mean - mean_old) / std (RatioNorm).

  GRPO-Guard (arXiv 2510.22319): std times the Gaussian log-ratio, without its quadratic part. Its
  mean over draws is 0, and its gradient in `mean` at the rollout's weights is noise / D, whatever
  the std and the dynamics. (The released code takes the quadratic part's mean over the whole
  micro-batch; here, as in the paper, every sample has its own.)

  Args:
    x_next: [B, ...], drawn from `old_gaussian`.
    gaussian: of the current weights; its std is the old one's, without latent dims.
    old_gaussian: of the weights that sampled, at the same x.

  Returns:
    [B]; exactly 0 where mean equals mean_old bit for bit; NaN where std is 0.
  """
  noise = (x_next - old_gaussian.mean) / old_gaussian.std
  moved = gaussian.mean - old_gaussian.mean
  # Scaled before the sum, which comes last, as in flow.steps.
  scale = math.prod(moved.shape[1:]) ** -0.5
  return jnp.sum((noise * scale) * (moved * scale), axis=tuple(range(1, moved.ndim)))


RATIOS = {"log_prob": log_prob, "normalized": normalized}
