"""The reward of the shapes task: reads a picture's coloured shapes and judges them by GenEval's rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import types, version
from tpgrpo_jax.data import geneval, shapes
from tpgrpo_jax.rewards import geneval_rules

# Hue in degrees -> the colour that it is called; what lies between has no name.
HUES = {
  "red": (-25.0, 25.0),
  "yellow": (38.0, 75.0),
  "green": (90.0, 165.0),
  "blue": (200.0, 260.0),
}
FOREGROUND = 0.4  # least brightness (the largest of R, G, B) of a pixel of a shape
_SATURATION = 0.45  # least (max - min) / max of a coloured pixel
_AGREEMENT = 0.75  # least share of a region's pixels that have the colour of its mean
_SMALLEST = 24  # pixels; what is smaller is dirt and not looked at
_LARGEST = 0.5  # of the picture; what is larger is a background
_LONGEST = 1.4  # most length to width, of standard deviations; a triangle has 1.15
_STEEPER = 1.5  # edges, before the comparison
_SURE, _UNSURE = 0.8, 0.7  # overlaps with the ideal shape that count as confidence 1 and 0


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
    ValueError: strict is neither True nor False, or, from the reward, metadata that is not GenEval's
      or names other shapes and colours.
    ImportError: scikit-image is not installed.
  """
  if not isinstance(strict, bool):
    raise ValueError(f"strict={strict!r}: must be True or False.")
  try:
    import skimage.measure  # noqa: F401
  except ImportError as error:
    raise ImportError(
      f"the shapes reward needs a package that is not installed ({error}). "
      f"Run: {version.install('shapes')}"
    ) from error

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    for prompt, row in zip(prompts, metadata, strict=True):
      check(prompt, row)
    found = detect(images)
    verdicts = [judge(f, row) for f, row in zip(found, metadata, strict=True)]
    exact = np.asarray([v.correct for v in verdicts], np.float32)
    scores = exact if strict else np.asarray([v.score for v in verdicts], np.float32)
    return scores, {"text": [describe(f) for f in found], "exact": exact}

  reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
  # No matrix products and no convolutions.
  reward.flops = lambda height, width: 0.0  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def check(prompt: str, metadata: Mapping[str, Any]) -> None:
  """Raises ValueError where a prompt's metadata has another form than GenEval's, or names another shape."""
  geneval.check_metadata(prompt, metadata)
  geneval.check_names(prompt, metadata, classes=shapes.CLASSES, colors=shapes.COLORS)


def judge(
  detections: Sequence[geneval_rules.Detection], metadata: Mapping[str, Any]
) -> geneval_rules.Verdict:
  """GenEval's verdict, with its thresholds of confidence."""
  counting = metadata.get("tag") == "counting"
  threshold = geneval_rules.COUNTING_THRESHOLD if counting else geneval_rules.THRESHOLD
  return geneval_rules.evaluate(geneval_rules.confident(detections, threshold=threshold), metadata)


def describe(detections: Sequence[geneval_rules.Detection]) -> str:
  """What was read, from left to right, such as "red circle, ? square"."""
  ordered = sorted(detections, key=lambda d: d.box[0])
  return ", ".join(f"{d.color or '?'} {d.kind}" for d in ordered)


def detect(images: UInt8[np.ndarray, "N H W 3"]) -> list[list[geneval_rules.Detection]]:
  """The shapes in each picture, with confidences above 0, in no order."""
  from scipy import ndimage
  from skimage import measure

  count, height, width, _ = images.shape
  # One tall picture, with a dark frame around each: one call finds the regions of all of them.
  tall = np.zeros((count, height + 2, width + 2, 3), np.float32)
  tall[:, 1:-1, 1:-1] = images / np.float32(255)
  tall = tall.reshape(-1, width + 2, 3)
  labels = np.asarray(measure.label(tall.max(axis=-1) >= FOREGROUND, connectivity=1))
  areas = np.bincount(labels.ravel())
  kept = (areas >= _SMALLEST) & (areas <= _LARGEST * height * width)
  kept[0] = False
  found: list[list[geneval_rules.Detection]] = [[] for _ in range(count)]
  for label, place in enumerate(ndimage.find_objects(np.where(kept[labels], labels, 0)), start=1):
    if place is not None:
      window = tuple(slice(s.start - 1, s.stop + 1) for s in place)
      detection = _read(labels[window], label, tall[window])
      if detection.confidence > 0:
        picture, top = divmod(window[0].start, height + 2)
        found[picture].append(_shifted(detection, window[1].start, top))
  return found


def _read(labels, label, image) -> geneval_rules.Detection:
  """What one region is, of [h, w] labels and [h, w, 3] RGB in [0, 1] with one pixel around it."""
  own = labels == label
  inside = image[own]
  value = image.max(axis=-1)
  # Pixels at the edge are in part the shape's: those around the region, as far as no other has them.
  near = own.copy()
  near[1:] |= own[:-1]
  near[:-1] |= own[1:]
  near[:, 1:] |= own[:, :-1]
  near[:, :-1] |= own[:, 1:]
  near &= own | (labels == 0)
  full = np.sort(inside.max(axis=-1))[len(inside) * 3 // 4]
  # Steeper than they are, edges are much the same whether a picture is sharp or soft.
  share = np.clip(_STEEPER * (value / full - 0.5) + 0.5, 0.0, 1.0) * near
  overlaps = _overlaps(share)
  kind = max(overlaps, key=lambda k: overlaps[k])
  confidence = float(np.clip((overlaps[kind] - _UNSURE) / (_SURE - _UNSURE), 0.0, 1.0))
  rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
  left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
  box = (float(left), float(top), float(right), float(bottom))
  return geneval_rules.Detection(kind, confidence, box, _color(inside))


def _shifted(detection, left, top):
  """With its box in the picture, whose frame is one pixel wide."""
  a, b, c, d = detection.box
  left, top = left - 1, top - 1
  return detection._replace(box=(a + left, b + top, c + left, d + top))


def _color(pixels) -> str:
  """The colour [n, 3] of a region: the hue of the mean, if most pixels have it; "" for none."""
  names = _color_codes(np.concatenate([pixels.mean(axis=0, keepdims=True), pixels]))
  agree = np.mean(names[1:] == names[0])
  return ("", *HUES)[names[0]] if agree >= _AGREEMENT else ""


def _color_codes(pixels) -> np.ndarray:
  """int [n]: the number of a pixel's colour in HUES, from 1; 0 is none."""
  r, g, b = pixels.T
  high, low = pixels.max(axis=-1), pixels.min(axis=-1)
  spread = np.maximum(high - low, 1e-6)
  sixth = np.where(
    high == r, (g - b) / spread, np.where(high == g, 2 + (b - r) / spread, 4 + (r - g) / spread)
  )
  codes = np.zeros(len(pixels), int)
  colored = high - low >= _SATURATION * high
  for code, (least, most) in enumerate(HUES.values(), start=1):
    codes[colored & (sixth * 60 >= least) & (sixth * 60 <= most)] = code
  return codes


def _overlaps(share) -> dict[str, float]:
  """Kind -> intersection over union of a region with the ideal shape of its area and centroid.

  All are 0 where the moments of order 2 say that the region is much longer than wide.

  Args:
    share: [h, w], how much of each pixel is the region's.
  """
  rows, columns = (np.arange(n, dtype=np.float32) for n in share.shape)
  area = share.sum()
  across, along = share.sum(axis=0) / area, share.sum(axis=1) / area
  x, y = across @ columns, along @ rows
  columns, rows = columns - x, rows - y
  spread_x, spread_y = across @ columns**2, along @ rows**2
  covariance = rows @ share @ columns / area
  mean, half = (spread_x + spread_y) / 2, np.hypot((spread_x - spread_y) / 2, covariance)
  if mean + half > _LONGEST**2 * (mean - half):
    return dict.fromkeys(_IDEAL, 0.0)
  right = np.abs(columns)[None, :]
  found = {}
  for kind, (unit_area, drop) in _IDEAL.items():
    radius = (area / unit_area) ** 0.5
    distance = shapes.DISTANCES[kind](right, (rows + drop * radius)[:, None], radius)
    both = np.minimum(np.clip(0.5 - _STEEPER * distance, 0.0, 1.0), share).sum()
    found[kind] = float(both / (2 * area - both))  # what sticks out of the window counts too
  return found


def _of_parts(*parts):
  """(area, how far the centroid lies below the middle) of rectangles (area, centre); a hole's area is < 0."""
  area = sum(size for size, _ in parts)
  return area, sum(size * below for size, below in parts) / area


_HALF, _DEPTH = shapes.NOTCH
_BAR, _STEM = 2 * (shapes.BAR + 1), 2 * shapes.ARM * (1 - shapes.BAR)
# Kind -> (its area at radius 1, how far its centroid lies below its middle, in radii).
_IDEAL = {
  "circle": (np.pi, 0.0),
  "square": (4.0, 0.0),
  "triangle": (2.0, 1 / 3),
  "cross": (4 * shapes.ARM * (2 - shapes.ARM), 0.0),
  "cup": _of_parts((4.0, 0.0), (-2 * _HALF * (1 + _DEPTH), (_DEPTH - 1) / 2)),
  "tee": _of_parts((_BAR, (shapes.BAR - 1) / 2), (_STEM, (shapes.BAR + 1) / 2)),
}
