"""What a run with a reward of latents takes: no decoder, and about half an evaluation for each R[k]."""

import dataclasses

import jax
import pytest

from tpgrpo_jax.config import presets
from tpgrpo_jax.cost import flops
from tpgrpo_jax.forecasting import forecast, lowering, reward_program
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib


@pytest.fixture(scope="module")
def plan():
  config = presets.recipe("sd35m_dina", "latent_increments")
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch=1))
  mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
  return lowering.open_plan(config, mesh)


def test_reward_of_a_noisy_state_costs_half_an_evaluation_of_the_true_model(plan):
  ((options,), unable) = reward_program.on_devices(plan.config)
  assert not unable and "NOT counted" not in forecast._rewards(plan.config)
  with jax.set_mesh(plan.mesh):
    function, args, _ = reward_program.program(plan, options)
    reward = flops.count(function, *args)
    rollout, given, kwargs = lowering.rollout_program(plan)
    work = flops.count(rollout, *given, **kwargs)
    scores = jax.eval_shape(function, *args)
  window, steps = plan.method.window, plan.config.sampler.num_steps
  assert (plan.latents, plan.images, scores.shape) == (window + 1, 0, (1, window + 1))
  assert work.conv == reward.conv == 0
  evaluations = method_lib.evaluations_per_sample(plan.config, plan.method, None, plan.place)
  assert evaluations == 2 * steps  # with guidance
  share = (reward.matmul / (window + 1)) / (work.matmul / evaluations)
  assert 0.45 < share < 0.6, share
