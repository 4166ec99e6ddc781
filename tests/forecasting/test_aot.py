"""The command that compiles a run for a topology, and what it computes."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import tasks
from tpgrpo_jax.cost import collectives, flops, hardware
from tpgrpo_jax.forecasting import choice, forecast, lowering, reward_program
from tpgrpo_jax.training import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = "configs/tiny_text.py"
# Small enough to compile in seconds.
SHORT = (
  "--config.train.microbatch=8",
  "--config.train.prompts_per_epoch=2",
  "--config.train.group_size=8",
  "--config.train.updates_per_epoch=2",
)


def small_config(**sampler):
  base = tasks.tiny_text()
  return dataclasses.replace(
    base,
    sampler=dataclasses.replace(base.sampler, num_steps=2, window=(0, 1), **sampler),
    train=dataclasses.replace(
      base.train, microbatch=8, prompts_per_epoch=2, group_size=8, updates_per_epoch=2
    ),
  )


def command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.aot", "--config", RECIPE, *SHORT, *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_the_built_in_recipe_on_virtual_devices_ends_with_a_json_line():
  done = command("--topology=cpu:4", "--config.mesh.fsdp=2", "--json", "--nochoose")
  assert done.returncode == 0, done.stderr
  row = json.loads(done.stdout.splitlines()[-1])
  assert row["devices"] == 4 and row["given"]["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
  rollout, update = row["given"]["phases"]
  assert (rollout["name"], update["name"]) == ("rollout", "update")
  assert (rollout["runs"], update["runs"]) == (2, 2)
  assert min(rollout["arguments"], update["temporaries"], update["flops"]) > 0
  assert update["traffic"]["received"]["all-reduce"] > 0
  assert row["given"]["fits"] is None and "not known" in done.stdout


def test_an_unknown_topology_is_answered_with_the_known_ones():
  done = command("--topology=v5e:3x5")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  for tpu, shapes in hardware.TOPOLOGIES.items():
    assert f"{tpu}:{', '.join(shapes)}" in done.stderr


@pytest.mark.parametrize(
  "name", ["", "v5e", "v5e:", "h100:", "b100:8", "cpu:0", "cpu:999999", "cpu:x", "4x4"]
)
def test_topologies_that_do_not_exist_are_refused(name):
  with pytest.raises(ValueError, match="no such topology"):
    hardware.check_topology(name)


def test_gpus_are_counted_and_not_compiled_for():
  refused = command("--topology=h100:8")
  assert refused.returncode == 1 and "Add --nocompile" in refused.stderr
  done = command("--topology=h100:8", "--nocompile", "--json")
  assert done.returncode == 0, done.stderr
  given = json.loads(done.stdout.splitlines()[-1])["given"]
  assert {given["phases"][0][name] for name in ("results", "temporaries", "traffic")} == {None}
  assert given["mesh"]["data"] == 8 and given["room"] == 0.9 * 80 * 2**30
  assert given["flops"] / (8 * 989e12) == pytest.approx(
    sum(phase["runs"] * phase["bound"]["compute"] for phase in given["phases"])
  )


def test_slices_of_what_is_no_tpu_are_refused():
  with pytest.raises(ValueError, match="--slices=2: only TPUs"):
    hardware.open_topology("local", 2)


def test_a_mesh_that_does_not_divide_the_devices_is_refused():
  done = command("--topology=cpu:4", "--config.mesh.fsdp=3")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "must multiply to the 4 devices" in done.stderr


def test_a_hub_id_of_unknown_sizes_is_refused():
  config = dataclasses.replace(tasks.sd35m(), model=config_lib.Model("sd3", "someone/some-model"))
  with pytest.raises(ValueError, match="no folder here"):
    lowering.load_sizes(config)


def test_a_small_decoder_of_completions_is_counted():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  config = tasks.sd35m()
  small = dataclasses.replace(
    config, completion=dataclasses.replace(config.completion, decoder="madebyollin/taesd3")
  )
  around = lowering.abstract_model(small, mesh).pipeline
  size = lambda weights: sum(leaf.size for leaf in jax.tree.leaves(weights))
  assert size(around.completion_decoder) == 1_229_443  # diffusers' decoder, counted
  assert size(around.decoder["decoder"]) == 49_545_475
  latents = jax.ShapeDtypeStruct((1, 64, 64, 16), np.float32)
  work = lambda decode, weights: flops.count(decode, weights, latents).total
  assert work(around.decode, around.decoder) == pytest.approx(2.51e12, rel=0.01)
  completed = work(around.decode_completions, around.completion_decoder)
  assert completed == pytest.approx(0.141e12, rel=0.01)
  unknown = dataclasses.replace(
    config, completion=dataclasses.replace(config.completion, decoder="someone/small")
  )
  with pytest.raises(ValueError, match="completion.decoder='someone/small': is no folder here"):
    lowering.abstract_model(unknown, mesh)


def test_arguments_are_the_bytes_of_weights_and_batch():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2), jax.devices()[:4])
  plan = lowering.open_plan(small_config(guidance_scale=2.0), mesh)
  with jax.set_mesh(mesh):
    function, args, kwargs = lowering.rollout_program(plan)
    compiled = function.lower(*args, **kwargs).compile()
  found = compiled.memory_analysis()
  assert found.argument_size_in_bytes == lowering.bytes_per_device((args, kwargs))
  # What the sampler gives lies as the update is told that it lies.
  said = jax.tree.map(lambda leaf: leaf.sharding.spec, lowering.transitions(plan))
  assert jax.tree.map(lambda sharding: sharding.spec, compiled.output_shardings[0]) == said


FORMS = {
  "trajectory": {},
  "bfloat16": {"sampler": {"latents": "bfloat16"}},
  "normalized": {"loss": {"ratio": "normalized"}},
  "branch": {"sampler": {"rollout": "branch", "branches": 4}, "credit": {"method": "branch"}},
  "ode": {
    "sampler": {"rollout": "ode"},
    "credit": {"method": "flow_grpo"},
    "loss": {"objective": "nft", "clip_range": 0.0},
  },
}


def form_of(name):
  config = small_config()
  for group, changes in FORMS[name].items():
    part = dataclasses.replace(getattr(config, group), **changes)
    config = dataclasses.replace(config, **{group: part})
  return config


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("devices", [1, 4])
def test_transitions_have_the_shapes_that_the_rollout_gives(name, devices):
  config = form_of(name)
  plan = lowering.open_plan(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:devices]))
  with jax.set_mesh(plan.mesh):
    function, args, kwargs = lowering.rollout_program(plan)
    real, images = jax.eval_shape(function, *args, **kwargs)
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(real) == shapes(lowering.transitions(plan))
  assert images.shape[0] * images.shape[1] == plan.images


@pytest.mark.parametrize("name", FORMS)
def test_update_takes_what_the_rollout_gives(name):
  config = form_of(name)
  plan = lowering.open_plan(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:4]))
  with jax.set_mesh(plan.mesh):
    function, args, kwargs = lowering.update_program(plan)
    after, metrics = jax.eval_shape(function, *args, **kwargs)
  same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
  assert jax.tree.all(jax.tree.map(same, after, plan.state))
  assert metrics["loss"].shape == ()


def test_states_and_weights_have_the_bytes_of_real_ones():
  from tpgrpo_jax.training import build
  from tpgrpo_jax.training import state as state_lib

  config = small_config()
  mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=4), jax.devices()[:8])
  plan = lowering.open_plan(config, mesh)
  model = build.build_model(config, mesh, ["A"])
  real = jax.device_put(
    state_lib.init_state(model.trainable, plan.method.optimizer),
    mesh_lib.param_shardings(mesh, plan.state),
  )
  for shapes, arrays in ((plan.state, real), (plan.model.frozen, model.frozen)):
    shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(arrays)]
    assert lowering.bytes_per_device(shapes) == sum(shard.nbytes for shard in shards)


def test_the_released_models_have_their_released_sizes():
  # Public model cards: SD3.5-Medium 2.5 B, FLUX.1-dev 12 B, FLUX.2-klein 4 B, Z-Image 6 B parameters.
  mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  for config, billions, latent in (
    (tasks.sd35m(), 2.5, (64, 64, 16)),
    (tasks.flux_pickscore(), 12, (64, 64, 16)),
    (tasks.flux2_klein(), 3.88, (24, 24, 128)),
    (tasks.z_image(), 6.15, (64, 64, 16)),
  ):
    model = lowering.abstract_model(config, mesh)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(model.frozen) == pytest.approx(billions * 1e9, rel=0.15)
    assert model.pipeline.latent_shape == latent
    assert count(model.pipeline.decoder) == pytest.approx(84e6, rel=0.05)  # encoder and decoder


def shard(mesh, *spec):
  return NamedSharding(mesh, P(*spec))


def traffic_of(function, out, *args):
  compiled = jax.jit(function, out_shardings=out).lower(*args).compile()
  return collectives.read_traffic(compiled.as_text(), devices=4)


def test_gathers_and_sums_receive_what_the_closed_forms_say():
  mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=shard(mesh, "a"))
  gathered = traffic_of(lambda x: x, shard(mesh), x)
  assert gathered.received == {"all-gather": 8 * 16 * 4 * 3 / 4}
  summed = traffic_of(lambda x: jnp.sum(x, axis=0), shard(mesh), x)
  assert summed.received == {"all-reduce": 2 * 16 * 4 * 3 / 4}


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
  mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
  x = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=shard(mesh))
  weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=shard(mesh, None, "a", None))

  def chain(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  found = traffic_of(chain, shard(mesh), x, weights)
  assert found.runs["all-reduce"] == 5
  assert found.received["all-reduce"] == 5 * 2 * 16 * 4 * 3 / 4
  assert found.unknown_loops == 0


HLO = """HloModule m

%fused (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %f = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%fused
}

%until_seven (s: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%seven (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a2a = f32[8]{0} all-to-all(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %u = (s32[], f32[8]{0}) while(%t), condition=%c, body=%body
  %v = (s32[], f32[8]{0}) while(%t), condition=%until_seven, body=%seven
  %s = (f32[8]{0}, f32[16]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8], dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
  %ps = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}
  %pd = f32[8]{0} collective-permute-done(%ps)
  ROOT %rs = f32[2]{0} reduce-scatter(%a), replica_groups={}, dimensions={0}, to_apply=%add
}
"""


def test_the_text_of_a_program_is_read_by_hand_computed_figures():
  found = collectives.read_traffic(HLO, devices=8)
  assert found.received == {
    "all-gather": 4 * (16 * 8 * 2 * 3 / 4) + 16 * 4 / 2,
    "all-reduce": 4 * (2 * 8 * 4 / 2),
    "all-to-all": 7 * (8 * 4 * 3 / 4),
    "collective-permute": 8 * 4,
    "reduce-scatter": 2 * 4 * 7,
  }
  assert found.runs == {
    "all-gather": 5, "all-reduce": 4, "all-to-all": 7, "collective-permute": 1, "reduce-scatter": 1
  }  # fmt: skip
  assert found.unknown_loops == 1
  assert found.total == sum(found.received.values())


def test_a_bound_is_the_longest_of_three_times():
  chip = hardware.Chip(hbm=1.0, flops=100.0, hbm_bandwidth=10.0, link_bandwidth=5.0)
  found = hardware.bound(chip, devices=4, flops=800.0, memory_bytes=50.0, link_bytes=20.0)
  assert (found.compute, found.memory, found.links) == (2.0, 5.0, 4.0)
  assert found.seconds == 5.0


def test_candidates_divide_devices_and_updates_and_begin_with_the_least_fsdp():
  found = list(choice.candidates(tasks.sd35m(), 16))  # 576 samples an update
  sizes = [(c.mesh.fsdp, c.train.microbatch) for c in found]
  assert sizes[:4] == [(1, 96), (1, 64), (1, 48), (1, 32)]
  assert sorted({fsdp for fsdp, _ in sizes}) == [1, 2, 4, 8, 16]
  assert all(576 % size == 0 and size % 16 == 0 for _, size in sizes)


def test_candidates_keep_the_microbatch_of_the_update():
  config = tasks.sd35m()
  asked = lambda size: dataclasses.replace(
    config, train=dataclasses.replace(config.train, update_microbatch=size)
  )
  sizes = {c.train.microbatch for c in choice.candidates(asked(32), 16)}
  assert sizes == {32, 64, 96} and not [*choice.candidates(asked(8), 16)]


def test_an_update_of_smaller_microbatches_does_the_same_work_in_less_memory():
  def compiled(size):
    config = small_config()
    train = dataclasses.replace(config.train, update_microbatch=size)
    config = dataclasses.replace(config, train=train, lora=config_lib.Lora(rank=2))
    plan = lowering.open_plan(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:1]))
    with jax.set_mesh(plan.mesh):
      function, args, kwargs = lowering.update_program(plan)
      memory = function.lower(*args, **kwargs).compile().memory_analysis()
    return flops.count(function, *args, **kwargs).total, memory.temp_size_in_bytes

  whole, parts = compiled(0), compiled(2)
  assert parts[0] == pytest.approx(whole[0], rel=0.01)  # each embeds its texts
  assert parts[1] < 0.6 * whole[1]


def test_the_choice_fits_where_the_config_does_not():
  devices = jax.devices()[:4]
  config = small_config()
  plan = lowering.open_plan(config, mesh_lib.make_mesh(config.mesh, devices))
  state = lowering.bytes_per_device(plan.state)

  def measured(hbm):
    phase = forecast.Phase(
      "rollout", 2, 0, 0, 0, 0, 1.0, {}, collectives.Traffic({}, {}, 0), None, 0.0
    )
    phases = (phase, dataclasses.replace(phase, name="update"))
    return forecast.Forecast({"data": 4, "fsdp": 1, "tensor": 1}, 8, phases, "", hbm)

  whole, halved = (choice.choose(config, devices, measured(share * state)) for share in (2.0, 0.8))
  assert whole is not None and whole.mesh.fsdp == 1
  assert halved is not None and halved.mesh.fsdp > 1
  assert choice.choose(config, devices, measured(1.0)) is None


def test_what_is_not_known_of_a_phase_is_shown_as_such():
  bound = hardware.Bound(1.0, 0.5, 0.0)
  update = forecast.Phase(
    "update", 2, 0, 0, 0, 0, 1.0, {}, collectives.Traffic({}, {}, 0), bound, 9.0
  )
  scores = dataclasses.replace(update, name="old_log_prob", traffic=None)
  found = forecast.Forecast({"data": 1, "fsdp": 1, "tensor": 1}, 8, (update, scores), "", 1e9)
  of_update, of_scores = (
    text.split("\n")[:2]
    for text in forecast.render(found).split("\nupdate ")[1].split("\nold_log_prob ")
  )
  assert "0.00 GiB" in of_update[0] and of_update[0].endswith("9 s") and "links" in of_update[1]
  assert "- GiB" in of_scores[0] and of_scores[0].endswith("-") and "links" not in of_scores[1]
  row = forecast.to_json(found)["phases"][1]
  assert row["traffic"] is row["compile_seconds"] is None and row["temporaries"] == 0
  assert found.fits


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler (no TPU)"
)
@pytest.mark.parametrize("slices", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_the_built_in_recipe_compiles_for_a_tpu(slices):
  done = command("--topology=v5e:2x2", f"--slices={slices}", "--json", "--nochoose")
  assert done.returncode == 0, done.stderr
  row = json.loads(done.stdout.splitlines()[-1])
  given = row["given"]
  assert row["devices"] == given["mesh"]["data"] == 4 * slices
  assert given["fits"] and given["seconds"] > 0
  assert np.isfinite(given["flops"])
  for phase in given["phases"]:
    found = phase["schedule"]
    assert {"matmul", "attention", "copies", "other"} <= found["seconds"].keys()
    assert any(copy["source"] for copy in found["copies"])  # the compiler itself asks for others
    assert sum(found["seconds"].values()) > phase["bound"]["compute"]
  assert "as the compiler reckons" in done.stdout


TOWERS = {
  "text_config": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      projection_dim=16),
  "vision_config": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      projection_dim=16),
  "projection_dim": 16,
}  # fmt: skip


def test_a_reward_of_the_devices_is_compiled_from_its_sizes(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(TOWERS))
  options = {"weight": 1.0, "path": str(tmp_path)}
  config = dataclasses.replace(small_config(), rewards={"pickscore": options, "ocr": 1.0})
  mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2), jax.devices()[:4])
  plan = lowering.open_plan(config, mesh)
  (known,), unknown = reward_program.on_devices(config)
  with jax.set_mesh(mesh):
    function, args, kwargs = reward_program.program(plan, known)
    compiled = function.lower(*args, **kwargs).compile()
  assert unknown == [] and flops.count(function, *args, **kwargs).total > 0
  assert args[1][0].shape == (16, 24, 48, 3)
  assert compiled.memory_analysis().argument_size_in_bytes == (lowering.bytes_per_device(args))


def test_rewards_of_unknown_sizes_are_named():
  config = dataclasses.replace(
    small_config(),
    rewards={"hpsv2": {"path": "someone/hps"}, "a": {"make": "pickscore", "path": "x/y"}, "ocr": 1},
  )
  assert reward_program.on_devices(config) == ([], ["hpsv2", "pickscore"])


def test_a_refusal_for_want_of_memory_is_read_and_others_are_raised():
  message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
  said, temporaries = forecast.read_refusal(jax.errors.JaxRuntimeError(message), 2**30)
  assert (said, temporaries) == ("Used 20.50G of 15.75G hbm", round(19.5 * 2**30))
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    forecast.read_refusal(jax.errors.JaxRuntimeError("INTERNAL: something else"), 0)


def test_quantised_weights_take_less_of_a_device():
  base = config_lib.Config(lora=config_lib.Lora(rank=2, alpha=4.0))
  mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.devices()[:1])
  sizes = {}
  for kind in ("", "int8"):
    model = dataclasses.replace(base.model, quantize=kind, remat="full")
    plan = lowering.open_plan(dataclasses.replace(base, model=model), mesh)
    sizes[kind] = lowering.bytes_per_device(plan.model.frozen)
  assert sizes["int8"] < 0.5 * sizes[""]
