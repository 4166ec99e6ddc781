"""The reward of the shapes task: reads a picture's coloured shapes and judges them by GenEval's rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Bool, Float32, UInt8
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.data import geneval, shapes
from tpgrpo_jax.rewards import geneval_rules

# Hue in degrees -> the colour that it is called; what lies between has no name.
HUES = {"red": (-22.0, 22.0), "yellow": (42.0, 72.0), "green": (90.0, 160.0), "blue": (205.0, 255.0)}
FOREGROUND = 0.4  # least brightness (the largest of R, G, B) of a pixel of a shape
_SATURATION = 0.45  # least (max - min) / max of a coloured pixel
_AGREEMENT = 0.75  # least share of a region's pixels that have its colour
_SMALLEST = 16  # pixels; what is smaller is dirt and not looked at
_LARGEST = 0.5  # of the picture; what is larger is a background
_SURE, _UNSURE = 0.86, 0.66  # overlaps with the ideal shape that count as confidence 1 and 0


def make(*, strict: bool = True) -> types.RewardFn:
  """Makes the reward for pictures of coloured shapes on a dark ground.

  Connected bright regions (scikit-image) are the objects. The moments of order 0 and 1 of a region say
  how large each kind of shape would be in its place; the kind is the one that overlaps most with the
  region, and how much it does so says how sure the reading is. The colour is the hue that three
  quarters of the pixels share. Then GenEval's rules hold (geneval_rules.evaluate).

  Source: GenEval (arXiv 2310.11513), with scikit-image in the place of Mask2Former and CLIP.

  Args:
    strict: True scores 1 where all that the metadata asks holds and 0 elsewhere, which is GenEval's
      score; False the mean over the things that are asked, in [0, 1].

  Returns:
    (images uint8 [N, H, W, 3] RGB, prompts, metadata) -> (scores float32 [N], info), where info has
    "text", what was read in each picture, and "exact" float32 [N], the strict score.

  Raises:
    ValueError: strict is neither True nor False, or, from the reward, metadata that is not GenEval's.
    ImportError: scikit-image is not installed.
  """
  if not isinstance(strict, bool):
    raise ValueError(f"strict={strict!r}: must be True or False.")
  try:
    import skimage.measure  # noqa: F401
  except ImportError as error:
    raise ImportError(
      f"the shapes reward needs a package that is not installed ({error}). "
      "Run: pip install 'tpgrpo_jax[shapes]'"
    ) from error

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    for prompt, row in zip(prompts, metadata, strict=True):
      geneval.check_metadata(prompt, row)
    found = detect(images)
    verdicts = [judge(f, row) for f, row in zip(found, metadata, strict=True)]
    exact = np.asarray([v.correct for v in verdicts], np.float32)
    scores = exact if strict else np.asarray([v.score for v in verdicts], np.float32)
    return scores, {"text": [describe(f) for f in found], "exact": exact}

  reward.check = geneval.check_metadata  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def judge(
  detections: Sequence[geneval_rules.Detection], metadata: Mapping[str, Any]
) -> geneval_rules.Verdict:
  """GenEval's verdict, with its thresholds of confidence."""
  counting = metadata.get("tag") == "counting"
  threshold = geneval_rules.COUNTING_THRESHOLD if counting else geneval_rules.THRESHOLD
  return geneval_rules.evaluate(
    geneval_rules.confident(detections, threshold=threshold), metadata
  )


def describe(detections: Sequence[geneval_rules.Detection]) -> str:
  """What was read, from left to right, such as "red circle, ? square"."""
  ordered = sorted(detections, key=lambda d: d.box[0])
  return ", ".join(f"{d.color or '?'} {d.kind}" for d in ordered)


def detect(images: UInt8[np.ndarray, "N H W 3"]) -> list[list[geneval_rules.Detection]]:
  """The shapes in each picture, with confidences above 0, in no order."""
  from skimage import measure

  count, height, width, _ = images.shape
  bright, hues = _bright(images), _color_codes(images)
  # One tall picture, with dark lines between: one call finds the regions of all of them.
  tall = np.zeros((count, height + 1, width), bool)
  tall[:, :height] = bright
  labels = measure.label(tall.reshape(-1, width), connectivity=1)
  labels = labels.reshape(tall.shape)[:, :height]
  found: list[list[geneval_rules.Detection]] = [[] for _ in range(count)]
  areas = np.bincount(labels.ravel())
  keep = np.flatnonzero((areas >= _SMALLEST) & (areas <= _LARGEST * height * width))
  keep = keep[keep > 0]
  if not keep.size:
    return found
  index = np.full(len(areas), -1)
  index[keep] = np.arange(keep.size)
  picture, row, column = np.nonzero(labels)
  region = index[labels[picture, row, column]]
  kept = region >= 0
  picture, row, column, region = (a[kept] for a in (picture, row, column, region))
  for at in np.split(np.arange(region.size)[np.argsort(region, kind="stable")],
                     np.cumsum(np.bincount(region))[:-1]):  # fmt: skip
    detection = _read(row[at], column[at], hues[picture[at], row[at], column[at]])
    if detection.confidence > 0:
      found[picture[at[0]]].append(detection)
  return found


def _bright(images) -> Bool[np.ndarray, "N H W"]:
  return images.max(axis=-1) >= FOREGROUND * 255


def _color_codes(images) -> np.ndarray:
  """int [N, H, W]: the number of a pixel's colour in HUES, from 1; 0 is none."""
  pixels = images.astype(np.float32)
  r, g, b = np.moveaxis(pixels, -1, 0)
  high, low = pixels.max(axis=-1), pixels.min(axis=-1)
  spread = np.maximum(high - low, 1e-6)
  sixth = np.where(
    high == r, (g - b) / spread, np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
  )
  hue = np.where(sixth > 5.5, sixth - 6, sixth) * 60
  codes = np.zeros(high.shape, np.int8)
  colored = high - low >= _SATURATION * np.maximum(high, 1e-6)
  for code, (least, most) in enumerate(HUES.values(), start=1):
    codes[colored & (hue >= least) & (hue <= most)] = code
  return codes


def _read(rows, columns, codes) -> geneval_rules.Detection:
  """One region's pixels [n] and their colour codes -> what it is."""
  votes = np.bincount(codes, minlength=len(HUES) + 1)
  votes[0] = 0
  best = int(votes.argmax())
  color = list(HUES)[best - 1] if votes[best] >= _AGREEMENT * codes.size else ""
  overlaps = {kind: _overlap(kind, rows, columns) for kind in shapes.CLASSES}
  kind = max(overlaps, key=lambda k: overlaps[k])
  confidence = float(np.clip((overlaps[kind] - _UNSURE) / (_SURE - _UNSURE), 0.0, 1.0))
  box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
  return geneval_rules.Detection(kind, confidence, tuple(map(float, box)), color)


def _overlap(kind, rows, columns) -> float:
  """Intersection over union of a region and the ideal shape of its area about its centroid."""
  area, drop = _IDEAL[kind]
  radius = (rows.size / area) ** 0.5
  x, y = columns.mean(), rows.mean() - drop * radius
  top, left = rows.min() - _FRAME, columns.min() - _FRAME
  down = np.arange(top, rows.max() + _FRAME + 1, dtype=np.float32)[:, None] - y
  right = np.abs(np.arange(left, columns.max() + _FRAME + 1, dtype=np.float32)[None, :] - x)
  ideal = np.clip(0.5 - shapes.DISTANCES[kind](right, down, radius), 0.0, 1.0)
  both = ideal[rows - top, columns - left].sum()
  return float(both / (rows.size + ideal.sum() - both))


_FRAME = 2  # pixels around a region in which its ideal shape may stick out
# Kind -> (its area at radius 1, how far its centroid lies below its middle, in radii).
_IDEAL = {
  "circle": (np.pi, 0.0),
  "square": (4.0, 0.0),
  "triangle": (2.0, 1 / 3),
  "cross": (4 * shapes.ARM * (2 - shapes.ARM), 0.0),
}
