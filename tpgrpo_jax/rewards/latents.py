"""Rewards of latents: what they are given in place of pictures, and who is given what."""

from collections.abc import Callable, Mapping
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.rewards import specs
from tpgrpo_jax.runs import processes


class Reads(NamedTuple):
  """What some rewards look at."""

  pictures: bool
  latents: bool


def reads(rewards: Mapping[str, Any], latent: Mapping[str, Any]) -> Reads:
  """What the rewards that `make_weighted_sum` would make look at.

  Args:
    rewards: label -> weight or spec.
    latent: the names of rewards of latents.
  """
  of_latents = [specs.parse(label, spec)[1] in latent for label, spec in rewards.items()]
  return Reads(pictures=not all(of_latents), latents=any(of_latents))


def make_latent_reward(
  score: Callable[..., jax.Array], weights: Any, check_model: Callable[..., None]
) -> types.LatentRewardFn:
  """Makes a latent reward of a pure function of weights, latents, levels and conditions.

  All samples are scored at once, one of their n latents after the other, so that a condition is read
  where it lies, and memory is that of one evaluation. It is compiled once for every shape.

  Args:
    score: (weights, x [S, h, w, c], sigma [S], condition of leading axis S) -> [S]; pure.
    weights: a pytree of arrays.
    check_model: (latent_shape, condition) -> None; raises ValueError for a model whose latents or
      embeddings it does not know.
  """
  mesh = getattr(jax.tree.leaves(weights)[0].sharding, "mesh", None)

  def reward(samples: types.Samples, condition: types.Condition) -> jax.Array:
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      return run_states(score, weights, samples.x, samples.sigma, condition)

  reward.check_model = check_model  # pyright: ignore[reportFunctionMemberAccess]
  return reward


@functools.partial(jax.jit, static_argnames="score")
def run_states(
  score: Callable[..., jax.Array], weights: Any, x: jax.Array, sigma: jax.Array, condition: Any
) -> jax.Array:
  """score(weights, x[:, i], sigma[i], condition) of x [S, n, h, w, c] for each i in turn; [S, n]."""

  def one(pair):
    latents, level = pair
    return score(weights, latents, jnp.full(len(latents), level), condition)

  return jax.lax.map(one, (x.swapaxes(0, 1), sigma)).T


def look(
  functions: Mapping[str, types.LatentRewardFn], samples: types.Samples, condition: Any
) -> dict[str, jax.Array]:
  """label -> scores [S n], a sample's side by side, on every device; dispatched in the labels' order."""
  found = {}
  for label, function in functions.items():
    try:
      found[label] = processes.replicate(function(samples, condition).reshape(-1))
    except Exception as error:
      error.add_note(f"This happened in the reward {label!r}.")
      raise
  return found


def check_model(
  functions: Mapping[str, types.LatentRewardFn],
  latent_shape: tuple[int, int, int],
  condition: types.Condition,
) -> None:
  """Raises ValueError for latents or embeddings of a model that one of the rewards cannot judge.

  Args:
    functions: label -> reward.
    latent_shape: (h, w, c) of the model that is trained.
    condition: of any prompts.
  """
  for label, function in functions.items():
    try:
      function.check_model(latent_shape, condition)  # pyright: ignore[reportFunctionMemberAccess]
    except ValueError as error:
      raise ValueError(f"rewards.{label}: {error}") from error


def check_seen(
  functions: Mapping[str, Mapping[str, Any]], images: Any, looked: Mapping[str, Any]
) -> None:
  """Raises ValueError where a reward was shown nothing that it looks at."""
  blind = functions["latent"].keys() - looked.keys()
  if images is None:
    blind |= functions["host"].keys() | functions["device"].keys()
  if blind:
    label = min(blind)
    sees = "latents, and here are pictures alone" if label in functions["latent"] else "pictures"
    raise ValueError(
      f"rewards.{label}: looks at {sees}. Give it what it looks at, or leave it out here."
    )
