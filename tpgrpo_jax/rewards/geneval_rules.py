"""GenEval's rules on what a detector found: pure functions, whatever the detector is.

Source: evaluate of GenEval's evaluate_images.py (arXiv 2310.11513). "include" clauses must all hold, of
"exclude" clauses none may. Colour and position are asked of a clause's most confident objects alone, as
many as the clause counts, so what else of that class is in the picture does not matter to them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tpgrpo_jax.data import geneval

THRESHOLD = 0.3  # least confidence of a detection
COUNTING_THRESHOLD = 0.9  # likewise, where the tag is "counting"


class Detection(NamedTuple):
  """An object that was found.

  Attributes:
    kind: its class.
    confidence: in [0, 1].
    box: (left, top, right, bottom) in pixels.
    color: what it is called, "" where it is none that has a name.
    mask: bool [H, W], its pixels in the picture; None where nobody needs them.
  """

  kind: str
  confidence: float
  box: geneval.Box
  color: str
  mask: np.ndarray | None = None


class Verdict(NamedTuple):
  """What the rules say.

  Attributes:
    correct: whether everything holds, which is GenEval's score.
    parts: one number, at most 1, for each thing that is asked. All are 1 where `correct`.
    reasons: what does not hold, in words.
  """

  correct: bool
  parts: tuple[float, ...]
  reasons: tuple[str, ...]

  @property
  def score(self) -> float:
    """The mean of the parts."""
    return sum(self.parts) / len(self.parts)


def confident(
  detections: Sequence[Detection], *, threshold: float = THRESHOLD, most: int = geneval.MAX_OBJECTS
) -> dict[str, list[Detection]]:
  """Class -> its detections above a confidence, surest first, at most so many."""
  found: dict[str, list[Detection]] = {}
  for detection in sorted(detections, key=lambda d: -d.confidence):
    if detection.confidence > threshold and len(found.get(detection.kind, ())) < most:
      found.setdefault(detection.kind, []).append(detection)
  return found


def evaluate(
  found: Mapping[str, Sequence[Detection]],
  metadata: Mapping[str, Any],
  *,
  position_threshold: float = geneval.POSITION_THRESHOLD,
) -> Verdict:
  """Judges a picture by GenEval's rules.

  The parts lie in [0, 1]: of an "include" clause the objects found, then those of the right colour, then
  the pairs that stand right, as shares of those wanted; of an "exclude" clause 1 or 0.

  Args:
    found: class -> detections, surest first, as `confident` gives them.
    metadata: with "include" and perhaps "exclude", checked by geneval.check_metadata.
    position_threshold: of geneval.relations.
  """
  parts, reasons = [], []
  # What fulfils each clause so far, None where nothing does.
  groups: list[Sequence[Detection] | None] = []
  for clause in metadata["include"]:
    objects = list(found.get(clause["class"], ()))[: clause["count"]]
    shares = [_count(objects, clause)]
    if "color" in clause:
      shares.append(_color(objects, clause))
    if "position" in clause:
      shares.append(_position(objects, clause, groups, position_threshold))
    parts += [share for share, _ in shares]
    reasons += [reason for share, reason in shares if share < 1]
    groups.append(objects if all(share == 1 for share, _ in shares) else None)
  for clause in metadata.get("exclude", ()):
    count = len(found.get(clause["class"], ()))
    parts.append(float(count < clause["count"]))
    if count >= clause["count"]:
      reasons.append(_expected(clause, "<", count))
  return Verdict(not reasons, tuple(parts), tuple(reasons))


def evaluate_as_flow_grpo(
  found: Mapping[str, Sequence[Detection]],
  metadata: Mapping[str, Any],
  *,
  position_threshold: float = geneval.POSITION_THRESHOLD,
) -> Verdict:
  """Judges a picture as Flow-GRPO does in training: as many objects as are asked for, and no more.

  A clause gives 1 - |wanted - found| / wanted, which is negative beyond twice as many. Where the number
  is right its colour gives the share of right ones, and where that is right too its position 1 for right,
  0 for no target, and the two parts 0 and 1 for wrong (their code adds the 1 either way). Where the
  number is wrong colour and position together give 0. "exclude" clauses do not count.

  Source: evaluate_reward of reward_server/gen_eval.py of github.com/yifan123/reward-server.

  Args:
    found: as of `evaluate`.
    metadata: likewise.
    position_threshold: likewise.
  """
  parts, reasons = [], []
  groups: list[Sequence[Detection] | None] = []
  for clause in metadata["include"]:
    objects, count = list(found.get(clause["class"], ())), clause["count"]
    shares = [(1 - abs(count - len(objects)) / count, _expected(clause, "==", len(objects)))]
    matched = len(objects) == count
    if not matched and clause.keys() & {"color", "position"}:
      shares.append((0.0, ""))
    if matched and "color" in clause:
      shares.append(_color(objects, clause))
      matched = shares[-1][0] == 1
    if matched and "position" in clause:
      share, reason = _position(objects, clause, groups, position_threshold)
      matched = share == 1
      judged_wrong = not matched and groups[clause["position"][1]] is not None
      shares += [(float(matched), reason), *([(1.0, "")] if judged_wrong else [])]
    parts += [share for share, _ in shares]
    reasons += [reason for share, reason in shares if share < 1 and reason]
    groups.append(objects if matched else None)
  return Verdict(not reasons, tuple(parts), tuple(reasons))


def _expected(clause, relation, found):
  return f"expected {clause['class']} {relation} {clause['count']}, found {found}"


def _count(objects, clause):
  return len(objects) / clause["count"], _expected(clause, ">=", len(objects))


def _color(objects, clause):
  right = sum(d.color == clause["color"] for d in objects)
  named = ", ".join(d.color or "none" for d in objects) or "nothing"
  wanted = f"{clause['color']} {clause['class']} >= {clause['count']}"
  return right / clause["count"], f"expected {wanted}, found {named}"


def _position(objects, clause, groups, threshold):
  """A share of all pairs of this clause's objects and those it refers to; these must be right first."""
  name, target = clause["position"]
  others = groups[target]
  if others is None or not objects:
    return 0.0, f"no target for {clause['class']} to be {name}"
  pairs = [(a.box, b.box) for a in objects for b in others]
  right = sum(name in geneval.relations(a, b, threshold=threshold) for a, b in pairs)
  share = right / len(pairs) * len(objects) / clause["count"]
  return share, f"expected {clause['class']} {name} target, found {right} of {len(pairs)} pairs so"
