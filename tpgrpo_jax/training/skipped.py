"""Evaluations that a rollout's program holds and does not do: idle slots, and steps that are shared."""

import collections
from collections.abc import Sequence
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.cost import flops
from tpgrpo_jax.training import method as method_lib

_MOST_EPOCHS = 200  # whose draws stand for all of a run, spread over it


def evaluations(config: config_lib.Config, method: method_lib.Method) -> float:
  """Of a sample, in the mean over a run's epochs; what its own draws of windows and steps leave out.

  Args:
    config: of the run.
    method: of the run.
  """
  train = config.train
  chunks = train.prompts_per_epoch * train.group_size // train.microbatch
  drawn = chunks if config.sampler.window_draw == "microbatch" else 1
  epochs = np.linspace(0, train.epochs - 1, min(train.epochs, _MOST_EPOCHS)).round().astype(int)
  draws = itertools.product(epochs.tolist(), range(drawn))
  places = collections.Counter(tuple(method_lib.draw_place(config, *draw)) for draw in draws)

  def left_out(place):
    plan = method_lib.build_plan(config, method, np.asarray(place))
    done = method_lib.evaluations_per_sample(config, method, plan, np.asarray(place))
    return method_lib.most_evaluations(config, method, plan) - done

  return sum(times * left_out(place) for place, times in places.items()) / places.total()


def flops_of_one(
  config: config_lib.Config,
  method: method_lib.Method,
  params: Any,
  condition: Any,
  latents: Sequence[int],
) -> float:
  """Operations of one of the evaluations that `method.evaluations_per_sample` counts.

  Args:
    config: of the run.
    method: of the run.
    params: as of Model.params; shapes are enough.
    condition: of a microbatch; likewise.
    latents: shape of a microbatch of states, [S, h, w, c].
  """
  x, sigma = (jax.ShapeDtypeStruct(tuple(shape), jnp.float32) for shape in (latents, latents[:1]))
  counted = flops.count(method.velocity_fn, params, x, sigma, condition).total
  return counted / latents[0] / (2 if method_lib.is_guided(config) else 1)
