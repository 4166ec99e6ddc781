"""The policy-gradient loss of a (step, sample): trust regions, step weights, chunks, and the KL.

TRUST_REGIONS and STEP_WEIGHTS are the tables by name. All log-ratios are means over latent dims,
which is why limits are as small as 2e-6.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import registry
from tpgrpo_jax.types import Gaussian


class Terms(NamedTuple):
  """The loss of every (step, sample), before any weight.

  Attributes:
    loss: [...], to be minimised.
    active: [...] bool, False where the trust region has taken the term's gradient.
  """

  loss: jax.Array
  active: jax.Array


class TrustRegion(NamedTuple):
  """A surrogate, and whether it reads the divergence of the two policies.

  Attributes:
    function: (log_ratio, advantage, divergence, *, limit) -> Terms.
    needs_divergence: False if None may be passed for it.
  """

  function: Callable[..., Terms]
  needs_divergence: bool


def clip(
  log_ratio: jax.Array, advantage: jax.Array, divergence: jax.Array | None, *, limit: float
) -> Terms:
  """max(-A r, -A clip(r, 1 - c, 1 + c)) of PPO (arXiv 1707.06347), r = exp(log_ratio), c = limit.

  Log-ratios are compared with log1p(+-c), not ratios with 1 +- c: float32 resolves 1e-7 around 1,
  and c may be 2e-6. On the boundary itself the gradient is whole (an autodiff max would halve it).

  Args:
    log_ratio: [...].
    advantage: [...].
    divergence: not read.
    limit: c <= 1.
  """
  del divergence
  low, high = jnp.log1p(-limit), jnp.log1p(limit)
  past = ((advantage > 0) & (log_ratio > high)) | ((advantage < 0) & (log_ratio < low))
  used = jnp.where(past, jnp.where(advantage > 0, high, low), log_ratio)
  return Terms(-advantage * jnp.exp(used), ~past)


def dppo(
  log_ratio: jax.Array, advantage: jax.Array, divergence: jax.Array, *, limit: float
) -> Terms:
  """-A r, dropped where divergence >= limit and (r - 1) A > 0 (Flow-DPPO, Tencent-Hunyuan/UniRL).

  A step that has left the trust region may still come back, but not go further. The sign of r - 1
  is that of the log-ratio.

  Args:
    log_ratio: [...].
    advantage: [...].
    divergence: [...], as `gaussian_kl` of the current and the rollout's step.
    limit: 1e-5 as released.

  Returns:
    Terms; a dropped term has the loss 0.
  """
  further = jnp.sign(log_ratio) * jnp.sign(advantage) > 0
  dropped = (divergence >= limit) & further
  # exp(-inf) = 0 with a gradient of 0, where exp of a large log-ratio would make it NaN.
  return Terms(-advantage * jnp.exp(jnp.where(dropped, -jnp.inf, log_ratio)), ~dropped)


TRUST_REGIONS = {
  "clip": TrustRegion(clip, needs_divergence=False),
  "dppo": TrustRegion(dppo, needs_divergence=True),
}


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


class StepWeight(NamedTuple):
  """A weight of the trained steps.

  Attributes:
    reads: "std", "dt" or "sensitivity": the one array that the function is of.
    function: [W] -> [W].
  """

  reads: str
  function: Callable[[jax.Array], jax.Array]


STEP_WEIGHTS = {
  "none": StepWeight("std", jnp.ones_like),
  "std": StepWeight("std", lambda std: std / jnp.mean(std, axis=-1, keepdims=True)),
  "inverse_dt": StepWeight("dt", lambda dt: 1 / jnp.abs(dt)),
  "inverse_sensitivity": StepWeight("sensitivity", lambda slope: 1 / jnp.abs(slope)),
}


def step_weights(
  kind: str,
  std: jax.Array | np.ndarray,
  *,
  dt: jax.Array | np.ndarray | None = None,
  sensitivity: jax.Array | np.ndarray | None = None,
) -> jax.Array:
  """The factor of each trained step's policy loss.

  none: 1.  std: std / mean_k std (TempFlow-GRPO, arXiv 2508.04324; mean 1 over the trained steps).
  inverse_dt: 1 / |dt| (GRPO-Guard, arXiv 2510.22319).  inverse_sensitivity: 1 / |d mean / d v| (ours;
  dt is only the Euler part of d mean / d v).

  Args:
    kind: a name of STEP_WEIGHTS.
    std: [W] of the trained steps.
    dt: [W] sigma_next - sigma.
    sensitivity: [W] d mean / d velocity.

  Returns:
    [W].

  Raises:
    ValueError: an unknown kind, or one whose dt or sensitivity is missing.
  """
  registry.check(kind, STEP_WEIGHTS, field="loss.step_weight")
  name, function = STEP_WEIGHTS[kind]
  value = {"std": std, "dt": dt, "sensitivity": sensitivity}[name]
  if value is None:
    raise ValueError(f"loss.step_weight={kind!r}: needs {name} [W]. Pass {name}=... with it.")
  return function(jnp.asarray(value))


def signed_weight(advantage: jax.Array, negative_weight: float) -> jax.Array:
  """negative_weight where A < 0, else 1; [...] -> [...].

  1 is none; .5 is Self-OPD's. NTHR (arXiv 2505.18830) inspired it: a negative member's weight was
  (1 - cos(noise, best noise)) / 2, which is .500 +- .002 for independent noise of 65,536 dims.
  """
  return jnp.where(advantage < 0, negative_weight, 1.0)


def chunk_log_ratio(log_ratio: jax.Array, chunks: tuple[int, ...]) -> jax.Array:
  """Every step's log-ratio replaced by the mean of its chunk's (GCPO, arXiv 2510.21583).

  Args:
    log_ratio: [W, ...].
    chunks: lengths of consecutive runs of steps; their sum is W.

  Returns:
    [W, ...], constant within a chunk.

  Raises:
    ValueError: a length below 1, or lengths that do not sum to W.
  """
  _check_chunks(chunks)
  if sum(chunks) != log_ratio.shape[0]:
    raise ValueError(
      f"chunks={chunks}: the lengths sum to {sum(chunks)} and must sum to the number of trained "
      f"steps, {log_ratio.shape[0]}. Change the lengths or the window."
    )
  runs = jnp.split(log_ratio, np.cumsum(chunks)[:-1])
  means = [jnp.broadcast_to(jnp.mean(run, axis=0, keepdims=True), run.shape) for run in runs]
  return jnp.concatenate(means)


def chunk_weights(chunks: tuple[int, ...]) -> np.ndarray:
  """W / (number of chunks x length) of each step: a mean over steps then counts all chunks alike.

  Args:
    chunks: lengths of consecutive runs of steps.

  Returns:
    [W] float64, of mean 1.

  Raises:
    ValueError: a length below 1.
  """
  _check_chunks(chunks)
  return np.repeat(sum(chunks) / (len(chunks) * np.array(chunks)), chunks)


def _check_chunks(chunks):
  if not chunks or min(chunks) < 1:
    raise ValueError(f"chunks={chunks}: lengths must be >= 1. Give one length for each chunk.")
