"""What a run learns goes into diffusers' pipelines with one line, and gives its image there."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import stored_diffusers as stored

from tpgrpo_jax.models import hf
from tpgrpo_jax.training import build, loop, restore

sys.path.append(str(stored.GOLDEN))
pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),
]


# In CI one with CLIP and T5, and one whose adapters sit on fused layers.
@pytest.mark.parametrize(
  "family",
  [
    pytest.param(f, marks=[] if f in ("sd3", "flux2") else pytest.mark.exhaustive)
    for f in stored.FAMILIES
  ],
)
def test_two_updates_exported_and_loaded_give_our_image(tmp_path, one_device, family):
  import make_pipeline
  import make_qwen_pipelines
  from test_pipeline import paint

  script = make_qwen_pipelines if family in stored.QWEN else make_pipeline

  golden = stored.load()
  folder = stored.write_pipeline(golden, family, tmp_path / "pipeline")
  for split in ("train", "test"):
    (tmp_path / f"{split}.txt").write_text("\n".join(script.PROMPTS))
  fields = {
    "prompts.name": "folder",
    "prompts.path": str(tmp_path),
    "optimizer.learning_rate": 0.03,
    "ema.decay": 0.0,
    "ema.every": 1,
  }
  config = stored.make_config(family, folder, tmp_path, fields)
  loop.train(config)  # an epoch of two updates
  exported = tmp_path / "lora"
  subprocess.run(
    [sys.executable, "-m", "tpgrpo_jax.export", "--run", config.run.dir, "--output", str(exported)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
    check=True,
  )
  trained = restore.open_model(config, config.run.dir)
  saved = stored.make_config(family, folder, tmp_path, fields | {"lora.path": str(exported)})
  loaded = build.build_model(saved, one_device)
  ours, theirs = (hf.flatten(x) for x in (trained.params["trainable"], loaded.trainable))
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name])
  scale = stored.GUIDANCE[family][-1]
  found = paint(saved, one_device, list(script.PROMPTS), stored.latents(golden, family))

  import diffusers

  pipe = diffusers.DiffusionPipeline.from_pretrained(pathlib.Path(folder))
  pipe.load_lora_weights(str(exported))
  wanted = script.paint(pipe, family, stored.latents(golden, family), scale)
  assert np.abs(np.asarray(found) - wanted).max() < 2 / 255
  base = golden[f"{family}/images/{scale}"]
  assert np.abs(wanted - base).max() > 4 / 255  # the adapters are seen
