"""Rewards of latents in a run: nothing is decoded for them, and noisy states are scored as they are."""

import pathlib
import sys

import jax
from jax.extend import core
import jax.numpy as jnp
import left_behind
import numpy as np
import pytest
import stored_diffusers as stored

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards, types
from tpgrpo_jax.config import rules
from tpgrpo_jax.cost import flops
from tpgrpo_jax.credit import stepwise
from tpgrpo_jax.forecasting import checking
from tpgrpo_jax.models import dina, layers
from tpgrpo_jax.runs import processes
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import loop, rollout
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import session as session_lib

sys.path.append(str(pathlib.Path(__file__).parents[1] / "rewards"))
import stored_dina

pytestmark = pytest.mark.filterwarnings("ignore:.*prompts have more than.*:UserWarning")
TAPS = (1, 2)  # of three blocks, the first of which has the second attention


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """Prompts, the small SD3 pipeline, and a head for its states."""
  folder = tmp_path_factory.mktemp("work")
  for split in ("train", "test"):
    lines = [f'the blue sign says "{split} {i}"' for i in range(4)]
    (folder / f"{split}.txt").write_text("\n".join(lines))
  stored.write_pipeline(stored.load(), "sd3", folder / "sd3")
  config = dina.HeadConfig(token_dim=32, width=32, taps=2, queries=3, heads=4)
  stored_dina.write_head(folder / "head.safetensors", config)
  return folder


@pytest.fixture(scope="module")
def make_config(work):
  def make(run_dir, method="latent_increments", **others):
    spec = {"weight": 2.0, "path": str(work / "sd3"), "head": str(work / "head.safetensors")}
    fields = {
      "run.dir": str(run_dir), "prompts.name": "folder", "prompts.path": str(work),
      "rewards": {"dina_lrm": spec | {"taps": TAPS, "heads": 4}} | others.pop("rewards", {}),
      "credit.method": method, "text.cache": str(work / "cache"),
    }  # fmt: skip
    config = stored.make_config("sd3", work / "sd3", work, fields | others)
    rules.validate(config)
    return config

  return make


@pytest.fixture(scope="module")
def session(make_config, single_mesh, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda config: single_mesh)
    return session_lib.open_session(make_config(tmp_path_factory.mktemp("run") / "run"))


def rollout_args(session):
  """Arguments of one microbatch, and its condition."""
  config, method = session.config, session.method
  texts = [session.train_prompts[0].text] * 4
  condition = method_lib.build_condition(config, session.model, texts)
  group = np.stack([np.zeros(4), np.arange(4)], axis=1).astype(np.int32)
  place = method_lib.draw_place(config, 0, 0).astype(np.int32)
  plan = method_lib.build_plan(config, method, place)
  params = session.model.params(session.model.trainable)
  key = rollout.epoch_key(config.seed, 0)
  return (params, key, 0, group, condition, place, plan), condition


@pytest.fixture(scope="module")
def epoch(session):
  """(Sampled, metrics row) of the first epoch."""
  with jax.set_mesh(session.mesh):
    state = session_lib.init_state(session)
    sampled = epoch_lib.sample_epoch(session, state, 0)
    return sampled, epoch_lib.update_epoch(session, state, 0, sampled)[1]


@pytest.mark.slow
def test_an_epoch_of_latent_increments_is_on_policy_and_costs_what_the_count_says(epoch):
  sampled, row = epoch
  assert row["ratio/first_update_max_abs_log"] == 0.0
  assert row["grad_norm"] > 0 and row["advantage/std"] > 0 and row["reward/std"] > 0
  assert row["evaluations_per_sample"] == 2 * stored.NUM_STEPS  # guidance, and no completion
  assert not [name for name in row if name.startswith("image/")] and not len(sampled.rollout.images)


def test_a_check_scores_latents_and_needs_no_picture(session):
  with jax.set_mesh(session.mesh):
    scores, size = checking.score_gray(session, session.reward_fn, session.train_prompts[0])
  assert scores.keys() == {"dina_lrm"} and np.isfinite(scores["dina_lrm"])
  height, width, _ = session.model.pipeline.latent_shape
  assert size[0] / height == size[1] / width > 1


@pytest.mark.slow
def test_every_row_of_the_rewards_is_the_score_of_that_state(session, epoch):
  rolled = epoch[0].rollout
  for number, (found, condition) in enumerate(zip(rolled.transitions, rolled.conditions)):
    rows = slice(4 * number, 4 * number + 4)
    # The last first, so that it is seen to be a matter of the state and not of its place.
    states = jnp.stack([found.final, *found.x[::-1]], axis=1)
    levels = jnp.concatenate([jnp.zeros(1), found.sigma[::-1]])
    condition = jax.tree.map(
      lambda a, x=states: layers.per_sample(a, x), method_lib.positive(condition)
    )
    scores = session.reward_fn.look(types.Samples(states, levels), condition)
    scores = 2.0 * scores["dina_lrm"].reshape(4, 4)[:, ::-1].T
    np.testing.assert_allclose(scores, rolled.completion_reward[0, :, rows], rtol=1e-5)
  np.testing.assert_array_equal(
    epoch[0].credit.reward, stepwise.increments(jnp.asarray(rolled.completion_reward[0]))
  )
  assert rolled.completion_reward[0].std(axis=-1).min() > 0


@pytest.mark.slow
def test_evaluation_paints_its_pictures_and_scores_their_latents(session):
  with jax.set_mesh(session.mesh):
    found = session.evaluate(session.model.params(session.model.trainable))
  assert np.ptp(found.scores["dina_lrm"]) > 0 and found.images.shape == (2, 48, 80, 3)
  assert found.row["reward/mean"] == pytest.approx(2.0 * found.scores["dina_lrm"].mean())


@pytest.mark.exhaustive
def test_a_run_with_a_reward_of_latents_is_resumed_bit_for_bit(make_config, one_device, tmp_path):
  sizes = {"train.epochs": 2, "checkpoint.every": 1, "eval.every": 0}
  whole = make_config(tmp_path / "whole", **sizes)
  loop.train(whole)
  loop.train(make_config(tmp_path / "cut", **(sizes | {"train.epochs": 1})))
  resumed = make_config(tmp_path / "cut", **sizes)
  loop.train(resumed)
  trained = [[r for r in left_behind.rows(run) if r["kind"] == "train"] for run in (resumed, whole)]
  assert trained[0] == trained[1] and [row["epoch"] for row in trained[0]] == [1, 2]
  found, wanted = (left_behind.final_state(run)[0] for run in (resumed, whole))
  assert found.keys() == wanted.keys()
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def primitives(jaxpr, tally):
  """How often each primitive stands in a jaxpr and those within."""
  for eqn in jaxpr.eqns:
    tally[eqn.primitive.name] = tally.get(eqn.primitive.name, 0) + 1
    for inner in core.jaxprs_in_params(eqn.params):
      primitives(inner, tally)
  return tally


def test_a_rollout_for_rewards_of_latents_has_no_decoder_and_counts_no_work_of_it(
  session, make_config, tmp_path
):
  with jax.set_mesh(session.mesh):
    check_program(
      session, make_config(tmp_path, "flow_grpo", rewards={"jpeg_compressibility": 0.1})
    )


def check_program(session, both):
  args, condition = rollout_args(session)
  traced = jax.make_jaxpr(lambda *a: session.rollout_fn(*a))(*args)
  assert "conv_general_dilated" not in primitives(traced.jaxpr, {})
  found = jax.eval_shape(session.rollout_fn, *args)[1]
  assert found.images is None and found.x.shape == (4, 4, *session.model.pipeline.latent_shape)
  assert found.sigma.shape == (4,)  # three noisy states and the finished one
  # All of the work is the model's: as many evaluations as the pure function says.
  one = flops.count(
    session.method.velocity_fn, args[0], jnp.zeros((4, *session.model.pipeline.latent_shape)),
    jnp.ones(4), condition,
  )  # fmt: skip
  counted = flops.count(session.rollout_fn, *args)
  assert counted.conv == 0
  evaluations = method_lib.evaluations_per_sample(session.config, session.method, None, args[5])
  assert counted.matmul == one.matmul * evaluations / 2
  # A second reward that looks at pictures brings the decoder back, and both see the same samples.
  method = method_lib.build_method(both, session.model)
  mixed = rollout.make_rollout_fn(both, session.model, method)
  assert flops.count(mixed, *args).conv > 0
  samples = jax.eval_shape(mixed, *args)[1]
  assert samples.images.shape == (4, 1, 48, 80, 3) and samples.x.shape[:2] == (4, 1)


@pytest.mark.parametrize(
  "fields, parts",
  [
    ({"rewards": {"ocr": 1.0}}, ("rewards.ocr", "finished pictures", "eval.rewards")),
    ({"model": config_lib.Model()}, ("rewards.dina_lrm", "'sd3'", "'tiny'")),
    ({"sampler.rollout": "ode"}, ("latent_increments", "'ode'")),
    ({"completion": config_lib.Completion(steps=2)}, ("completion.steps=2", "latent_increments")),
  ],
)
def test_pairs_that_make_no_sense_are_refused(make_config, tmp_path, fields, parts):
  with pytest.raises(ValueError) as caught:
    make_config(tmp_path, **fields)
  assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_latents_and_embeddings_of_another_model_are_refused(session):
  condition = session.model.pipeline.encode([session.train_prompts[0].text])
  height, width, channels = session.model.pipeline.latent_shape
  check = session.reward_fn.check_model
  check((height, width, channels), condition)
  with pytest.raises(ValueError, match=f"rewards.dina_lrm: .*{channels} channels.*makes 16"):
    check((height, width, 16), condition)
  with pytest.raises(ValueError, match="rewards.dina_lrm: .*other text encoders"):
    check((height, width, channels), types.Condition(condition.text[..., :-1], condition.pooled))
  with pytest.raises(ValueError, match="rewards.dina_lrm: .*positions"):
    check((height, 1024, channels), condition)


def test_pictures_alone_are_no_latents(session):
  with pytest.raises(ValueError, match="rewards.dina_lrm: looks at latents"):
    session.reward_fn(np.zeros((1, 8, 8, 3), np.uint8), ["A"], [{}])


@pytest.mark.slow
def test_scores_on_a_mesh_are_those_of_one_device(session):
  spec = session.config.rewards
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8, 2, *session.model.pipeline.latent_shape)).astype(np.float32)
  condition = session.model.pipeline.encode([session.train_prompts[0].text] * 8)
  levels = np.float32([0.5, 0.0])
  wanted = rewards.make_rewards(spec).look(types.Samples(x, levels), condition)["dina_lrm"]
  sharded = rewards.make_rewards(spec, placement=mesh_lib.make_placement(mesh))
  with jax.set_mesh(mesh):
    x, condition = processes.put_batch(mesh, (x, condition))
    found = sharded.look(types.Samples(x, levels), condition)["dina_lrm"]
  assert np.ptp(wanted) > 0.01
  np.testing.assert_allclose(found, wanted, atol=1e-5)
