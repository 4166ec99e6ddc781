"""The rules against GenEval's own, written out here case by case."""

import pytest

from tpgrpo_jax.rewards import geneval_rules
from tpgrpo_jax.rewards.geneval_rules import Detection


def thing(kind, x=0.0, y=0.0, color="red", confidence=1.0):
  x, y = float(x), float(y)
  return Detection(kind, confidence, (x, y, x + 10.0, y + 10.0), color)


def verdict(detections, include, exclude=(), **options):
  found = geneval_rules.confident(detections)
  metadata = {"include": list(include), "exclude": list(exclude)}
  return geneval_rules.evaluate(found, metadata, **options)


COW, DOG = {"class": "cow", "count": 1}, {"class": "dog", "count": 1}
RED_COW = {**COW, "color": "red"}
DOG_LEFT = {**DOG, "position": ["left of", 0]}


@pytest.mark.parametrize(
  "detections, include, exclude, parts",
  [
    ([thing("cow")], [COW], (), (1,)),
    ([], [COW], (), (0,)),
    ([thing("dog")], [COW], (), (0,)),
    # More than asked for is right, unless it is excluded.
    ([thing("cow"), thing("cow", 20)], [COW], (), (1,)),
    ([thing("cow"), thing("cow", 20)], [COW], [{"class": "cow", "count": 2}], (1, 0)),
    ([thing("cow"), thing("cow", 20)], [{"class": "cow", "count": 3}], (), (2 / 3,)),
    ([thing("cow")], [RED_COW], (), (1, 1)),
    ([thing("cow", color="blue")], [RED_COW], (), (1, 0)),
    ([thing("cow", color="")], [RED_COW], (), (1, 0)),
    # Only the surest objects are asked for their colour.
    ([thing("cow", color="blue", confidence=0.9), thing("cow", 20, confidence=0.8)], [RED_COW], (), (1, 0)),
    ([thing("cow", confidence=0.9), thing("cow", 20, color="blue", confidence=0.8)], [RED_COW], (), (1, 1)),
    ([thing("cow", 30), thing("dog")], [COW, DOG_LEFT], (), (1, 1, 1)),
    ([thing("cow"), thing("dog", 30)], [COW, DOG_LEFT], (), (1, 1, 0)),
    ([thing("cow", 0, 30), thing("dog")], [COW, DOG_LEFT], (), (1, 1, 0)),
    ([thing("dog")], [COW, DOG_LEFT], (), (0, 1, 0)),
    # What a position refers to must be right itself.
    ([thing("cow", 30, color="blue"), thing("dog")], [RED_COW, DOG_LEFT], (), (1, 0, 1, 0)),
    ([thing("cow", 30)], [COW, DOG_LEFT], (), (1, 0, 0)),
    # Every object of the clause stands right of every one that it refers to.
    (
      [thing("cow", 30), thing("dog"), thing("dog", 60)],
      [COW, {"class": "dog", "count": 2, "position": ["left of", 0]}], (), (1, 1, 1 / 2),
    ),
  ],
)  # fmt: skip
def test_parts_are_those_of_the_rules(detections, include, exclude, parts):
  judged = verdict(detections, include, exclude)
  assert judged.parts == pytest.approx(parts)
  assert judged.correct == all(part == 1 for part in parts)
  assert judged.score == pytest.approx(sum(parts) / len(parts))
  assert bool(judged.reasons) != judged.correct


def test_repeating_a_clause_changes_nothing():
  detections = [thing("cow"), thing("dog", 30, color="blue")]
  assert verdict(detections, [COW, DOG]).correct == verdict(detections, [COW, DOG, COW]).correct


def test_only_confident_detections_count_the_surest_first_and_not_too_many():
  detections = [thing("cow", x, confidence=x / 100) for x in range(10, 100, 10)]
  kept = geneval_rules.confident(detections, threshold=0.3, most=4)["cow"]
  assert [d.confidence for d in kept] == [0.9, 0.8, 0.7, 0.6]
  assert "cow" not in geneval_rules.confident([thing("cow", confidence=0.3)], threshold=0.3)


def test_position_threshold_is_that_of_the_options():
  near = [thing("cow", 4.5), thing("dog")]  # 4.5 pixels away, sizes 10 and 10
  assert verdict(near, [COW, DOG_LEFT]).correct
  assert not verdict(near, [COW, DOG_LEFT], position_threshold=0.2).correct


def test_reasons_say_what_was_expected_and_found():
  judged = verdict([thing("cow", color="blue")], [RED_COW, DOG])
  assert judged.reasons == (
    "expected red cow >= 1, found blue",
    "expected dog >= 1, found 0",
  )


@pytest.mark.parametrize(
  "detections, include, parts",
  [
    ([thing("cow")], [COW], (1,)),
    ([], [COW], (0,)),
    ([thing("cow", x) for x in (0, 20, 40, 60)], [COW], (-2,)),
    ([thing("cow", x) for x in (0, 20, 40)], [{"class": "cow", "count": 2}], (1 / 2,)),
    # Where the number is wrong, colour and position are not looked at: one 0 for both.
    ([thing("cow"), thing("cow", 20)], [RED_COW], (0, 0)),
    ([thing("dog"), thing("dog", 20), thing("cow", 40)], [COW, {**DOG_LEFT, "color": "red"}], (1, 0, 0)),
    ([thing("cow"), thing("cow", 20, color="blue")], [{**RED_COW, "count": 2}], (1, 1 / 2)),
    ([thing("cow", 30), thing("dog")], [COW, DOG_LEFT], (1, 1, 1)),
    ([thing("cow"), thing("dog", 30)], [COW, DOG_LEFT], (1, 1, 0, 1)),
    # No target: it has another colour, or is not there.
    ([thing("cow", 30, color="blue"), thing("dog")], [RED_COW, DOG_LEFT], (1, 0, 1, 0)),
    ([thing("dog")], [COW, DOG_LEFT], (0, 1, 0)),
    # A wrong colour of its own ends the clause before its position.
    ([thing("cow", 30), thing("dog", color="blue")], [COW, {**DOG_LEFT, "color": "red"}], (1, 1, 0)),
  ],
)  # fmt: skip
def test_parts_of_flow_grpo_are_those_of_its_reward_server(detections, include, parts):
  found = geneval_rules.confident(detections)
  # What is excluded does not count: the number must be right anyway.
  metadata = {"include": include, "exclude": [{"class": "cow", "count": 1}]}
  judged = geneval_rules.evaluate_as_flow_grpo(found, metadata)
  assert judged.parts == pytest.approx(parts)
  assert judged.correct == all(part == 1 for part in parts) == (not judged.reasons)
