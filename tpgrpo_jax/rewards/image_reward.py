"""ImageReward (arXiv 2304.05977): BLIP looks at the picture with the prompt in mind, and a head judges."""

import os

from flax import nnx
import jax.numpy as jnp

from tpgrpo_jax import types
from tpgrpo_jax.models.hf import blip as hf_blip
from tpgrpo_jax.models.hf import files, open_clip
from tpgrpo_jax.rewards import aesthetic, preprocess, towers

LENGTH = 35  # tokens of a prompt
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores, over the authors' own data
PAD = 0  # [PAD]
CONVERT = """
The public file, ImageReward.pt of THUDM/ImageReward, is a pickle. Convert it once, where torch and
safetensors are installed, with these lines of Python:
  import torch, safetensors.torch
  weights = torch.load("ImageReward.pt", map_location="cpu", weights_only=True)
  weights = {k: v.clone().contiguous() for k, v in weights.items()}
  safetensors.torch.save_file(weights, "model.safetensors")
and put model.safetensors into a folder, with the tokenizer of google-bert/bert-base-uncased."""


def make(
  *,
  path: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] = "",
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward (head(first token) - mean) / std, about -2 to 2.

  Source: THUDM/ImageReward, ImageReward.py. Prompts are cut after 35 tokens. The head is linear layers of
  widths 1024, 128, 64, 16, 1 with nothing between.

  Args:
    path: folder or hub id of safetensors with the names of ImageReward.pt, or with transformers' names of
      BLIP, as in DiffSynth-Studio/ImageMetrics; no config.json is needed.
    tokenizer: folder or hub id of the tokenizer, google-bert/bert-base-uncased; "" for path's own.
    dtype: float32 or bfloat16, of the towers and their weights; the head is float32 always.
    batch: images at once on each device.
    placement: where weights and prompts go; None for the default device.

  Raises:
    ValueError: an option out of its range, or a folder that does not hold what it should; where it has
      no safetensors, how to convert the public file.
  """
  towers.check_options(dtype, batch)
  folder = towers.open_folder(path, convert=CONVERT)
  towers.check_safetensors(path, folder, convert=CONVERT)
  kw = dict(dtype=towers.DTYPES[dtype], shardings=None if placement is None else placement.params)
  file = open_clip.find_weights(folder)
  encoder = hf_blip.load_blip(folder, file=file, **kw)
  head = aesthetic.read_head(
    f"path={str(path)!r}",
    files.find_tensors(folder, file=file, field="path"),
    kw["shardings"],
    bare=lambda name: hf_blip.bare(name).removeprefix("mlp."),
  )
  config, reads = encoder.config, head["layers"]["0"]["kernel"].shape[0]
  if reads != config.text.hidden_size:
    raise ValueError(
      f"path={str(path)!r}: its head reads {reads} numbers, and its text tower gives "
      f"{config.text.hidden_size}. Fetch it again."
    )
  tokenize = towers.load_tokenize(
    "image_reward", folder, tokenizer, config.text,
    hint="ImageReward's is google-bert/bert-base-uncased", kind="bert", length=LENGTH,
  )  # fmt: skip

  def score(weights, images, ids):
    model = nnx.merge(encoder.graphdef, weights["towers"])
    pixels = preprocess.torchvision_pixels(images, size=config.vision.image_size)
    token = model(ids, ids != PAD, pixels).astype(jnp.float32)
    return (aesthetic.apply_head(weights["head"], token) - MEAN) / STD

  weights = {"towers": encoder.weights, "head": head}
  return towers.make_reward(
    score, weights, lambda prompts: (tokenize(prompts),), batch=batch, placement=placement
  )
