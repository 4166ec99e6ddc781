"""GenEval's colours in torch: CLIP names the colour of an object by what surrounds it being painted grey."""

from collections.abc import Callable, Sequence
import pathlib
import threading
from typing import Any, NamedTuple

from jaxtyping import Float32, UInt8
import numpy as np
from PIL import Image

from tpgrpo_jax.data import geneval
from tpgrpo_jax.models.hf import tokenizer as hf_tokenizer
from tpgrpo_jax.rewards import geneval_detector, geneval_rules

PUBLIC = "openai/clip-vit-large-patch14"
GREY = 0x99  # of what is not the object: the evaluator's "#999"
TEMPLATES = (
  "a photo of a {color} {kind}",
  "a photo of a {color}-colored {kind}",
  "a photo of a {color} object",
)
_BATCH = 64  # crops at once
_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32)


class Crop(NamedTuple):
  """An object to be named.

  Attributes:
    picture: uint8 [h, w, 3], its box of the picture, grey outside its mask.
    kind: its class.
  """

  picture: np.ndarray
  kind: str


NameFn = Callable[[Sequence[Crop]], list[str]]
"""objects -> a name of geneval.COLORS for each."""


def cut_out(
  image: UInt8[np.ndarray, "H W 3"], detection: geneval_rules.Detection
) -> UInt8[np.ndarray, "h w 3"]:
  """The box of a detection, grey where its mask is not."""
  left, top, right, bottom = map(round, detection.box)
  part = image[top:bottom, left:right]
  if detection.mask is None:
    return part.copy()
  inside = detection.mask[top:bottom, left:right, None]
  return np.where(inside, part, np.uint8(GREY))


def pixels(picture: UInt8[np.ndarray, "h w 3"], side: int) -> Float32[np.ndarray, "3 s s"]:
  """What CLIP's tower reads: the shorter edge resized to `side`, the middle square, normalised.

  As torchvision's Resize (bicubic, of Pillow) and CenterCrop, which open_clip's transform is.
  """
  height, width = picture.shape[:2]
  wide = side if width <= height else int(side * width / height)
  high = side if height <= width else int(side * height / width)
  resized = Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC)
  left, top = round((wide - side) / 2), round((high - side) / 2)
  square = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
  return ((square / 255 - _MEAN) / _STD).transpose(2, 0, 1)


def load_namer(folder: pathlib.Path, *, device: str) -> NameFn:
  """Loads a CLIP that names colours.

  The name is the colour whose sentences are nearest: the mean of the normalised embeddings of TEMPLATES,
  normalised, by its cosine with the picture's embedding.

  Source: color_classification of GenEval's evaluate_images.py, and clip_benchmark's zero-shot classifier.

  Args:
    folder: of `geneval_detector.open_folder`.
    device: of torch.

  Raises:
    ValueError: a folder without its weights or tokenizer.
  """
  torch = geneval_detector.import_torch()
  import transformers

  if not hf_tokenizer.has_tokenizer("clip", folder):
    raise ValueError(
      f"classifier={str(folder)!r}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt). "
      f"Copy the files of {PUBLIC} there."
    )
  tokenize = hf_tokenizer.load_tokenizer("clip", folder)
  model = geneval_detector.load_weights(transformers.CLIPModel, folder, device, field="classifier")
  side = model.config.vision_config.image_size
  length = model.config.text_config.max_position_embeddings
  classifiers: dict[str, Any] = {}
  turn = threading.Lock()

  def classifier(kind):
    """[colours, E] of a class."""
    if kind not in classifiers:
      texts = [t.format(color=c, kind=kind) for c in geneval.COLORS for t in TEMPLATES]
      ids = tokenize(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
      )
      found = model.text_projection(model.text_model(**ids.to(device)).pooler_output)
      found = _normalized(found).reshape(len(geneval.COLORS), len(TEMPLATES), -1).mean(1)
      classifiers[kind] = _normalized(found)
    return classifiers[kind]

  def name(crops: Sequence[Crop]) -> list[str]:
    names = []
    for first in range(0, len(crops), _BATCH):
      part = crops[first : first + _BATCH]
      batch = torch.from_numpy(np.stack([pixels(crop.picture, side) for crop in part]))
      with turn, torch.inference_mode():
        found = model.visual_projection(model.vision_model(batch.to(device)).pooler_output)
        against = torch.stack([classifier(crop.kind) for crop in part])
        cosines = (against * _normalized(found)[:, None]).sum(-1)
        names += [geneval.COLORS[i] for i in cosines.argmax(-1).tolist()]
    return names

  return name


def _normalized(x):
  return x / x.norm(dim=-1, keepdim=True)
