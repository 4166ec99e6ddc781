"""One epoch on any mesh is one epoch on a single device, and the layout table covers every weight."""

import dataclasses
import functools
import pathlib
import re
import sys

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, types
from tpgrpo_jax.config import model_fields
from tpgrpo_jax.models import flux, hf, lora, tiny
from tpgrpo_jax.training import build, state
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

sys.path.append(str(pathlib.Path(__file__).parents[1] / "models"))
import families


@dataclasses.dataclass(frozen=True)
class FarDevice:
  """One of several slices."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "far"


@pytest.mark.parametrize(
  "axes, outer",
  [
    ((-1, 2, 1), (4, 1, 1)),  # data crosses the slow network alone
    ((2, 4, 2), (2, 2, 1)),  # as far as it can, then fsdp
    ((1, 2, 8), (1, 2, 2)),
  ],
)
def test_slices_divide_data_first(axes, outer):
  devices = [FarDevice(i, i // 4) for i in range(16)]
  mesh = mesh_lib.make_mesh(config_lib.Mesh(*axes), devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
  inner = [size // parts for size, parts in zip(mesh.devices.shape, outer)]
  for place, slice_index in np.ndenumerate(slices):
    block = np.ravel_multi_index([i // size for i, size in zip(place, inner)], outer)
    assert slice_index == block


# Two anchors of four members in a microbatch: fewer than the shards of these meshes.
BRANCH = {
  "sampler": config_lib.Sampler(
    rollout="branch", branches=4, num_steps=4, window=(0, 3), branch_steps=2, antithetic=True
  ),
  "credit.method": "branch",
  "advantage.group": "state",
  "loss.step_weight": "std",
}
NFT = {
  "sampler": config_lib.Sampler(rollout="ode", num_steps=4, window=(0, 4)),
  "credit.method": "flow_grpo",
  "loss": config_lib.Loss(objective="nft", clip_range=0.0, levels=2, old_decay=(0.0, 0.25, 0.5)),
}


def epoch_on(mesh, make_config, name, changes=None):
  """(weights before, (trainable, EMA, old policy) after, metrics row) of one epoch on the mesh."""
  # A large eps: Adam divides by the gradient's size, and a weight whose gradient is rounding noise
  # (a key's bias, which softmax ignores) would otherwise move by the learning rate either way.
  config = make_config(
    {
      "run.dir": name,
      "train.epochs": 1,
      "optimizer.eps": 1e-2,
      "optimizer.learning_rate": 0.02,
      "ema.every": 1,
      "loss.clip_range": 0.5,  # no ratio near it, where rounding would decide
      "eval.every": 0,
    }
    | (changes or {})
  )
  pathlib.Path(name).mkdir()
  session = session_lib.open_session(config)
  assert session.mesh == mesh
  with jax.set_mesh(mesh):
    before = session_lib.init_state(session)
    start = jax.tree.map(np.array, before.trainable)
    sampled = epoch_lib.sample_epoch(session, before, 0)
    after, row = epoch_lib.update_epoch(session, before, 0, sampled)
  row = {k: v for k, v in row.items() if not k.startswith("time/")}
  return start, jax.device_get((after.trainable, after.ema, after.old)), row


@pytest.fixture(scope="module")
def single(config_in, single_mesh, tmp_path_factory):
  folder = tmp_path_factory.mktemp("single")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
    return epoch_on(single_mesh, lambda fields: config_in(folder, fields), str(folder / "run"))


@pytest.fixture(scope="module")
def single_of(config_in, single_mesh, tmp_path_factory):
  """name -> one epoch of that method on one device."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mesh_lib, "make_mesh", lambda _: single_mesh)
      make = lambda fields: config_in(folder, fields)
      return epoch_on(single_mesh, make, str(folder / "run"), METHODS[name])

  return run


METHODS = {"branch": BRANCH, "nft": NFT}


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, shape, evaluations",
  [
    # Two completions side by side, from the drawn steps 1 and 2 of 4: the longer one takes 2. And the
    # anchor's 4, which 4, 1 or 2 members share: see build_method.
    ("branch", (8, 1, 1), (2 * 2 + 4 / 4, 2 * 2 + 4 / 1)),
    pytest.param("branch", (2, 2, 2), (2 * 2 + 4 / 4, 2 * 2 + 4 / 2), marks=pytest.mark.exhaustive),
    ("nft", (8, 1, 1), (4, 4)),
    pytest.param("nft", (2, 2, 2), (4, 4), marks=pytest.mark.exhaustive),  # as in test_methods.py
  ],
)
def test_one_epoch_of_a_method_on_a_mesh_equals_that_of_a_single_device(
  name, shape, evaluations, single_of, make_config, tmp_path
):
  wanted = single_of(name)
  sized = lambda fields: make_config(fields | {"mesh": config_lib.Mesh(*shape)})
  mesh = mesh_lib.make_mesh(config_lib.Mesh(*shape))
  found = epoch_on(mesh, sized, str(tmp_path / "mesh"), METHODS[name])
  assert (wanted[2]["evaluations_per_sample"], found[2]["evaluations_per_sample"]) == evaluations
  assert_same_epoch(found, wanted, but=("evaluations_per_sample",))


@pytest.mark.parametrize(
  "shape, size",
  [
    pytest.param((8, 1, 1), 0, marks=pytest.mark.exhaustive),
    pytest.param((2, 4, 1), 0, marks=pytest.mark.slow),
    ((2, 2, 2), 4),
  ],
)
def test_one_epoch_on_a_mesh_equals_that_of_a_single_device(
  shape, size, single, make_config, tmp_path
):
  """Where `size` is given, the update takes so many samples at once, fewer than the rollout's."""
  changes = {"mesh": config_lib.Mesh(*shape), "train.update_microbatch": size}
  sized = lambda fields: make_config(fields | changes)
  mesh = mesh_lib.make_mesh(config_lib.Mesh(*shape))
  found = epoch_on(mesh, sized, str(tmp_path / "mesh"))
  assert_same_epoch(found, single)
  assert found[2]["ratio/first_update_max_abs_log"] == pytest.approx(0.0, abs=1e-6)


def assert_same_epoch(found, single, but=()):
  start, weights, row = found
  _, wanted, wanted_row = single
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), weights[0], start)
  assert max(jax.tree.leaves(moved)) > 1e-3  # far beyond the tolerance
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), weights, wanted)
  assert row.keys() == wanted_row.keys()
  for name in row.keys() - {*but}:
    value = row[name]
    # Log-ratios are differences of log-probs of size 1, so they too are absolute.
    assert value == pytest.approx(wanted_row[name], rel=1e-5, abs=1e-5), name


DUAL = dataclasses.replace(
  tiny.TEXT.config,
  num_layers=3,
  dual_attention_layers=(0, 1),
  attention_head_dim=16,
  num_attention_heads=2,
  caption_projection_dim=32,
)


FLUX = flux.FluxConfig(
  in_channels=16,
  out_channels=16,
  num_layers=2,
  num_single_layers=2,
  attention_head_dim=8,
  num_attention_heads=4,
  joint_attention_dim=12,
  pooled_projection_dim=10,
  guidance_embeds=True,
  axes_dims_rope=(2, 2, 4),
)
FLUX_TARGETS = (*model_fields.REFERENCE_LORA_TARGETS, "ff.net.2", "proj_mlp", "proj_out")


@pytest.mark.parametrize(
  "family, shape, rank",
  [
    pytest.param("mmdit", (2, 2, 2), 4, marks=pytest.mark.slow),
    pytest.param("flux", (1, 2, 4), 4, marks=pytest.mark.slow),
    pytest.param("mmdit", (1, 4, 2), 0, marks=pytest.mark.slow),
    *(
      pytest.param(family, shape, rank, marks=pytest.mark.exhaustive)
      for family, shape, rank in [
        ("mmdit", (2, 2, 2), 0),
        ("mmdit", (1, 4, 2), 4),
        ("flux", (2, 2, 2), 0),
        ("flux", (2, 2, 2), 4),
      ]
    ),
    *(
      pytest.param(family, (2, 2, 2), rank, marks=pytest.mark.exhaustive)
      for family in ("flux2", "z_image")
      for rank in (0, 4)
    ),
  ],
)
def test_gradient_on_a_mesh_equals_that_of_a_single_device(family, shape, rank, single_mesh):
  """Of several blocks: where activations have no layout of their own, XLA mixes up their rows."""
  found = gradient(mesh_lib.make_mesh(config_lib.Mesh(*shape)), family, rank)
  wanted = gradient(single_mesh, family, rank)
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  # Sums in another order: a few ulps of the largest term.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
  jax.tree.map(close, found, wanted)


@functools.cache
def gradient(mesh, family, rank):
  """Gradient of a weighted sum of velocities with respect to the trainable weights."""
  create, options, shape, condition = FAMILIES[family]()

  def init(key):
    model = create(key)
    if rank:
      lora.add_lora(model, key, rank=rank, alpha=8.0, init="gaussian", **options)
    return lora.split_trainable(model, rank=rank)

  graphdef, *weights = init(jax.random.key(0))
  # No weight is zero, so that every layer matters.
  jitter = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)
  trainable, frozen = jax.tree.map(jitter, weights)
  velocity_fn = models.make_velocity_fn(graphdef)
  x, target = jax.random.normal(jax.random.key(1), (2, 8, *shape))

  @jax.jit
  @jax.grad
  def loss_grad(trainable, frozen, x, target, condition):
    params = {"trainable": trainable, "frozen": frozen}
    return jnp.mean(velocity_fn(params, x, jnp.full(len(x), 0.6), condition) * target)

  with jax.set_mesh(mesh):
    place = lambda tree: jax.device_put(tree, mesh_lib.param_shardings(mesh, tree))
    data = jax.device_put((x, target, condition), mesh_lib.batch_sharding(mesh))
    grads = loss_grad(place(trainable), place(frozen), data[0], data[1], data[2])
    return jax.device_get(grads)


def mmdit_family():
  """(key -> model, what adapters are put where, latent shape, condition of eight samples)."""
  condition = tiny.TEXT.encode(DUAL, ["ANT", "BEE"] * 4)
  options = {"targets": model_fields.REFERENCE_LORA_TARGETS}
  return models.build_transformer(DUAL), options, tiny.TEXT.latent_shape, condition


def flux_family():
  create = lambda key: flux.Flux(FLUX, guidance=3.5, rngs=nnx.Rngs(params=key))
  options = {"targets": FLUX_TARGETS}
  text, pooled = (jax.random.normal(jax.random.key(2), s) for s in [(8, 5, 12), (8, 10)])
  return create, options, (4, 6, 4), types.Condition(text, pooled)


def family_of(name):
  """One of the harness of tests/models."""
  case = families.FAMILIES[name]
  x, _, condition = families.draw_inputs(case, batch=8)
  options = {"targets": case.targets}
  return families.create_of(case), options, x.shape[1:], condition


FAMILIES = {
  "mmdit": mmdit_family,
  "flux": flux_family,
  "flux2": functools.partial(family_of, "flux2"),
  "z_image": functools.partial(family_of, "z_image"),
}


def tiny_state(rank):
  """Shapes of the train state and of the frozen weights of the shipped model."""
  create = models.build_transformer(tiny.TEXT.config)
  optimizer = state.make_optimizer(config_lib.Optimizer())

  def init(key):
    model = create(key)
    if rank:
      targets = model_fields.REFERENCE_LORA_TARGETS
      lora.add_lora(model, key, rank=rank, alpha=1.0, init="gaussian", targets=targets)
    _, trainable, frozen = lora.split_trainable(model, rank=rank)
    return state.init_state(trainable, optimizer), frozen

  return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("rank", [0, 8])
def test_every_matrix_is_divided_over_the_mesh(rank):
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  train_state, frozen = tiny_state(rank)
  for tree in (train_state, frozen):
    shardings = mesh_lib.param_shardings(mesh, tree)
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings)):
      name = jax.tree_util.keystr(path)
      if "kernel" in name or "lora" in name:
        assert not sharding.is_fully_replicated, name
      assert len(sharding.shard_shape(leaf.shape)) == len(leaf.shape)


@pytest.mark.parametrize(
  "name, rows",
  [
    ("flux2", r"(\btransformer_blocks\.attn\.(to_out|to_add_out)|linear_out)\.kernel"),
    ("z_image", r"(to_out|w2)\.kernel"),
  ],
)
def test_every_matrix_of_a_block_is_divided_over_fsdp_and_tensor(name, rows):
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  weights = families.split(name)[1]
  flat = hf.flatten(mesh_lib.param_shardings(mesh, weights))
  stacked = [
    p for p, leaf in hf.flatten(weights).items() if p.endswith("kernel") and leaf.ndim == 3
  ]
  for path in (path for path in stacked if "modulation" not in path):
    order = ("tensor", "fsdp") if re.search(rows, path) else ("fsdp", "tensor")
    assert flat[path].spec == P(None, *order), path


def test_every_matrix_of_a_flux_block_is_divided_over_fsdp_and_tensor():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  create = lambda: lora.split_trainable(flux.Flux(FLUX, rngs=nnx.Rngs(0)), rank=0)[1]
  tree = hf.flatten(nnx.eval_shape(create))
  flat = hf.flatten(mesh_lib.param_shardings(mesh, tree))
  for path in (path for path in tree if "blocks" in path and path.endswith("kernel")):
    rows = re.search(r"(to_out|to_add_out|linear_2)\.kernel", path)
    order = ("tensor", "fsdp") if rows else ("fsdp", "tensor")
    assert flat[path].spec == P(None, *order), path


def test_moments_and_ema_lie_as_their_weights_do():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  train_state, _ = tiny_state(0)
  shardings = mesh_lib.param_shardings(mesh, train_state)
  adam = shardings.opt_state[1][0]
  assert shardings.trainable == shardings.ema == adam.mu == adam.nu


def test_stacked_blocks_are_divided_within_and_never_across():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  tree = {"blocks_0": {"attn": {"to_q": {"kernel": jnp.zeros((4, 8, 8))}}}}
  sharding = jax.tree.leaves(mesh_lib.param_shardings(mesh, tree))[0]
  assert sharding.spec == P(None, "fsdp", "tensor")


def test_axis_that_does_not_divide_a_weight_is_left_out():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  tree = {"blocks_0": {"attn": {"to_q": {"kernel": jnp.zeros((6, 7))}}}}
  sharding = jax.tree.leaves(mesh_lib.param_shardings(mesh, tree))[0]
  assert sharding.spec == P("fsdp", None)


def test_data_takes_the_devices_that_are_left():
  mesh = mesh_lib.make_mesh(config_lib.Mesh(-1, 2, 2))
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  "sizes, value, rule, fix",
  [
    (
      (3, 1, 1),
      "mesh=(data=3, fsdp=1, tensor=1)",
      "must multiply to the 8 devices",
      "mesh.data=-1",
    ),
    ((-1, 3, 1), "mesh=(data=-1, fsdp=3, tensor=1)", "must multiply to the 8", "a divisor of 8"),
    ((0, 1, 1), "mesh=(0, 1, 1)", "must be at least 1", "data=-1 takes the rest"),
    ((-1, 0, 1), "mesh=(-1, 0, 1)", "must be at least 1", "data=-1 takes the rest"),
  ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes, value, rule, fix):
  with pytest.raises(ValueError) as caught:
    mesh_lib.make_mesh(config_lib.Mesh(*sizes))
  for part in (value, rule, fix):
    assert part in str(caught.value)


def test_microbatch_that_does_not_divide_over_the_mesh_is_refused(make_config):
  config = make_config({"train.microbatch": 4, "mesh": config_lib.Mesh(4, 2, 1)})
  with pytest.raises(ValueError) as caught:
    session_lib.open_session(config)
  message = str(caught.value)
  assert "train.microbatch=4: must be a multiple of mesh.data x mesh.fsdp = 8" in message
  assert "Set it to 8, or change the mesh" in message


def test_microbatch_that_is_proposed_for_the_mesh_divides_an_update_too(make_config):
  t = config_lib.Train(prompts_per_epoch=9, group_size=16, microbatch=4, updates_per_epoch=2)
  config = make_config({"train": t, "mesh": config_lib.Mesh(8, 1, 1)})  # 72 samples an update
  with pytest.raises(ValueError, match="divides 72. Set it to 8, or change the mesh"):
    session_lib.open_session(config)
  config = make_config(
    {"train": dataclasses.replace(t, prompts_per_epoch=1), "mesh": config_lib.Mesh(3)}
  )
  with pytest.raises(ValueError, match="divides 8. 8 has none: change the mesh"):
    mesh_lib.check_microbatch(config, mesh_lib.make_mesh(config.mesh, jax.devices()[:3]))


def test_weights_arrive_on_the_mesh_as_they_are_in_the_file(make_config, small_model):
  mesh = mesh_lib.make_mesh(config_lib.Mesh(2, 2, 2))
  model = build.build_model(make_config(), mesh, ())
  tree = lora.merge_trees(model.trainable, model.frozen)
  loaded = hf.load_transformer(small_model, tree)
  jax.tree.map(np.testing.assert_array_equal, tree, loaded)
