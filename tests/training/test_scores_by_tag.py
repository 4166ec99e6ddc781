"""GenEval's overall score: the mean of the tags' means, beside the mean over prompts."""

import numpy as np
import pytest

from tpgrpo_jax import rewards, types
from tpgrpo_jax.training import scoring


def reward_fn(exact):
  def make():
    info = {} if exact is None else {"exact": np.asarray(exact, np.float32)}
    return lambda images, prompts, metadata: (np.asarray([1, 0.5, 0.5, 0], np.float32), info)

  return rewards.combine.make_weighted_sum({"geneval": 1.0}, {"geneval": make}, {})


def prompts(*tags):
  return [types.Prompt(f"p{i}", {} if tag is None else {"tag": tag}) for i, tag in enumerate(tags)]


IMAGES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
  "exact, tags, overall",
  [
    ([1, 0, 0, 0], {"colors": 0.0, "counting": 1 / 3}, 1 / 6),
    (None, {"colors": 0.0, "counting": 2 / 3}, 1 / 3),
  ],
)
def test_tags_are_told_and_weigh_the_same(exact, tags, overall):
  asked = prompts("counting", "counting", "counting", "colors")
  result = scoring.evaluate_images(IMAGES, asked, reward_fn(exact))
  row = result["rewards"]["geneval"]
  assert row["tags"] == pytest.approx(tags) and row["mean_of_tags"] == pytest.approx(overall)
  assert f"mean of tags {overall:.4f}" in scoring.render_table(result)


def test_prompts_without_tags_have_no_means_of_tags():
  for asked in (prompts(None, None, None, None), prompts("a", "a", None, "b")):
    result = scoring.evaluate_images(IMAGES, asked, reward_fn(None))
    assert "tags" not in result["rewards"]["geneval"]
    assert "tag" not in scoring.render_table(result)
