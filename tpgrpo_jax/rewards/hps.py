"""Human Preference Score v2.1 (arXiv 2306.09341): CLIP-H, trained on what people preferred."""

from collections.abc import Callable
import html
import os

from tpgrpo_jax import types, version
from tpgrpo_jax.models.hf import clip as hf_clip
from tpgrpo_jax.models.hf import files, open_clip
from tpgrpo_jax.rewards import preprocess, towers

CONVERT = """
The public file, HPS_v2.1_compressed.pt of xswu/HPSv2, is a pickle. Convert it once, where torch and
safetensors are installed, with these lines of Python:
  import torch, safetensors.torch
  weights = torch.load("HPS_v2.1_compressed.pt", map_location="cpu", weights_only=True)["state_dict"]
  weights = {k: v.clone().contiguous() for k, v in weights.items()}
  safetensors.torch.save_file(weights, "model.safetensors")
and put model.safetensors into a folder, with the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""


def make(
  *,
  path: str | os.PathLike[str],
  tokenizer: str | os.PathLike[str] = "",
  dtype: str = "float32",
  batch: int = towers.BATCH,
  placement: types.Placement | None = None,
) -> types.DeviceRewardFn:
  """Makes the reward cos(image, prompt), about 0.2 to 0.4.

  Source: HPSv2's code, img_score.py, which computes it in float16 on a GPU. The whole image is seen, on
  black margins. Prompts are cleaned as open_clip's tokenizer does; their ids are then those of CLIP's
  own. (It fills up with 0 instead of the end token: no text token sees those behind it, so nothing
  changes.)

  Args:
    path: folder or hub id of safetensors with open_clip's names of a ViT-H-14 (the public file, converted, or
      HPSv2/ of DiffSynth-Studio/ImageMetrics), or with transformers' names and its config.json.
    tokenizer: folder or hub id of the tokenizer, laion/CLIP-ViT-H-14-laion2B-s32B-b79K; "" for path's own.
    dtype: float32 or bfloat16, of the weights and of the towers.
    batch: images at once on each device.
    placement: where weights and prompts go; None for the default device.

  Raises:
    ValueError: an option out of its range, or a folder that does not hold what it should; where it has
      no safetensors, how to convert the public file.
    ImportError: ftfy is not installed.
  """
  towers.check_options(dtype, batch)
  clean = _load_clean()
  folder = towers.open_folder(path, convert=CONVERT)
  towers.check_safetensors(path, folder, convert=CONVERT)
  kw = dict(dtype=towers.DTYPES[dtype], shardings=None if placement is None else placement.params)
  file = open_clip.find_weights(folder)
  if open_clip.is_open_clip(files.find_tensors(folder, file=file, field="path")):
    encoder = open_clip.load_clip(folder, file=file, **kw)
  else:
    encoder = hf_clip.load_clip(folder, **kw)
  tokenize = towers.load_tokenize(
    "hpsv2", folder, tokenizer, encoder.config.text,
    hint="HPSv2's is laion/CLIP-ViT-H-14-laion2B-s32B-b79K", clean=clean,
  )  # fmt: skip
  return towers.make_text_image_reward(
    encoder,
    tokenize,
    preprocess.hps_pixels,
    lambda cos, scale: cos,
    batch=batch,
    placement=placement,
  )


def _load_clean() -> Callable[[str], str]:
  """What open_clip's tokenizer does before CLIP's: mends mojibake, straightens quotes, reads HTML."""
  try:
    import ftfy
  except ImportError as error:
    raise ImportError(
      f"the hpsv2 reward cleans prompts with ftfy, which is not installed ({error}). "
      f"Run: {version.install('hps')}"
    ) from error
  return lambda prompt: html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
