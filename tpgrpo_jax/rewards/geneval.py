"""GenEval: whether a picture shows the objects, colours and places that its prompt asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import registry, types
from tpgrpo_jax.data import geneval
from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.rewards import geneval_colors, geneval_detector, geneval_rules

Found = dict[str, list[geneval_rules.Detection]]


class Verdicts(NamedTuple):
  """What both sets of rules say of one picture."""

  own: geneval_rules.Verdict
  flow_grpo: geneval_rules.Verdict


RULES: dict[str, Callable[[Verdicts], float]] = {
  "strict": lambda verdicts: float(verdicts.own.correct),
  "graded": lambda verdicts: verdicts.own.score,
  "flow_grpo": lambda verdicts: verdicts.flow_grpo.score,
}
"""Name -> the score of a picture."""


def make(
  *,
  detector: str,
  classifier: str,
  rule: str = "strict",
  device: str = "auto",
  size: int = 800,
  batch: int = 8,
  threshold: float = geneval_rules.THRESHOLD,
  counting_threshold: float = geneval_rules.COUNTING_THRESHOLD,
  position_threshold: float = geneval.POSITION_THRESHOLD,
  canary: str = "person",
) -> types.RewardFn:
  """Makes the reward, whose models are torch's: serve it, so that torch is in a process of its own.

  A Mask2Former finds the objects, a CLIP names the colours of those whose colour is asked for, and
  GenEval's rules judge (geneval_rules). What is asked stands in the prompt's metadata.

  Source: GenEval (arXiv 2310.11513), evaluate_images.py.

  Args:
    detector: folder or hub id of a Mask2Former for instance segmentation with COCO's classes, such as
      geneval_detector.PUBLIC.
    classifier: folder or hub id of a CLIP with its tokenizer, such as geneval_colors.PUBLIC.
    rule: a name of RULES. "strict" is 1 where all that is asked holds and 0 elsewhere, GenEval's score;
      "graded" the mean over the things that are asked, in [0, 1]; "flow_grpo" what Flow-GRPO trains on
      (geneval_rules.evaluate_as_flow_grpo), at most 1 and below 0 for many objects too many.
    device: of torch; "auto" is a GPU where there is one.
    size: the shortest edge of what the detector sees: the public evaluator's 800; 0 is what the folder's
      preprocessor_config.json says.
    batch: pictures that the detector sees at once.
    threshold: least confidence of an object.
    counting_threshold: likewise, where the tag is "counting".
    position_threshold: of geneval.relations.
    canary: a name of canary.CANARIES or a folder; "" for none, as weights that are not trained need it.

  Returns:
    (images uint8 [N, H, W, 3] RGB, prompts, metadata) -> (scores float32 [N], info), where info has
    "text", what was found and what is wrong, "exact" float32 [N], GenEval's score, and "strict" float32
    [N], 1 where Flow-GRPO's rules find nothing wrong.

  Raises:
    ValueError: an option out of its range; a folder of another model, of other classes, or without all of
      its weights; or, from the reward, metadata that is not GenEval's.
    ImportError: torch is not installed.
  """
  registry.check(rule, RULES, field="rule")
  _check_numbers(size, batch)
  thresholds = {"threshold": threshold, "counting_threshold": counting_threshold}
  _check_shares(thresholds | {"position_threshold": position_threshold})
  pair = canary_lib.load(canary) if canary else None
  folders = [
    geneval_detector.open_folder(path, field=field, kind=kind, hint=hint)
    for path, field, kind, hint in (
      (detector, "detector", "mask2former", geneval_detector.PUBLIC),
      (classifier, "classifier", "clip", geneval_colors.PUBLIC),
    )
  ]
  geneval_detector.read_labels(folders[0])
  device = geneval_detector.open_device(device)
  detect = geneval_detector.load_detector(
    folders[0], device=device, size=size, batch=batch, least=min(thresholds.values())
  )
  name = geneval_colors.load_namer(folders[1], device=device)

  def check(prompt: str, metadata: Mapping[str, Any]) -> None:
    geneval.check_metadata(prompt, metadata)
    geneval.check_names(prompt, metadata)

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    for prompt, row in zip(prompts, metadata, strict=True):
      check(prompt, row)
    found = [
      geneval_rules.confident(
        each, threshold=counting_threshold if row.get("tag") == "counting" else threshold
      )
      for each, row in zip(detect(images), metadata, strict=True)
    ]
    name_colors(name, images, found, metadata)
    verdicts = [judge(f, row, position_threshold) for f, row in zip(found, metadata, strict=True)]
    scores = np.asarray([RULES[rule](v) for v in verdicts], np.float32)
    return scores, {
      "text": [describe(f, v.own) for f, v in zip(found, verdicts)],
      "exact": np.asarray([v.own.correct for v in verdicts], np.float32),
      "strict": np.asarray([v.flow_grpo.correct for v in verdicts], np.float32),
    }

  reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
  if pair is not None:
    reward.canary = pair  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def judge(found: Found, metadata: Mapping[str, Any], position_threshold: float) -> Verdicts:
  """Both verdicts on what was found in one picture."""
  rules = (geneval_rules.evaluate, geneval_rules.evaluate_as_flow_grpo)
  return Verdicts(*(r(found, metadata, position_threshold=position_threshold) for r in rules))


def name_colors(
  name: geneval_colors.NameFn,
  images: UInt8[np.ndarray, "N H W 3"],
  found: Sequence[Found],
  metadata: Sequence[Mapping[str, Any]],
) -> None:
  """Gives the objects whose colour is asked for their colours, in place, those of all pictures at once."""
  places, crops = [], []
  for image, objects, row in zip(images, found, metadata, strict=True):
    for kind, count in _colored(row).items():
      for i, detection in enumerate(objects.get(kind, ())[:count]):
        places.append((objects[kind], i))
        crops.append(geneval_colors.Crop(geneval_colors.cut_out(image, detection), kind))
  for (objects, i), color in zip(places, name(crops), strict=True):
    objects[i] = objects[i]._replace(color=color)


def _colored(metadata) -> dict[str, int]:
  """Class -> how many of its objects have a colour that is asked for."""
  counts: dict[str, int] = {}
  for clause in metadata["include"]:
    if "color" in clause:
      counts[clause["class"]] = max(clause["count"], counts.get(clause["class"], 0))
  return counts


def describe(found: Found, verdict: geneval_rules.Verdict) -> str:
  """Such as "red car 0.98, dog 0.91 (expected dog >= 2, found 1)"."""
  objects = sorted((d for each in found.values() for d in each), key=lambda d: -d.confidence)
  said = ", ".join(f"{d.color} {d.kind} {d.confidence:.2f}".strip() for d in objects) or "nothing"
  return f"{said} ({'; '.join(verdict.reasons)})" if verdict.reasons else said


def _check_numbers(size, batch):
  if type(size) is not int or size < 0:
    raise ValueError(f"size={size!r}: must be an integer >= 0. 800 is the public evaluator's.")
  if type(batch) is not int or batch < 1:
    raise ValueError(f"batch={batch!r}: must be an integer >= 1. 8 is the default.")


def _check_shares(shares):
  for name, value in shares.items():
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 1.0:
      raise ValueError(f"{name}={value!r}: must be in [0, 1). Leave it out for GenEval's own.")
