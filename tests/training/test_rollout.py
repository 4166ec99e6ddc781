"""An epoch's samples: whose noise, whose image, whose reward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, types
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.models import tiny
from tpgrpo_jax.training import batches, build, pipeline, rollout
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

PROMPTS = [types.Prompt(word, {"n": i}) for i, word in enumerate(("A", "B", "C")) for _ in range(4)]


def encode(prompts):
  """A prompt is the number of its letter."""
  codes = np.asarray([[ord(p) - ord("A")] for p in prompts], np.float32)
  return types.Condition(text=codes[..., None], pooled=codes)


def velocity(params, x, sigma, condition):
  level = sigma.reshape(-1, 1, 1, 1)
  prompt = condition.pooled.repeat(len(x) // len(condition.pooled), axis=0)
  return params["scale"] * jnp.tanh(x) + level * prompt[:, :, None, None]


def decode(latents):
  return jnp.repeat(jax.nn.sigmoid(latents), 3, axis=-1)


PARAMS = {"scale": jnp.float32(0.5), "decoder": {}}
MODEL = build.Model(
  config=tiny.TEXT.config,  # for the size of its patches alone
  velocity_fn=velocity,
  base_velocity_fn=velocity,
  frozen={},
  trainable={},
  pipeline=pipeline.Pipeline((2, 3, 1), encode, lambda decoder, x: decode(x), {}),
)


def make_config(method="increments", **fields):
  sampler_fields = {"num_steps": 5, "window": (1, 4)} | fields.pop("sampler", {})
  return config_lib.Config(
    sampler=config_lib.Sampler(**sampler_fields),
    credit=config_lib.Credit(method),
    completion=fields.pop("completion", config_lib.Completion()),
    train=config_lib.Train(
      **{"prompts_per_epoch": 3, "group_size": 4, "microbatch": 4, "updates_per_epoch": 1} | fields
    ),
  )


def brightness(images, texts, metadata, *, rows):
  assert rows.all()
  images = np.asarray(images)
  scores = images.mean(axis=(1, 2, 3)).astype(np.float32)
  numbers = np.asarray([m["n"] for m in metadata], np.float32)
  return lambda: (scores, {"brightness": scores, "number": numbers}, {})


def run_epoch(
  config, mesh, *, epoch=0, reward_fn=brightness, on_chunk=lambda done, failure: None, order=None
):
  """(Rollout, images of every microbatch) of one epoch on the fake model."""
  method = method_lib.build_method(config, MODEL, shards=mesh_lib.batch_shards(mesh))
  place = method_lib.draw_place(config, epoch, 0).astype(np.int32)
  plan = method_lib.build_plan(config, method, place)
  images = []

  def sample(chunk, group, condition):
    key = rollout.epoch_key(config.seed, epoch)
    trajectory, pictures = rollout_fn(PARAMS, key, chunk, group, condition, place, plan)
    images.append(np.asarray(pictures))
    return trajectory, pictures

  with jax.set_mesh(mesh):
    rollout_fn = rollout.make_rollout_fn(config, MODEL, method)
    rolled = rollout.collect(
      config, MODEL, method, mesh, sample, reward_fn, PROMPTS, order, on_chunk
    )
  return rolled, np.concatenate(images).swapaxes(0, 1)


def joined(rolled, name):
  """One field of the transitions of all microbatches, [W, B, ...]."""
  return np.concatenate([getattr(t, name) for t in rolled.transitions], axis=1)


@pytest.fixture(scope="module")
def epoch(single_mesh):
  return run_epoch(make_config(), single_mesh)


def test_rewards_belong_to_the_states_and_samples_of_their_images(epoch):
  rolled, images = epoch
  assert images.shape == (4, 12, 2, 3, 3)
  np.testing.assert_allclose(rolled.completion_reward[0], images.mean(axis=(2, 3, 4)), rtol=1e-6)


def test_each_reward_is_kept_on_its_own_with_the_metadata_of_its_prompt(epoch):
  rolled, _ = epoch
  np.testing.assert_array_equal(
    rolled.rewards["number"][0], np.tile(np.repeat([0, 1, 2], 4), (4, 1))
  )


def test_last_images_are_the_trajectories_own(epoch):
  rolled, images = epoch
  final = np.concatenate([t.final for t in rolled.transitions])
  np.testing.assert_array_equal(images[-1], models.images_uint8(decode(final)))
  np.testing.assert_array_equal(rolled.images, images[-1])


def test_first_images_are_the_ode_images_of_the_windows_first_states(single_mesh):
  config = make_config(sampler={"window": (0, 3)})
  rolled, images = run_epoch(config, single_mesh)
  method = method_lib.build_method(config, MODEL)
  condition = encode([p.text for p in PROMPTS])
  latents = sampler.sample_ode(
    velocity, PARAMS, jnp.asarray(joined(rolled, "x")[0]), condition, sigmas=method.sigmas
  )
  difference = images[0].astype(int) - np.asarray(models.images_uint8(decode(latents)), int)
  assert np.abs(difference).max() <= 1  # float32 in another order, on the edge of two levels


def test_prompts_are_those_of_the_samples(epoch):
  conditions = np.concatenate([c.pooled for c in epoch[0].conditions])
  np.testing.assert_array_equal(
    conditions[:, 0], [0, 1, 2]
  )  # one row serves the four samples of each


def test_method_without_completions_scores_the_finished_images_alone(single_mesh):
  calls = []

  def reward_fn(images, texts, metadata, *, rows):
    calls.append(len(images))
    return brightness(images, texts, metadata, rows=rows)

  rolled, images = run_epoch(make_config("flow_grpo"), single_mesh, reward_fn=reward_fn)
  assert calls == [4, 4, 4]
  assert images.shape[0] == 1
  assert np.isnan(rolled.completion_reward[:, :-1]).all()
  assert np.isfinite(rolled.completion_reward[:, -1]).all()


def test_samples_start_from_their_own_noise_whatever_the_microbatch(single_mesh):
  window = {"window": (0, 2)}
  small = run_epoch(make_config("flow_grpo", sampler=window), single_mesh)[0]
  large = run_epoch(make_config("flow_grpo", sampler=window, microbatch=12), single_mesh)[0]
  noise = joined(small, "x")[0]
  np.testing.assert_array_equal(noise, joined(large, "x")[0])
  assert len(np.unique(noise.reshape(12, -1), axis=0)) == 12


def test_same_latent_gives_one_noise_to_a_prompt(single_mesh):
  config = make_config("flow_grpo", sampler={"window": (0, 2), "same_latent": True})
  rolled, _ = run_epoch(config, single_mesh)
  x, x_next = joined(rolled, "x")[0], joined(rolled, "x_next")[0]
  assert len(np.unique(x.reshape(12, -1), axis=0)) == 3
  assert len(np.unique(x_next.reshape(12, -1), axis=0)) == 12  # the draws are each sample's own


def test_epoch_is_a_function_of_seed_and_number(single_mesh):
  config = make_config("flow_grpo")
  first, again = (run_epoch(config, single_mesh)[0] for _ in range(2))
  np.testing.assert_array_equal(joined(first, "x_next"), joined(again, "x_next"))
  for other in (
    run_epoch(config, single_mesh, epoch=1)[0],
    run_epoch(dataclasses.replace(config, seed=1), single_mesh)[0],
  ):
    assert (joined(other, "x_next") != joined(first, "x_next")).all()


def test_progress_counts_every_sample_once(single_mesh):
  done = []
  run_epoch(
    make_config("flow_grpo"), single_mesh, on_chunk=lambda count, failure: done.append(count)
  )
  assert done == [4, 4, 4, 0]  # and once when all is scored


def test_failing_reward_stops_the_epoch(single_mesh):
  def reward_fn(images, texts, metadata, *, rows):
    raise ConnectionError("gone")

  with pytest.raises(ConnectionError):
    run_epoch(make_config("flow_grpo"), single_mesh, reward_fn=reward_fn)


def test_batch_is_divided_over_the_mesh():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  rolled, _ = run_epoch(make_config(), mesh)
  x = rolled.transitions[0].x
  assert x.sharding.shard_shape(x.shape)[1] == 1


# dance has noise in its last step: what leaves the anchor there is the finished image.
LAST_STEP = {
  "rollout": "branch", "branches": 2, "window": (4, 5), "dynamics": "dance", "noise_level": 0.3
}  # fmt: skip


def branch_config(**sampler):
  return make_config("branch", sampler=LAST_STEP | sampler, completion=config_lib.Completion())


def brightness_of(latents):
  return np.asarray(models.images_uint8(decode(jnp.asarray(latents)))).mean(axis=(1, 2, 3))


def shuffled(config):
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, shuffle=True))
  order = epoch_lib._sample_order(config, 0)
  assert (order != np.arange(len(order))).any() and sorted(order) == [*range(len(order))]
  return config, order


@pytest.mark.parametrize("shuffle", [False, True])
def test_members_rewards_are_those_of_their_own_images(single_mesh, shuffle):
  config = branch_config()
  config, order = shuffled(config) if shuffle else (config, np.arange(12))
  rolled, _ = run_epoch(config, single_mesh, order=order)
  members = joined(rolled, "x_next")[0].reshape(12, 2, 3, 1)
  anchors = np.repeat(np.concatenate([t.final for t in rolled.transitions]), 2, axis=0)
  found = rolled.completion_reward[0][:, order]
  np.testing.assert_allclose(found[1], brightness_of(members), rtol=1e-6)
  np.testing.assert_allclose(found[0], brightness_of(anchors), rtol=1e-6)


def test_advantages_of_a_shuffled_epoch_go_with_their_samples(single_mesh):
  """The same pairs of advantage and transition, for noise that is each sample's own."""
  plain = make_config("flow_grpo", sampler={"rollout": "ode"})
  pairs = []
  for config, order in ((plain, np.arange(12)), shuffled(plain)):
    rolled, _ = run_epoch(config, single_mesh, order=order)
    config = dataclasses.replace(config, loss=config_lib.Loss("nft", clip_range=0.0))
    advantage = np.tile(rolled.completion_reward[0, -1], (3, 1))
    (batch,) = batches.split_updates(config, rolled, advantage, np.ones(12), 0)
    finals = np.concatenate([t.final for t in batch.transitions])
    np.testing.assert_allclose(
      np.concatenate(batch.advantage, 1)[0], brightness_of(finals), rtol=1e-6
    )
    pairs.append(
      {(float(a), f.tobytes()) for a, f in zip(np.concatenate(batch.advantage, 1)[0], finals)}
    )
  assert pairs[0] == pairs[1] and len(pairs[0]) == 12


def test_shuffled_members_of_an_anchor_stay_together(single_mesh):
  _, order = shuffled(branch_config())
  np.testing.assert_array_equal(order[1::2], order[::2] + 1)


@pytest.mark.parametrize("strides", [(1,), (1, 2)])
def test_rewards_of_branches_belong_to_strides_steps_and_members(single_mesh, strides):
  config = branch_config(window=(0, 3), branches=4)
  config = dataclasses.replace(config, completion=config_lib.Completion(strides=strides))
  rolled, images = run_epoch(config, single_mesh)  # images [segments M + 1, S, ...]
  bright = images.mean(axis=(2, 3, 4))
  members = bright[:-1].reshape(len(strides), 3, 4, 3).swapaxes(2, 3).reshape(len(strides), 3, 12)
  np.testing.assert_allclose(rolled.completion_reward[:, 1:], members, rtol=1e-6)
  own = np.broadcast_to(np.repeat(bright[-1], 4), (len(strides), 12))
  np.testing.assert_allclose(rolled.completion_reward[:, 0], own, rtol=1e-6)


def test_kept_images_are_the_first_samples_own_whatever_the_order(single_mesh):
  config, order = shuffled(branch_config())
  rolled, _ = run_epoch(config, single_mesh, order=order)
  wanted = run_epoch(branch_config(), single_mesh)[0]
  np.testing.assert_array_equal(rolled.images, wanted.images)


@pytest.mark.parametrize(
  "method, rollout_name", [("flow_grpo", "trajectory"), ("branch", "branch")]
)
def test_rounded_latents_are_kept_in_their_dtype(single_mesh, method, rollout_name):
  sampler = {"latents": "bfloat16", "rollout": rollout_name}
  config = branch_config(**sampler) if method == "branch" else make_config(method, sampler=sampler)
  transitions = run_epoch(config, single_mesh)[0].transitions[0]
  assert {transitions.x.dtype, transitions.x_next.dtype} == {jnp.dtype("bfloat16")}
  assert transitions.velocity is None  # no loss of these reads it
  assert transitions.final.dtype == jnp.dtype("float32")
