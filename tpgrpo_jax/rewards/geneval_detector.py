"""GenEval's detector in torch: transformers' Mask2Former, from pictures to classes, boxes and masks."""

from collections.abc import Callable, Mapping
import json
import os
import pathlib
import threading
from typing import Any

from jaxtyping import UInt8
import numpy as np

from tpgrpo_jax import version
from tpgrpo_jax.data import geneval
from tpgrpo_jax.models.hf import files
from tpgrpo_jax.rewards import geneval_rules, towers

PUBLIC = "facebook/mask2former-swin-small-coco-instance"
_LONGEST = 1333 / 800  # longest edge of what the detector sees, to its shortest edge

# How label sets call what GenEval calls otherwise: COCO's own names, and VOC's, which
# coco-detection-mmdet-id2label.json has.
_ALIASES = {
  "mouse": "computer mouse",
  "remote": "tv remote",
  "keyboard": "computer keyboard",
  "motorbike": "motorcycle",
  "aeroplane": "airplane",
  "sofa": "couch",
  "pottedplant": "potted plant",
  "diningtable": "dining table",
  "tvmonitor": "tv",
}

DetectFn = Callable[[np.ndarray], list[list[geneval_rules.Detection]]]
"""images uint8 [N, H, W, 3] -> of each what was found, with masks, in no order."""


def open_folder(path: str | os.PathLike[str], *, field: str, kind: str, hint: str) -> pathlib.Path:
  """The local folder of a model of one kind, fetched where `path` is a hub id.

  Args:
    path: a folder, or a hub id "owner/name".
    field: the option that holds it, for messages.
    kind: the model_type that its config.json must have.
    hint: which public model would do.

  Raises:
    ValueError: no such folder, or another model's.
  """
  folder = towers.open_folder(path, field=field, convert="")
  where = f"{field}={str(path)!r}"
  if not (folder / files.CONFIG_FILE).is_file():
    raise ValueError(f"{where}: has no {files.CONFIG_FILE}. Give a folder of the hub, as {hint}.")
  found = files.read_json(folder / files.CONFIG_FILE).get("model_type")
  if found != kind:
    raise ValueError(f"{where}: holds a {found!r} model, must be {kind!r}, as {hint}.")
  files.find_tensors(folder, field=field)  # says what is wrong with the weights before torch starts
  return folder


def read_labels(folder: pathlib.Path, *, field: str = "detector") -> dict[int, str]:
  """The number of a class -> GenEval's name of it.

  Raises:
    ValueError: a label set in which one of COCO's 80 names is not.
  """
  labels = files.read_json(folder / files.CONFIG_FILE).get("id2label")
  labels = labels if isinstance(labels, Mapping) else {}
  named = {int(number): _name(str(label)) for number, label in labels.items()}
  absent = [name for name in geneval.CLASSES if name not in named.values()]
  if absent:
    raise ValueError(
      f"{field}={str(folder)!r}: its id2label has not all of COCO's 80 names; {', '.join(absent[:5])} "
      f"{'is' if len(absent) == 1 else 'are'} not there{' (and more)' * (len(absent) > 5)}. Give an "
      f"instance segmentation of COCO, as {PUBLIC}."
    )
  return named


def _name(label: str) -> str:
  label = label.strip().lower()
  return _ALIASES.get(label) or label


def import_torch() -> Any:
  """The torch module.

  Raises:
    ImportError: it is not installed.
  """
  try:
    import torch  # pyright: ignore[reportMissingImports]

    return torch
  except ImportError as error:
    raise ImportError(
      f"the geneval reward needs a package that is not installed ({error}). "
      f"Run: {version.install('geneval')}"
    ) from error


def open_device(name: str) -> str:
  """The name of torch's device; "auto" is a GPU where there is one.

  Raises:
    ValueError: a device that torch does not have here.
  """
  torch = import_torch()
  if name == "auto":
    return "cuda" if torch.cuda.is_available() else "cpu"
  try:
    torch.empty(1, device=name)
  except (RuntimeError, AssertionError, TypeError) as error:
    reason = str(error).splitlines()[0][:200]
    raise ValueError(
      f'device={name!r}: torch cannot use it ({reason}). Set "auto", "cpu", or "cuda:0" where torch '
      "has a GPU."
    ) from error
  return name


def load_weights(model_class: Any, folder: pathlib.Path, device: str, *, field: str) -> Any:
  """A model of transformers in float32, from safetensors alone, ready to be asked.

  Raises:
    ValueError: weights that are not all there or have other shapes.
  """
  torch = import_torch()
  where = f"{field}={str(folder)!r}"
  try:
    model, report = model_class.from_pretrained(
      folder,
      local_files_only=True,
      use_safetensors=True,
      output_loading_info=True,
      dtype=torch.float32,
    )
  except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
    reason = str(error).strip().splitlines()[0][:300]
    raise ValueError(f"{where}: cannot be loaded ({reason}). Fetch it again.") from error
  absent = sorted(map(str, report["missing_keys"]))
  if absent:  # transformers would draw them at random
    raise ValueError(
      f"{where}: lacks {len(absent)} weights, such as {', '.join(absent[:3])}. Fetch it again, whole."
    )
  return model.to(device).eval()


def load_detector(
  folder: pathlib.Path, *, device: str, size: int, batch: int, least: float
) -> DetectFn:
  """Loads a Mask2Former.

  A detection's confidence is the probability of its class times the mean probability of its mask's
  pixels; its box is that of its mask. Masks are enlarged to what the model saw, then brought to the size of
  the picture, then cut at 1/2, all bilinearly, as mmdetection does in the public evaluator. Where what
  the model saw and the picture have 384 x 384 pixels, that is post_process_instance_segmentation of
  transformers, which always goes by way of 384 x 384.

  Args:
    folder: of `open_folder`.
    device: of torch.
    size: the shortest edge of what the model sees; 0 is what the folder's preprocessor_config.json says.
    batch: pictures at once.
    least: what is found with no more confidence is left out.

  Raises:
    ValueError: a folder with other labels, or without its weights or preprocessor.
  """
  torch = import_torch()
  import transformers

  labels = read_labels(folder)
  edges = {"shortest_edge": size, "longest_edge": round(size * _LONGEST)}
  try:
    prepare = transformers.AutoImageProcessor.from_pretrained(
      folder, local_files_only=True, **({"size": edges} if size else {})
    )
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f"detector={str(folder)!r}: has no preprocessor_config.json that can be read "
      f"({str(error).splitlines()[0][:200]}). Fetch the folder again, whole."
    ) from error
  model = load_weights(
    transformers.Mask2FormerForUniversalSegmentation, folder, device, field="detector"
  )
  turn = threading.Lock()  # so that the requests of a server do not fill the GPU together

  def detect(images: UInt8[np.ndarray, "N H W 3"]) -> list[list[geneval_rules.Detection]]:
    found = []
    for first in range(0, len(images), batch):
      inputs = prepare(
        list(images[first : first + batch]), return_tensors="pt", input_data_format="channels_last"
      )
      with turn, torch.inference_mode():
        outputs = model(**inputs.to(device), output_auxiliary_logits=False)
        seen, whole = _inside(inputs["pixel_mask"][0]), tuple(inputs["pixel_values"].shape[-2:])
        for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits):
          sizes = (whole, seen, images.shape[1:3])
          found.append(_instances(classes, masks, sizes, labels, least))
    return found

  return detect


def _inside(pixel_mask) -> tuple[int, int]:
  """(height, width) of what is no padding."""
  return int(pixel_mask.any(1).sum()), int(pixel_mask.any(0).sum())


def _instances(class_logits, mask_logits, sizes, labels, least) -> list[geneval_rules.Detection]:
  """What was found in one picture.

  Args:
    class_logits: [Q, C + 1] of the queries; the last class is none.
    mask_logits: [Q, h, w].
    sizes: (of what the model saw, of that without padding, of the picture), each (height, width).
    labels: of `read_labels`.
    least: as of `load_detector`.
  """
  from torch.nn import functional  # pyright: ignore[reportMissingImports]

  whole, seen, shape = sizes
  scores = class_logits.softmax(-1)[:, :-1]
  classes = scores.shape[1]
  scores, order = scores.flatten().topk(min(len(class_logits), scores.numel()))
  able = scores > least  # a mask's mean is at most 1, so that none of the others can be kept
  scores, order = scores[able], order[able]
  if not len(order):
    return []
  resize = functional.interpolate
  masks = mask_logits[order // classes][None]
  masks = resize(masks, size=whole, mode="bilinear", align_corners=False)
  masks = masks[..., : seen[0], : seen[1]]
  masks = resize(masks, size=tuple(shape), mode="bilinear", align_corners=False)[0]
  inside = masks > 0
  mean = (masks.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
  kept = (scores * mean > least) & inside.any(2).any(1)
  confidences, inside = (scores * mean)[kept].tolist(), inside[kept].cpu().numpy()
  kinds = (order % classes)[kept].tolist()
  return [
    geneval_rules.Detection(labels[kind], confidence, _box(mask), "", mask)
    for kind, confidence, mask in zip(kinds, confidences, inside, strict=True)
    if kind in labels
  ]


def _box(mask) -> geneval.Box:
  """The box around a mask that is not empty."""
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
  return float(left), float(top), float(right), float(bottom)
