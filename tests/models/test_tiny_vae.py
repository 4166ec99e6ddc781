"""The small decoder computes what diffusers' AutoencoderTiny computes, and paints completions alone."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.models import hf, tiny_vae, vae
from tpgrpo_jax.training import pipeline

SIZES = {
  "latent_channels": 4, "decoder_block_out_channels": [8, 8, 8], "num_decoder_blocks": [2, 1, 1],
}  # fmt: skip
LATENTS = (2, 3, 5, 4)
TOLERANCE = 1e-5


def write_folder(folder, **changes):
  """A folder as diffusers writes it, with random weights; encoder tensors are in it, which nobody reads."""
  content = (
    {"_class_name": "AutoencoderTiny", "act_fn": "relu", "force_upcast": False} | SIZES | changes
  )
  sizes = tiny_vae.TinyVAEConfig.from_diffusers(content)
  _, abstract = pipeline.decoder_outline(config_lib.Vae(), sizes)
  rng = np.random.default_rng(0)
  shapes = {path: leaf.shape for path, leaf in hf.flatten(abstract).items()}
  tensors = {
    entry.name: rng.normal(
      0, np.prod(entry.shape[1:]) ** -0.5 if len(entry.shape) > 1 else 0.3, entry.shape
    )
    for entry in hf.names(sizes, shapes)
  }
  tensors["encoder.layers.0.weight"] = np.zeros((8, 3, 3, 3))
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(content))
  tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
  save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
  return tensors


def painted(folder, latents, chunk=8):
  sizes = hf.load_config(folder)
  decode, abstract = pipeline.decoder_outline(config_lib.Vae(images_per_chunk=chunk), sizes)
  return np.asarray(jax.jit(decode)(hf.load_params(folder, abstract), jnp.asarray(latents)))


def naive(tensors, x):
  """The decoder, one output pixel after the other; x [N, h, w, c]."""

  def conv(name, x):
    kernel = tensors[f"{name}.weight"]  # [d_out, d_in, 3, 3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((*x.shape[:3], len(kernel)))
    for i, j in np.ndindex(*x.shape[1:3]):
      y[:, i, j] = np.einsum("nhwc,dchw->nd", padded[:, i : i + 3, j : j + 3], kernel)
    return y + tensors.get(f"{name}.bias", 0)

  relu = functools.partial(np.maximum, 0)
  # convolution, relu, 2 blocks, double, convolution, block, double, convolution, block, convolution
  x = relu(conv("decoder.layers.0", np.tanh(x / 3) * 3))
  for layer, kind in enumerate("BBDCBDCBC", 2):
    name = f"decoder.layers.{layer}"
    if kind == "B":
      y = relu(conv(f"{name}.conv.0", x))
      x = relu(x + conv(f"{name}.conv.4", relu(conv(f"{name}.conv.2", y))))
    else:
      x = x.repeat(2, 1).repeat(2, 2) if kind == "D" else conv(name, x)
  return np.clip(x, 0, 1)


def test_pictures_are_those_of_one_pixel_after_the_other(tmp_path):
  tensors = write_folder(tmp_path / "tiny")
  latents = np.random.default_rng(1).normal(0, 2, LATENTS).astype(np.float32)
  found = painted(tmp_path / "tiny", latents)
  wanted = naive(tensors, latents)
  assert found.shape == (2, 12, 20, 3) and 0.05 < wanted.std()
  np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
  np.testing.assert_allclose(painted(tmp_path / "tiny", latents, chunk=1), wanted, atol=TOLERANCE)


def test_scaled_latents_are_unscaled_as_the_file_says(tmp_path):
  tensors = write_folder(tmp_path / "tiny", scaling_factor=2.0, shift_factor=0.5)
  latents = np.random.default_rng(1).normal(0, 2, LATENTS).astype(np.float32)
  found = painted(tmp_path / "tiny", latents)
  np.testing.assert_allclose(found, naive(tensors, latents / 2 + 0.5), atol=TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize(
  "changes", [{}, {"latent_channels": 16, "num_decoder_blocks": [3, 3, 3, 1]}]
)
def test_pictures_are_those_of_diffusers(tmp_path, changes):
  import diffusers
  import torch

  torch.manual_seed(0)
  blocks = (SIZES | changes)["num_decoder_blocks"]
  widths = dict.fromkeys(
    ("encoder_block_out_channels", "decoder_block_out_channels"), (8,) * len(blocks)
  )
  sizes = {"num_encoder_blocks": blocks[::-1], "num_decoder_blocks": blocks} | widths
  channels = (SIZES | changes)["latent_channels"]
  theirs = diffusers.AutoencoderTiny(latent_channels=channels, **sizes).eval()
  theirs.save_pretrained(tmp_path)
  x = np.random.default_rng(1).normal(0, 2, (*LATENTS[:3], channels)).astype(np.float32)
  with torch.no_grad():
    wanted = theirs.decode(torch.from_numpy(x.transpose(0, 3, 1, 2))).sample.numpy()
  wanted = np.clip(wanted.transpose(0, 2, 3, 1) * 0.5 + 0.5, 0, 1)
  np.testing.assert_allclose(painted(tmp_path, x), wanted, atol=1e-5)


@pytest.mark.parametrize(
  "changes, part",
  [
    ({"act_fn": "gelu"}, "act_fn='gelu': must be 'relu'"),
    ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4: must be 2"),
    ({"num_decoder_blocks": [1, 1]}, "num_decoder_blocks=(1, 1): must be one number for each"),
    ({"num_decoder_blocks": [1, 0, 1]}, "num_decoder_blocks=(1, 0, 1): must be at least 1 each"),
    (
      {"decoder_block_out_channels": [8, 4, 8]},
      "must be one number of at least 1, again and again",
    ),
    ({"depth": 3}, "depth: not fields of AutoencoderTiny"),
  ],
)
def test_files_of_another_kind_are_named(tmp_path, changes, part):
  write_folder(tmp_path)
  content = json.loads((tmp_path / "config.json").read_text()) | changes
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(ValueError) as error:
    hf.load_config(tmp_path)
  assert part in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize(
  "small, part",
  [
    (vae.VAEConfig(), "holds a AutoencoderKL, must be an AutoencoderTiny"),
    (
      tiny_vae.TinyVAEConfig(),
      "latents with 4, 8 pixels each; the pipeline's autoencoder makes 3 of 16, 8",
    ),
    (
      tiny_vae.TinyVAEConfig(latent_channels=16, out_channels=4),
      "makes 4 channels of latents with 16, 8",
    ),
  ],
)
def test_a_decoder_of_other_latents_is_refused(small, part):
  sizes = types.SimpleNamespace(scaled_channels=16, downscale=8)
  with pytest.raises(ValueError) as error:
    pipeline.check_completion_decoder("folder", small, sizes)
  assert "completion.decoder='folder'" in str(error.value) and part in str(error.value)
  fitting = tiny_vae.TinyVAEConfig(latent_channels=16)
  pipeline.check_completion_decoder("folder", fitting, sizes)
