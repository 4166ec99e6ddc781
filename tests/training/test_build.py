"""What a config binds: which weights train in which dtype, which completions, at what price."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import types
from tpgrpo_jax.config import names
from tpgrpo_jax.data import shapes
from tpgrpo_jax.models import hf, tiny
from tpgrpo_jax.training import build, rollout, skipped
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

LORA = config_lib.Lora(rank=2, alpha=4.0, targets=("attn.to_q", "attn.to_out.0"))


def dtypes(tree):
  return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


@pytest.fixture(scope="module")
def full(config_in, single_mesh):
  return build.build_model(config_in("unused"), single_mesh, ())


@pytest.fixture(scope="module")
def adapted(config_in, single_mesh):
  return build.build_model(config_in("unused", {"lora": LORA}), single_mesh, ())


def run(velocity_fn, trainable, frozen, model):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *model.pipeline.latent_shape)).astype(np.float32)
  condition = jax.tree.map(jnp.asarray, model.pipeline.encode(["CAT", "DOG"]))
  params = {"frozen": frozen, "trainable": trainable}
  return jax.jit(velocity_fn)(params, jnp.asarray(x), jnp.asarray([0.9, 0.4]), condition)


def test_without_adapters_every_weight_trains_and_no_buffer(full):
  assert set(hf.flatten(full.frozen)) == {"pos_embed.pos_embed"}
  assert "pos_embed.pos_embed" not in hf.flatten(full.trainable)


def test_with_adapters_nothing_else_trains(adapted):
  names = set(hf.flatten(adapted.trainable))
  attn = "blocks_0.attn"
  assert names == {f"{attn}.{n}.lora_{ab}" for n in ("to_q", "to_out") for ab in "ab"}


def test_fresh_adapters_give_the_base_velocity(adapted, full):
  found = run(adapted.velocity_fn, adapted.trainable, adapted.frozen, adapted)
  np.testing.assert_array_equal(found, run(adapted.base_velocity_fn, {}, adapted.frozen, adapted))
  np.testing.assert_array_equal(found, run(full.velocity_fn, full.trainable, full.frozen, full))


def test_trainable_weights_are_float32_and_frozen_ones_of_the_compute_dtype(config_in, single_mesh):
  bfloat16 = {"model.dtype": "bfloat16"}
  model = build.build_model(config_in("unused", bfloat16 | {"lora": LORA}), single_mesh)
  assert dtypes(model.trainable) == {"float32"}
  assert dtypes(model.frozen) == {"bfloat16"}


def test_full_fine_tuning_in_bfloat16_keeps_float32_weights(config_in, single_mesh):
  model = build.build_model(config_in("unused", {"model.dtype": "bfloat16"}), single_mesh)
  assert dtypes(model.trainable) == {"float32"}


def test_adapters_depend_on_the_seed_alone(config_in, single_mesh, adapted):
  make = lambda seed: (
    build.build_model(config_in("unused", {"lora": LORA, "seed": seed}), single_mesh).trainable
  )
  again, other = make(0), make(1)
  jax.tree.map(np.testing.assert_array_equal, again, adapted.trainable)
  assert not np.array_equal(
    hf.flatten(other)["blocks_0.attn.to_q.lora_a"], hf.flatten(again)["blocks_0.attn.to_q.lora_a"]
  )


@pytest.mark.parametrize(
  "fields, parts",
  [
    ({"model.path": "/no/such/folder"}, ("model.path='/no/such/folder'", "no config.json in it")),
    ({"lora.rank": 2, "lora.targets": ("attn.to_x",)}, ("lora.targets: attn.to_x", "such as")),
    ({"model.variant": "tinny"}, ("model.variant='tinny'", "Did you mean 'tiny'?")),
    (
      {"model.path": str(tiny.SHAPES.folder)},
      ("latents of 3 channels", "'tiny' paints gray pixels", "Use model.variant='tiny_shapes'."),
    ),
    (
      {"model.variant": "tiny_shapes", "model.path": str(tiny.TEXT.folder)},
      ("latents of 1 channels", "'tiny_shapes' paints coloured", "Use model.variant='tiny'."),
    ),
    (
      {"model.variant": "tiny_shapes", "model.path": "", "sampler.height": 48},
      ("sampler.height=48", "paints 32 x 32 pixels. Leave both 0."),
    ),
  ],
)
def test_model_that_cannot_be_built_is_refused(config_in, single_mesh, fields, parts):
  with pytest.raises(ValueError) as caught:
    build.build_model(config_in("unused", fields), single_mesh, ())
  for part in parts:
    assert part in str(caught.value)


def test_the_model_for_shapes_that_ships_opens_and_reads_its_prompts(config_in, single_mesh):
  prompts = [row["prompt"] for split in shapes.SPLITS for row in shapes.task_prompts(split, 1200)]
  fields = {"model.variant": "tiny_shapes", "model.path": ""}
  model = build.build_model(config_in("unused", fields), single_mesh, prompts)
  assert model.config == tiny.SHAPES.config and model.pipeline.latent_shape == (32, 32, 3)
  with pytest.raises(ValueError, match="at most 8 words of 10 bytes"):
    build.build_model(config_in("unused", fields), single_mesh, ["a parallelogram"])


def method_of(config, model):
  return method_lib.build_method(config, model)


def test_no_guidance_takes_the_velocity_function_itself(config_in, full):
  config = config_in("unused")
  assert method_of(config, full).velocity_fn is full.velocity_fn
  condition = method_lib.build_condition(config, full, ["CAT"])
  assert isinstance(condition, types.Condition)


def test_guidance_moves_away_from_the_empty_prompt(config_in, full):
  config = config_in("unused", {"sampler.guidance_scale": 3.0})
  condition = method_lib.build_condition(config, full, ["CAT", "DOG"])
  empty = full.pipeline.encode([""])
  assert isinstance(condition, types.GuidedCondition)
  np.testing.assert_array_equal(condition.negative.text, empty.text)
  assert method_of(config, full).velocity_fn is not full.velocity_fn


PAPER = {
  "sampler": config_lib.Sampler(num_steps=10, window=(0, 9)),
}
BRANCH = config_lib.Sampler(rollout="branch", branches=4, num_steps=10, window=(0, 9))


@pytest.mark.parametrize(
  "fields, count",
  [
    ({}, 55),
    ({"credit.method": "flow_grpo"}, 10),
    ({"completion.steps": 1}, 10),
    ({"completion.steps": 2}, 19),
    ({"sampler.guidance_scale": 4.5}, 110),
    ({"sampler.window": (5, 9)}, 10 + 4 * 3),  # 4 | 3 + 1 | 2 and two idle slots
    ({"completion.lanes_per_chunk": 2}, 10 + 9 * 6),  # five lanes, and an idle one
    ({"completion.lanes_per_chunk": 4}, 10 + 9 * 6),  # 3 + 3 and not 4 + 4
    # 25 steps, of which the window's first is the 21st: four lanes of 4, and not of 24.
    (
      {"sampler": config_lib.Sampler(num_steps=25, window=(20, 24), window_range=(0, 25))},
      25 + 4 * 4,
    ),
    # The steps 0, 1, 2 at the beginning fit three lanes of nine, as those of every other place do.
    ({"sampler.window": (0, 3), "sampler.window_range": (0, 9)}, 10 + 9 * 3),
    ({"sampler": BRANCH, "credit.method": "branch"}, 45 + 10 / 4),
    ({"sampler": BRANCH, "credit.method": "branch", "completion.steps": 1}, 9 + 10 / 4),
  ],
)
def test_evaluations_per_sample_are_those_of_the_methods_price_list(config_in, full, fields, count):
  config = config_in("unused", PAPER | fields)
  method = method_of(config, full)
  place = np.arange(*config.sampler.window)
  plan = method_lib.build_plan(config, method, place)
  assert method_lib.evaluations_per_sample(config, method, plan, place) == count


@pytest.mark.parametrize("every", [25, 100, 300])
def test_slots_that_a_moving_window_leaves_idle_are_those_of_the_whole_run(config_in, full, every):
  sampler = config_lib.Sampler(num_steps=10, window=(0, 2), window_every=every)
  config = config_in("unused", {"sampler": sampler, "train.epochs": 1000})
  method = method_of(config, full)

  def left_out(epoch):
    place = method_lib.draw_place(config, epoch, 0)
    plan = method_lib.build_plan(config, method, place)
    most = method_lib.most_evaluations(config, method, plan)
    return most - method_lib.evaluations_per_sample(config, method, plan, place)

  exact = np.mean([left_out(epoch) for epoch in range(1000)])
  assert skipped.evaluations(config, method) == pytest.approx(exact, rel=0.02) and exact > 1


def counted_evaluations(config, model):
  """Evaluations of the model in a rollout's program, a sample: (those that run, what is said)."""
  rows = []

  def counting(params, x, sigma, condition):
    jax.debug.callback(lambda: rows.append(len(x)))
    return x * sigma.reshape(-1, 1, 1, 1)

  model = dataclasses.replace(model, velocity_fn=counting)
  method = method_of(config, model)
  place = method_lib.draw_place(config, 0, 0).astype(np.int32)
  plan = method_lib.build_plan(config, method, place)
  batch, members = config.train.microbatch, method.members
  group = jnp.zeros((batch // members, 2), jnp.int32)
  condition = method_lib.build_condition(config, model, ["CAT"] * len(group))
  mesh = jax.make_mesh((1, 1, 1), mesh_lib.AXES, devices=jax.devices()[:1],
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)  # fmt: skip
  with jax.set_mesh(mesh):
    sample = rollout.make_rollout_fn(config, model, method)
    params = model.params(model.trainable)
    jax.block_until_ready(sample(params, jax.random.key(0), 0, group, condition, place, plan))
  jax.effects_barrier()
  return sum(rows) / batch, method_lib.evaluations_per_sample(config, method, plan, place)


@pytest.mark.parametrize("most", [0, 2])
def test_a_drawn_window_evaluates_the_steps_that_it_needs(config_in, full, most):
  drawn = config_lib.Sampler(num_steps=9, window=(0, 2), window_range=(0, 8))
  fields = {"sampler": drawn, "completion.lanes_per_chunk": most, "train.microbatch": 2}
  config = config_in("unused", fields)
  ran, said = counted_evaluations(config, full)
  start = method_lib.draw_place(config, 0, 0)[0]
  assert ran == said == 9 + 2 * (8 - start) and start > 0


LATE = config_lib.Sampler(num_steps=6, window=(3, 5), same_latent=True)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"completion.steps": 2},
    {"completion.strides": (1, 2)},
    {"completion.lanes_per_chunk": 2},
    {"sampler.guidance_scale": 2.0},
    {"sampler": LATE},
    {"sampler": LATE, "credit.method": "flow_grpo"},
    {"sampler": BRANCH, "credit.method": "branch"},
    {"sampler": BRANCH, "credit.method": "branch", "train.microbatch": 6},
    {
      "sampler": dataclasses.replace(BRANCH, branch_steps=2),
      "credit.method": "branch",
      "completion.strides": (2, 1),
    },
    {
      "sampler": config_lib.Sampler(rollout="ode", num_steps=5, window=(0, 4)),
      "credit.method": "flow_grpo",
    },
    {"sampler": dataclasses.replace(LATE, rollout="ode"), "credit.method": "flow_grpo"},
  ],
  ids=str,
)
def test_evaluations_per_sample_are_those_of_the_program(config_in, full, fields):
  config = config_in("unused", {"sampler": config_lib.Sampler(num_steps=6, window=(0, 4))} | fields)
  ran, said = counted_evaluations(config, full)
  assert said == pytest.approx(ran, rel=1e-12)


@pytest.mark.parametrize(
  "batch, shards, members",
  [(16, 1, 4), (8, 1, 4), (8, 2, 4), (8, 4, 2), (8, 8, 1), (6, 1, 2), (6, 2, 1), (24, 8, 1)],
)
def test_members_of_a_batch_divide_it_and_leave_every_shard_as_many_states(
  config_in, full, batch, shards, members
):
  fields = {"sampler": BRANCH, "credit.method": "branch", "train.microbatch": batch}
  method = method_lib.build_method(config_in("unused", fields), full, shards=shards)
  assert method.members == members


def test_plans_of_all_drawn_steps_have_one_shape(config_in, full):
  sampler = dataclasses.replace(BRANCH, num_steps=7, window=(0, 6), branch_steps=3)
  config = config_in("unused", {"sampler": sampler, "credit.method": "branch"})
  method = method_of(config, full)
  places = [method_lib.draw_place(config, epoch, 0) for epoch in range(20)]
  assert len({tuple(place) for place in places}) > 5
  shapes = {
    tuple(np.shape(leaf) for leaf in jax.tree.leaves(method_lib.build_plan(config, method, place)))
    for place in places
  }
  assert len(shapes) == 1


def test_plans_of_all_drawn_windows_have_one_shape(config_in, full):
  config = config_in("unused", {"sampler": config_lib.Sampler(window=(0, 3), window_range=(1, 8))})
  method = method_of(config, full)
  shapes = {
    tuple(
      np.shape(leaf)
      for leaf in jax.tree.leaves(
        method_lib.build_plan(config, method, np.arange(start, start + 3))
      )
    )
    for start in range(1, 6)
  }
  assert len(shapes) == 1


def test_method_without_completions_has_no_plan(config_in, full):
  config = config_in("unused", {"credit.method": "flow_grpo"})
  assert method_lib.build_plan(config, method_of(config, full), np.arange(9)) is None


def test_users_own_credit_function_gets_all_completions(config_in, full):
  config = config_in("unused", {"credit.method": "scripted_rewards:last_step_credit"})
  credit = method_of(config, full).credit
  assert credit.completions == "all"
  reward = jnp.asarray([[0.0, 1.0], [2.0, 3.0], [4.0, 6.0]])
  np.testing.assert_array_equal(credit.function(reward).reward, [[0.0, 0.0], [2.0, 3.0]])


def test_balancing_is_chosen_by_the_config(config_in, full):
  # Two trajectories that turn up at their first step and one that turns down.
  reward = jnp.asarray([[0.0, 0.0, 0.0], [1.0, 2.0, -3.0], [1.0, 2.0, -3.0]])
  marks = {}
  for balance in (True, False):
    config = config_in("unused", {"credit": config_lib.Credit("tp_grpo", balance)})
    credit = method_of(config, full).credit
    extras = {"key": jax.random.key(0)} if "key" in credit.extras else {}
    marks[balance] = credit.function(reward, **extras).is_turning_point[0].tolist()
  assert marks == {True: [False, True, True], False: [True, True, True]}


@pytest.mark.parametrize("dynamics", names.DYNAMICS)
@pytest.mark.parametrize("schedule", names.SCHEDULES)
def test_every_step_of_the_default_window_has_noise_and_a_finite_mean(
  config_in, full, dynamics, schedule
):
  sampler = dataclasses.replace(
    config_lib.Sampler(), dynamics=dynamics, schedule=schedule, window=(0, 9)
  )
  method = method_of(config_in("unused", {"sampler": sampler}), full)
  x = jnp.ones((1, 2, 2, 1))
  for sigma, sigma_next in zip(method.sigmas[:9], method.sigmas[1:]):
    gaussian = method.step_fn(x, x, jnp.float32(sigma), jnp.float32(sigma_next))
    assert float(gaussian.std) > 0
    assert bool(jnp.isfinite(gaussian.mean).all())
