"""What a run learned leaves as files that say what they are, and another run goes on from them."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.models import byte_text, hf, lora, mmdit
from tpgrpo_jax.runs import checkpoint, run_folder
from tpgrpo_jax.training import build, restore
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import state as state_lib

SMALL = mmdit.MMDiTConfig(
  sample_size=48,
  patch_size=8,
  in_channels=1,
  num_layers=2,
  attention_head_dim=8,
  num_attention_heads=2,
  joint_attention_dim=byte_text.embedding_dim(6),
  caption_projection_dim=16,
  pooled_projection_dim=byte_text.embedding_dim(6),
  out_channels=1,
  pos_embed_max_size=6,
  qk_norm="rms_norm",
)
LORA = config_lib.Lora(rank=2, alpha=6.0, targets=("attn.to_q", "attn.to_add_out", "proj_out"))


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """A folder with a very small random model in it."""
  folder = tmp_path_factory.mktemp("work")
  split = lambda key: lora.split_trainable(models.build_transformer(SMALL)(key), rank=0)[1:]
  abstract = lora.merge_trees(*jax.eval_shape(split, jax.random.key(0)))
  hf.save_transformer(folder / "model", SMALL, random_like(abstract, 0))
  return folder


def config_of(work, **fields):
  return config_lib.Config(
    model=config_lib.Model(path=str(work / "model")),
    mesh=config_lib.Mesh(data=2, fsdp=2, tensor=2),
    lora=dataclasses.replace(LORA, **fields),
  )


def run_of(folder, config):
  """A run with random EMA weights, and twice those as its last ones; returns the EMA weights."""
  model = build.build_model(config, mesh_lib.make_mesh(config.mesh))
  state = state_lib.init_state(model.trainable, state_lib.make_optimizer(config.optimizer))
  shardings = jax.tree.map(lambda x: x.sharding, state.ema)
  ema = jax.device_put(random_like(state.ema, 1), shardings)
  last = jax.tree.map(lambda x: 2 * x, ema)
  state = dataclasses.replace(state, ema=ema, trainable=last, update=jnp.int32(3))
  run_folder.save_config(folder, config)
  with checkpoint.RunCheckpoints(folder) as checkpoints:
    checkpoints.save(1, state, force=True)
  return jax.device_get(ema)


@pytest.fixture(scope="module")
def adapted(work):
  """(folder, EMA weights) of a run with adapters."""
  return work / "adapted", run_of(work / "adapted", config_of(work))


def export(work, *arguments):
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  return subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.export", *map(str, arguments)],
    cwd=work,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": root},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def assert_same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_exported_adapters_are_the_average_and_another_run_starts_from_them(work, adapted):
  run, ema = adapted
  done = export(work, "--run", run, "--output", "lora")
  assert done.returncode == 0, done.stderr
  assert "EMA weights" in done.stdout and "pipe.load_lora_weights('lora')" in done.stdout
  config = config_of(work, path=str(work / "lora"))
  model = build.build_model(config, mesh_lib.make_mesh(config.mesh))
  jax.tree.map(  # alpha / rank = 3 is part of the file's B: one rounding out, one back
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-22), model.trainable, ema
  )
  fresh = build.build_model(config_of(work), mesh_lib.make_mesh(config.mesh))
  jax.tree.map(
    lambda a, b: a.sharding == b.sharding or pytest.fail(), model.trainable, fresh.trainable
  )


def test_last_weights_are_merged_into_a_whole_transformer(work, adapted):
  run, ema = adapted
  done = export(work, "--run", run, "--output", "whole", "--merge", "--weights", "last")
  assert done.returncode == 0, done.stderr
  assert "last weights" in done.stdout and "SD3Transformer2DModel.from_pretrained" in done.stdout
  config = dataclasses.replace(config_of(work), lora=config_lib.Lora())
  base, merged = (
    hf.flatten(restore.open_model(_at(config, work / name)).params["trainable"])
    for name in ("model", "whole")
  )
  adapters = hf.flatten(jax.tree.map(lambda x: 2 * x, ema))
  for name, kernel in base.items():
    wanted = np.asarray(kernel)
    if f"{name.removesuffix('kernel')}lora_a" in adapters:
      a, b = (adapters[f"{name.removesuffix('kernel')}lora_{side}"] for side in "ab")
      wanted = wanted + LORA.alpha / LORA.rank * a @ b
    # float32 products of random numbers, of rank 2.
    np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-5)


def _at(config, folder):
  return dataclasses.replace(config, model=config_lib.Model(path=str(folder)))


@pytest.mark.slow
def test_a_run_that_trained_every_weight_is_written_whole(work):
  config = dataclasses.replace(config_of(work), lora=config_lib.Lora())
  ema = run_of(work / "full", config)
  done = export(work, "--run", work / "full", "--output", "full_out")
  assert done.returncode == 0, done.stderr
  found = restore.open_model(_at(config, work / "full_out"))
  assert_same(jax.device_get(found.params["trainable"]), ema)


def test_a_run_opens_without_the_file_it_began_from(work, adapted):
  _, ema = adapted
  adapter = hf.save_lora(work / "gone", ema, SMALL, rank=2, alpha=6.0, targets=LORA.targets)
  config = config_of(work, path=str(adapter))
  run_of(work / "continued", config)
  adapter.unlink()
  opened = restore.open_model(config, work / "continued")
  assert_same(jax.device_get(opened.params["trainable"]), ema)


def test_export_of_no_run_is_explained(work):
  done = export(work, "--run", work / "none", "--output", "nothing")
  assert done.returncode != 0 and str(work / "none") in done.stderr
  assert not (work / "nothing").exists()


def test_where_the_file_is_silent_about_alpha_the_config_decides(work, adapted):
  _, ema = adapted
  path = hf.save_lora(work / "silent", ema, SMALL, rank=2, alpha=2.0, targets=LORA.targets)
  safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
  with pytest.warns(UserWarning, match=r"lora.alpha=8.0 is taken.*would take the rank, 2.0"):
    config = config_of(work, path=str(path), alpha=8.0)
    model = build.build_model(config, mesh_lib.make_mesh(config.mesh))
  assert_same(model.trainable, ema)


@pytest.mark.parametrize(
  "fields, lines",
  [
    ({"rank": 4}, ["  lora.rank=4: the file has 2"]),
    (
      {"alpha": 3.0, "targets": ("attn.to_q",)},
      ["  lora.alpha=3.0: the file has 6.0", "  lora.targets=('attn.to_q',): the file has ("],
    ),
  ],
)
def test_config_that_the_adapter_file_contradicts_is_refused(work, adapted, fields, lines):
  _, ema = adapted
  path = hf.save_lora(work / "file", ema, SMALL, rank=2, alpha=6.0, targets=LORA.targets)
  with pytest.raises(ValueError) as caught:
    config = config_of(work, path=str(path), **fields)
    build.build_model(config, mesh_lib.make_mesh(config.mesh))
  message = str(caught.value)
  assert f"lora.path={str(path)!r}" in message and "the file's values" in message
  for line in lines:
    assert any(found.startswith(line) for found in message.splitlines())


def test_files_that_are_not_an_exports_are_neither_uploaded_nor_written_over(work, tmp_path):
  run_folder.save_config(work / "told", config_of(work))
  (tmp_path / "secret.txt").write_text("mine")
  done = export(work, "--run", "told", "--output", tmp_path, "--push", "me/mine")
  assert done.returncode == 1 and "holds 'secret.txt'" in done.stderr
  done = export(work, "--run", "told", "--output", tmp_path, "--push", "me/mine/too")
  assert done.returncode == 1 and "--push='me/mine/too': must be a repository" in done.stderr
  (tmp_path / "README.md").write_text("mine")
  done = export(work, "--run", "told", "--output", tmp_path)
  assert done.returncode == 1 and "holds a README.md that no export wrote" in done.stderr
  assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
    ("secret.txt", "README.md"), "mine"
  )
