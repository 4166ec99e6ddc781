"""What the tests of training share: a very small model, a folder of prompts, and a config for them."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.models import hf, lora, mmdit
from tpgrpo_jax.training import evaluation
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import session as session_lib

WORDS = ("ANT", "BEE", "CAT", "DOG", "ELK", "FOX", "GNU", "HEN")

# The latent and text sizes are the tiny variant's, everything else is as small as it goes.
SMALL = mmdit.MMDiTConfig(
  sample_size=48,
  patch_size=8,
  in_channels=1,
  num_layers=1,
  attention_head_dim=16,
  num_attention_heads=2,
  joint_attention_dim=262,
  caption_projection_dim=32,
  pooled_projection_dim=262,
  out_channels=1,
  pos_embed_max_size=6,
  qk_norm="rms_norm",
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> pathlib.Path:
  """A folder with random weights of SMALL; none of them zero, so that all layers matter."""
  return save_random_weights(tmp_path_factory.mktemp("small_model"), SMALL)


def save_random_weights(folder: pathlib.Path, config: mmdit.MMDiTConfig) -> pathlib.Path:
  """Writes a transformer whose weights are normal, about as large as trained ones."""
  shapes = jax.eval_shape(
    lambda key: lora.split_trainable(models.build_transformer(config)(key), rank=0)[1:],
    jax.random.key(0),
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    scale = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.1
    offset = 1.0 if path[-1].key == "scale" else 0.0
    return (offset + scale * rng.standard_normal(leaf.shape)).astype(np.float32)

  hf.save_transformer(
    folder, config, jax.tree_util.tree_map_with_path(draw, lora.merge_trees(*shapes))
  )
  return folder


@pytest.fixture(scope="session")
def prompt_folder(tmp_path_factory) -> pathlib.Path:
  """A prompt dataset of a few words."""
  folder = tmp_path_factory.mktemp("prompts")
  (folder / "train.txt").write_text("\n".join(WORDS))
  (folder / "test.txt").write_text("\n".join(WORDS[::-1]))
  return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory) -> pathlib.Path:
  """Where prompts are prepared, so that tests leave the user's cache alone."""
  return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def config_in(small_model, prompt_folder, prepared_folder):
  """Returns (run folder, {"group.field": value}) -> Config of a run of seconds."""
  base = config_lib.Config(
    model=config_lib.Model(path=str(small_model)),
    prompts=config_lib.Prompts("folder", str(prompt_folder)),
    sampler=config_lib.Sampler(num_steps=4, window=(0, 2), window_range=(0, 3)),
    rewards={"coarse": {"weight": 1.0, "make": "scripted_rewards:make"}},
    train=config_lib.Train(
      epochs=3, prompts_per_epoch=4, group_size=4, microbatch=8, updates_per_epoch=2
    ),
    eval=config_lib.Eval(every=1, num_steps=2, prompts=8, batch=8),
    checkpoint=config_lib.Checkpoint(every=1, keep=4),
    log=config_lib.Log(tensorboard=False, images_every=0),
  )

  def make(run_dir, fields=None):
    return replace_fields(base, {"run.dir": str(run_dir)} | (fields or {}))

  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(prepared_folder))
    yield make


@pytest.fixture
def make_config(config_in, tmp_path):
  """The same, of a run in tmp_path/run."""
  return functools.partial(config_in, tmp_path / "run")


# What no program of a run depends on.
_AROUND = {"run": config_lib.Run(), "checkpoint": config_lib.Checkpoint(), "log": config_lib.Log(),
           "scoring": config_lib.Scoring(), "eval": config_lib.Eval(), "train.epochs": 1}  # fmt: skip


@pytest.fixture(scope="module")
def shared_programs():
  """Runs of a module that differ in what is around them share the programs of the first: they trace once.

  Everything else is opened anew: files, weights, rewards, state. Tests of real processes share nothing.
  """
  opened, first = session_lib.open_session, {}
  make_sample_fn, samplers = evaluation.make_sample_fn, {}

  def open_session(config, *announce):
    session = opened(config, *announce)
    kind = repr(replace_fields(config, _AROUND)), session.mesh
    kept = first.setdefault(kind, session)
    names = ("method", "rollout_fn", "credit_fn", "train_step", "rescoring_step", "meter")
    return dataclasses.replace(session, **{name: getattr(kept, name) for name in names})

  def share_sample_fn(config, model, mesh, **options):
    kind = repr(replace_fields(config, _AROUND | {"eval": config.eval})), mesh, *options.items()
    if kind not in samplers:
      samplers[kind] = make_sample_fn(config, model, mesh, **options)
    return samplers[kind]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(session_lib, "open_session", open_session)
    patch.setattr(evaluation, "make_sample_fn", share_sample_fn)
    yield


def replace_fields(config: config_lib.Config, fields: dict) -> config_lib.Config:
  """The config with dotted fields changed."""
  for name, value in fields.items():
    group, _, field = name.partition(".")
    if field:
      value = dataclasses.replace(getattr(config, group), **{field: value})
    config = dataclasses.replace(config, **{group: value})
  return config


@pytest.fixture(scope="session")
def single_mesh():
  """A mesh of one device, whatever the process has."""
  kinds = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((1, 1, 1), mesh_lib.AXES, axis_types=kinds, devices=jax.devices()[:1])


@pytest.fixture
def one_device(single_mesh, monkeypatch):
  """Makes every mesh of this test that one."""
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda config: single_mesh)
  return single_mesh
