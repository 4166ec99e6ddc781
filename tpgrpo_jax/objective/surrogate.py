"""The clipped policy-gradient loss and the KL term, per (step, sample)."""

import jax
import jax.numpy as jnp

from tpgrpo_jax.types import Gaussian


def clipped_surrogate(
  log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array, *, clip_range: float
) -> jax.Array:
  """max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), ratio = exp(log_prob - old_log_prob).

  PPO's objective (arXiv 1707.06347) with log-probs that are means over latent dims (Flow-GRPO,
  arXiv 2505.05470), which is why clip ranges are as small as 1e-4.

  Args:
    log_prob: [B] under the current weights.
    old_log_prob: [B] at the rollout.
    advantage: [B].
    clip_range: c.

  Returns:
    [B], to be minimised.
  """
  ratio = jnp.exp(log_prob - old_log_prob)
  clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
  return jnp.maximum(-advantage * ratio, -advantage * clipped)


def gaussian_kl(gaussian: Gaussian, reference: Gaussian) -> jax.Array:
  """KL of two steps that share their std: MEAN over latent dims of (mean - mean_ref)^2 / (2 std^2).

  The full std is used for every kind of step. (Flow-GRPO's released code divides the SDE's by
  g^2 = std^2 / -dt instead, so its kl_coef of b is b (-dt) here.)

  Args:
    gaussian: of the current weights, mean [B, ...].
    reference: of the reference weights, at the same x.

  Returns:
    [B].
  """
  z = (gaussian.mean - reference.mean) / gaussian.std
  return 0.5 * jnp.mean(jnp.square(z), axis=tuple(range(1, z.ndim)))
