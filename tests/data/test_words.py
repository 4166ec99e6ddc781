import numpy as np
from PIL import Image, ImageDraw, ImageFont
import pytest

from tpgrpo_jax.data import words


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_train_and_test_words_never_overlap(rng):
  train = words.sample_words(rng, 5000, lengths=(2,), split="train")
  test = words.sample_words(rng, 5000, lengths=(2,), split="test")
  assert not set(train) & set(test)


def test_both_splits_together_hold_every_word(rng):
  draws = [words.sample_words(rng, 5000, lengths=(2,), split=s) for s in words.SPLITS]
  assert len(set().union(*draws)) == len(words.ALPHABET) ** 2


def test_split_of_a_word_is_fixed_for_ever():
  # A change would put words that published models were trained on into the test split.
  assert [words.split_of(w) for w in ("ACDE", "HJK", "E3U7", "3UPJ")] == [
      "train", "train", "test", "train",
  ]  # fmt: skip


def test_about_one_word_in_ten_is_a_test_word():
  letters = words.ALPHABET
  splits = [words.split_of(a + b + c) for a in letters for b in letters for c in letters]
  # 9261 words: a standard deviation of a fair draw is 0.3 %.
  assert splits.count("test") / len(splits) == pytest.approx(0.1, abs=0.01)


def test_words_have_the_lengths_asked_for(rng):
  assert {len(w) for w in words.sample_words(rng, 200, lengths=(1, 3))} == {1, 3}


def test_same_seed_draws_the_same_words():
  first, second = (words.sample_words(np.random.default_rng(7), 50) for _ in range(2))
  assert first == second


def test_distinct_words_are_distinct_and_as_many_as_asked(rng):
  assert len(set(words.sample_distinct_words(rng, 1024, split="test"))) == 1024


def test_more_distinct_words_than_can_be_drawn_are_refused(rng):
  with pytest.raises(ValueError, match=r"count=100: at most .* lengths \(1,\)"):
    words.sample_distinct_words(rng, 100, lengths=(1,))


def test_unknown_split_is_refused_with_the_nearest_name(rng):
  with pytest.raises(ValueError, match="split='tran'.*Did you mean 'train'"):
    words.sample_words(rng, 1, split="tran")


@pytest.mark.parametrize("lengths", [(), (0,), (3, 5)])
def test_lengths_that_do_not_fit_a_picture_are_refused(rng, lengths):
  with pytest.raises(ValueError, match="lengths="):
    words.sample_words(rng, 1, lengths=lengths)


def test_pictures_are_uint8_of_the_size_asked_for():
  pictures = words.render(["ACD", "4"], height=32, width=64)
  assert (pictures.shape, pictures.dtype) == ((2, 32, 64), np.uint8)


def test_without_a_generator_equal_words_give_equal_pictures():
  first, second = words.render(["KXM", "KXM"])
  np.testing.assert_array_equal(first, second)


def test_distinct_words_give_distinct_pictures():
  drawn = words.sample_distinct_words(np.random.default_rng(0), 300)
  assert len({picture.tobytes() for picture in words.render(drawn)}) == 300


def test_jitter_moves_the_word_and_changes_nothing_else(rng):
  still = words.render(["MMMM"])[0]
  moved = {p.tobytes() for p in words.render(["MMMM"] * 300, rng)}
  # No ink lies on the border, so that rolling is moving.
  expected = {
    np.roll(still, (down, right), (0, 1)).tobytes() for down in (-1, 0, 1) for right in (-1, 0, 1)
  }
  assert moved == expected


def test_words_are_centred_to_a_pixel():
  for picture in words.render(["HHH", "HHHH"]):
    for axis in (0, 1):
      inked = np.flatnonzero(picture.max(axis=axis) > 64)
      before, after = inked[0], picture.shape[1 - axis] - 1 - inked[-1]
      assert abs(before - after) <= 2


@pytest.mark.parametrize("character", words.ALPHABET)
def test_no_character_is_cut_off_by_its_cell(character):
  roomy = Image.new("L", (60, 60))
  font = ImageFont.load_default(size=16)  # what cells of 11 pixels lead to
  ImageDraw.Draw(roomy).text((30, 40), character, font=font, fill=255, anchor="ms")
  assert words.render([character]).sum() == np.asarray(roomy).sum()


@pytest.mark.parametrize("word", ["", "ACDEH", "AB", "acd", "A C"])
def test_words_that_cannot_be_painted_are_refused(word):
  with pytest.raises(ValueError, match="word="):
    words.render([word])


@pytest.mark.parametrize("size", [(20, 48), (24, 50), (0, 48), (24, 8)])
def test_sizes_that_are_no_multiple_of_8_are_refused(size):
  with pytest.raises(ValueError, match="height=.*multiples of 8"):
    words.render(["ACD"], height=size[0], width=size[1])


def test_ocr_reads_the_rendered_words(rng):
  pytest.importorskip("rapidocr")
  pytest.importorskip("onnxruntime")
  from tpgrpo_jax.rewards import ocr

  drawn = words.sample_words(rng, 200)
  pictures = np.repeat(words.render(drawn, rng)[..., None], 3, axis=-1)
  _, info = ocr.make()(pictures, drawn, [{}] * len(drawn))
  # Measured: 0.999 of 1024 words; three misreadings in 200 would be far outside of that.
  assert info["exact"].mean() >= 0.99
