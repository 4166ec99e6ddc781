"""The objective of a run, bound: the loss of one (microbatch, step) pair, and what it reports.

A pair loss is (params, reference, old, pair, condition) -> (loss [S, M], metrics). `pair` is a dict of one
step's arrays: see `batches.Batch`. Its loss still waits for the samples' weights and for the sum.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import registry, types
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.models import in_turn
from tpgrpo_jax.objective import forward_process, ratio, surrogate
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

PairLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Objective(NamedTuple):
  """One row of OBJECTIVES.

  Attributes:
    make_loss: (config, method) -> PairLoss.
    has_ratio: whether it compares with old log-probs, which may be the update's own (`make_rescored_loss`).
    keeps_old: whether the state holds an old policy.
    samples_with_old: whether that one samples.
  """

  make_loss: Callable[[config_lib.Config, method_lib.Method], PairLoss]
  has_ratio: bool
  keeps_old: bool
  samples_with_old: bool


def reads_old_velocity(config: config_lib.Config) -> bool:
  """Whether the update needs the velocities of the rollout."""
  region = _trust_region(config)
  return config.loss.ratio not in _STORED or region.needs_divergence


def _trust_region(config):
  region = registry.lookup(
    surrogate.TRUST_REGIONS, config.loss.trust_region, field="loss.trust_region"
  )
  if not isinstance(region, surrogate.TrustRegion):
    region = surrogate.TrustRegion(region, needs_divergence=True)  # the user's own function
  _check_trust_region(config, region)
  return region


_STATES, _MEMBERS = 3, 2  # of the shapes that a user's own function is tried with


def _shaped(*shape) -> Any:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _check_trust_region(config, region):
  """Raises ValueError unless a trust region, perhaps a user's own, returns what it should."""
  pairs, field = _shaped(_STATES, _MEMBERS), f"loss.trust_region={config.loss.trust_region!r}"
  rule = (
    f"{field}: must be (log_ratio, advantage, divergence, *, limit) and return surrogate.Terms(loss float32, "
    f"active bool) of the shape {list(pairs.shape)} for log-ratios and advantages {list(pairs.shape)}"
  )
  if not callable(region.function):
    raise ValueError(f"{rule}, and is {region.function!r}. See docs/bring_your_own.md.")
  function = functools.partial(region.function, limit=config.loss.clip_range)
  found = method_lib.shapes_of(function, pairs, pairs, _shaped(_STATES, 1), rule=rule)
  form = lambda leaf: (getattr(leaf, "shape", None), getattr(leaf, "dtype", None))
  wanted = [[(pairs.shape, jnp.float32), (shape, bool)] for shape in (pairs.shape, ())]
  if not isinstance(found, surrogate.Terms) or [*map(form, found)] not in wanted:
    raise ValueError(f"{rule}, returns {found}. See docs/bring_your_own.md.")


def _ratio(config):
  """The ratio of the Gaussians, perhaps a user's own.

  Raises:
    ValueError: it does not return a log-ratio for each sample.
  """
  compare = registry.lookup(ratio.RATIOS, config.loss.ratio, field="loss.ratio")
  latents = _shaped(_STATES, 4, 4, 2)
  rule = (
    f"loss.ratio={config.loss.ratio!r}: must be (x_next, gaussian, old_gaussian) and return log-ratios "
    f"float32 [{_STATES}] for latents {list(latents.shape)}"
  )
  if not callable(compare):
    raise ValueError(f"{rule}, and is {compare!r}. See docs/bring_your_own.md.")
  gaussian = types.Gaussian(latents, _shaped())
  found = method_lib.shapes_of(compare, latents, gaussian, gaussian, rule=rule)
  if getattr(found, "shape", None) != (_STATES,) or found.dtype != jnp.float32:
    raise ValueError(f"{rule}, returns {found}. See docs/bring_your_own.md.")
  return compare


def check_own(config: config_lib.Config) -> None:
  """Tries ratio and trust region on shapes, before anything is opened.

  Raises:
    ValueError: one of them, perhaps a user's own, does not return what it should.
  """
  if config.loss.objective == "policy":
    _trust_region(config)
    if config.loss.ratio not in _STORED:
      _ratio(config)


class Scorer(NamedTuple):
  """How a pair is scored under some weights, and how two scores of it compare.

  Attributes:
    score: (pair, velocity) -> dict of what the comparison reads of these weights.
    compare: (pair, score, score of the old weights) -> log-ratio [S, M], exactly 0 where they are equal.
  """

  score: Callable[..., dict[str, jax.Array]]
  compare: Callable[..., jax.Array]


def _of_log_probs(method: method_lib.Method, config: config_lib.Config) -> Scorer:
  """Log-ratios of log-probs."""
  del config

  def score(pair, velocity):
    at = (pair["x"], pair["x_next"], velocity, pair["sigma"], pair["sigma_next"])
    score = in_turn.alone(functools.partial(sampler.score, method.step_fn, method.log_prob_fn))
    return {"log_prob": score(*at)}

  return Scorer(score, lambda pair, new, old: ratio.log_prob(new["log_prob"], old["log_prob"]))


_STORED = {"log_prob": _of_log_probs}


def _of_means(method: method_lib.Method, config: config_lib.Config) -> Scorer:
  """Log-ratios of the Gaussians that two velocities give."""
  compare = _ratio(config)

  def compared(x, x_next, velocity, old_velocity, sigma, sigma_next):
    gaussians = [method.step_fn(x, v, sigma, sigma_next) for v in (velocity, old_velocity)]
    return sampler.each_member(compare)(x_next, *jax.lax.optimization_barrier(gaussians))

  def log_ratio(pair, new, old):
    at = (pair["x"], pair["x_next"], new["velocity"], old["velocity"])
    return sampler.isolated(compared)(*at, pair["sigma"], pair["sigma_next"])

  return Scorer(lambda pair, velocity: {"velocity": velocity}, log_ratio)


def _kl(method: method_lib.Method, pair: dict[str, jax.Array], velocity, other) -> jax.Array:
  """[S] between the steps of two velocities at the pair's states."""
  gaussian = lambda v: method.step_fn(pair["x"], v, pair["sigma"], pair["sigma_next"])
  return surrogate.gaussian_kl(gaussian(velocity), gaussian(other))


def make_scorer(config: config_lib.Config, method: method_lib.Method) -> Scorer:
  """The scorer of the config's ratio; where the trust region reads velocities, the score holds them too."""
  scorer = _STORED.get(config.loss.ratio, _of_means)(method, config)
  if not reads_old_velocity(config):
    return scorer
  return scorer._replace(score=lambda pair, v: scorer.score(pair, v) | {"velocity": v})


def make_policy_loss(config: config_lib.Config, method: method_lib.Method) -> PairLoss:
  """The surrogate of the ratios and the KL to the reference; the rollout's scores are the old ones."""
  loss_fn = _policy_loss(config, method)

  def pair_loss(params, reference, old, pair, condition):
    del old
    return loss_fn(params, reference, pair, condition, lambda new: pair)[:2]

  return pair_loss


def make_rescored_loss(config: config_lib.Config, method: method_lib.Method):
  """`make_policy_loss` on the update's own scores.

  Returns (params, reference, pair, condition, scores_only) -> (loss, metrics, score). Where the scalar
  scores_only is set, the reference is not evaluated, and neither loss nor KL means anything.

  Where pair["is_first"] is set, the weights are still those of the rollout, so each score is its own old
  one, and log-ratios are 0 whatever the compiler does. Else the pair's old scores are compared with.
  """
  loss_fn = _policy_loss(config, method)

  def rescored_loss(params, reference, pair, condition, scores_only):
    find_old = functools.partial(old_score, pair)
    return loss_fn(params, reference, pair, condition, find_old, scores_only)

  return rescored_loss


def old_score(pair: dict[str, jax.Array], new: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What an update with scores of its own compares `new` with: see `make_rescored_loss`."""
  own = jax.lax.stop_gradient(new)
  return {name: jnp.where(pair["is_first"], own[name], pair[name]) for name in new}


def _policy_loss(config, method):
  """(params, reference, pair, condition, new score -> old, scores_only) -> (loss, metrics, new score)."""
  asked, region = config.loss, _trust_region(config)
  scorer = make_scorer(config, method)

  def pair_loss(params, reference, pair, condition, find_old, scores_only=None):
    x, advantage = pair["x"], pair["advantage"]
    level = jnp.full(x.shape[:1], pair["sigma"])
    velocity = method.velocity_fn(params, x, level, condition)
    new = scorer.score(pair, velocity)
    old = find_old(new)
    own = scorer.compare(pair, new, old)
    log_ratio = own
    if asked.chunks:  # the value is the chunk's mean, the gradient is the step's own
      log_ratio = pair["chunk_log_ratio"] + (own - jax.lax.stop_gradient(own))
    divergence = jnp.zeros(())
    if region.needs_divergence:
      divergence = jax.lax.stop_gradient(_kl(method, pair, velocity, old["velocity"]))[:, None]
    terms = region.function(log_ratio, advantage, divergence, limit=asked.clip_range)
    sign = surrogate.signed_weight(advantage, asked.negative_weight)
    loss = pair["step_weight"] * sign * terms.loss
    kl = jnp.zeros_like(loss)
    if asked.kl_coef:
      evaluate = lambda: method.reference_velocity_fn(reference, x, level, condition)
      skip = lambda: jnp.zeros_like(velocity)
      found = evaluate() if scores_only is None else jax.lax.cond(scores_only, skip, evaluate)
      kl += _kl(method, pair, velocity, found)[:, None]
    metrics = {
      "kl": kl,
      **_ratio_metrics(jax.lax.stop_gradient(log_ratio), asked.clip_range),
      "clip/inactive": ~jnp.broadcast_to(terms.active, loss.shape),
    }
    return loss + asked.kl_coef * kl, metrics, jax.lax.stop_gradient(new)

  return pair_loss


def _ratio_metrics(log_ratio, clip_range):
  value = jnp.exp(log_ratio)
  return {
    "ratio/mean": value,
    "ratio/min": value,
    "ratio/max": value,
    "ratio/max_abs_log": jnp.abs(log_ratio),
    "clip/above": log_ratio > jnp.log1p(clip_range),
    "clip/below": log_ratio < jnp.log1p(-clip_range),
  }


def _make_forward_loss(
  config: config_lib.Config,
  method: method_lib.Method,
  *,
  loss_fn: Callable[..., jax.Array],
  reads_old: bool,
) -> PairLoss:
  """A loss of finished images, noised afresh, and the penalties that go with it.

  Args:
    config: of the run.
    method: of the run.
    loss_fn: (velocity, old_velocity, x, data, noise, sigma, advantage) -> [S].
    reads_old: whether the loss, or the penalty on leaving it, needs the old policy's velocity.
  """
  asked = config.loss

  def pair_loss(params, reference, old, pair, condition):
    data, sigma = pair["data"], pair["sigma"]
    noise = mesh_lib.normal(pair["key"], data.shape)
    x = forward_process.noised(data, noise, sigma)
    velocity = method.velocity_fn(params, x, sigma, condition)
    old_velocity = velocity
    if reads_old:
      old_params = params | {"trainable": old}
      old_velocity = method.velocity_fn(old_params, x, sigma, condition)
    loss = loss_fn(velocity, old_velocity, x, data, noise, sigma, pair["advantage"][:, 0])
    moved = forward_process.velocity_penalty(velocity, old_velocity)
    kl = jnp.zeros_like(loss)
    if asked.kl_coef:
      reference_velocity = method.reference_velocity_fn(reference, x, sigma, condition)
      kl = forward_process.velocity_penalty(velocity, reference_velocity)
    total = loss + asked.kl_coef * kl + asked.old_coef * moved
    column = lambda values: values[:, None]
    return column(total), {"kl": column(kl), "old/distance": column(moved)}

  return pair_loss


def make_nft_loss(config: config_lib.Config, method: method_lib.Method) -> PairLoss:
  """DiffusionNFT (arXiv 2509.16117)."""
  limit = config.advantage.clip

  def loss_fn(velocity, old_velocity, x, data, noise, sigma, advantage):
    del noise
    return forward_process.nft(
      velocity,
      old_velocity,
      x,
      data,
      sigma,
      advantage,
      beta=config.loss.beta,
      advantage_limit=limit,
    )

  return _make_forward_loss(config, method, loss_fn=loss_fn, reads_old=True)


def make_awm_loss(config: config_lib.Config, method: method_lib.Method) -> PairLoss:
  """AWM (arXiv 2509.25050)."""
  limit = config.advantage.clip

  def loss_fn(velocity, old_velocity, x, data, noise, sigma, advantage):
    del old_velocity, x
    return forward_process.awm(velocity, data, noise, sigma, advantage, advantage_limit=limit)

  reads_old = bool(config.loss.old_coef)
  return _make_forward_loss(config, method, loss_fn=loss_fn, reads_old=reads_old)


OBJECTIVES = {
  "policy": Objective(make_policy_loss, has_ratio=True, keeps_old=False, samples_with_old=False),
  "nft": Objective(make_nft_loss, has_ratio=False, keeps_old=True, samples_with_old=True),
  "awm": Objective(make_awm_loss, has_ratio=False, keeps_old=True, samples_with_old=False),
}
