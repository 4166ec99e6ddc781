"""The built-in task's words and their pictures: what to write, and what it should look like.

A word is 3 or 4 characters of an alphabet that an OCR model cannot confuse; its picture is white on
black, every character in its own cell. Which split a word belongs to is a property of the word
itself, so whatever draws training words (pretraining, RL) can never meet a test word.
"""

from collections.abc import Sequence
import functools
import zlib

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpgrpo_jax import registry

# Left out: I 1, O 0 Q, B 8, S 5, Z 2, G 6, which look alike, F, which PP-OCR confuses with E, and
# W, the one letter wider than a cell: neighbours touch and VW is read as WV.
ALPHABET = "ACDEHJKLMNPRTUVXY3479"
LONGEST = 4  # characters; the cell width follows from it
LENGTHS = (3, 4)
HEIGHT, WIDTH = 24, 48  # pixels
SPLITS = ("train", "test")
_TEST_SHARE = 10  # one word in so many is a test word
_JITTER = 1  # pixels in each direction, which is the margin that the cells leave


def split_of(word: str) -> str:
  """The split ("train" or "test") that `word` belongs to, for ever: a hash of its characters."""
  return "test" if zlib.crc32(word.encode()) % _TEST_SHARE == 0 else "train"


def sample_words(
  rng: np.random.Generator,
  count: int,
  *,
  lengths: Sequence[int] = LENGTHS,
  split: str = "train",
) -> list[str]:
  """Draws `count` words of one split independently, so that a word may come up twice.

  Args:
    rng: source of randomness; the words are a function of its state.
    count: how many words.
    lengths: numbers of characters, each equally likely.
    split: "train" or "test".

  Raises:
    ValueError: an unknown split, or a length outside 1 ... LONGEST.
  """
  _check_draw(lengths, split)
  words = []
  while len(words) < count:
    batch = 16 + (count - len(words)) * (_TEST_SHARE if split == "test" else 1) * 5 // 4
    letters = rng.integers(len(ALPHABET), size=(batch, LONGEST))
    sizes = rng.choice(np.asarray(lengths), size=batch)
    drawn = ("".join(ALPHABET[i] for i in row[:n]) for row, n in zip(letters.tolist(), sizes))
    words += [word for word in drawn if split_of(word) == split]
  return words[:count]


def sample_distinct_words(
  rng: np.random.Generator,
  count: int,
  *,
  lengths: Sequence[int] = LENGTHS,
  split: str = "train",
) -> list[str]:
  """Draws `count` words of one split, no two the same; arguments as of `sample_words`.

  Short words run out first, so a large draw holds more long ones than short ones.

  Raises:
    ValueError: as `sample_words`, or more words asked for than there are with room to draw them.
  """
  _check_draw(lengths, split)
  share = 1 / _TEST_SHARE if split == "test" else 1 - 1 / _TEST_SHARE
  # Half of what exists: rejection is quick up to there, and the hash's split is only roughly even.
  most = int(share * sum(len(ALPHABET) ** n for n in set(lengths)) / 2)
  if count > most:
    raise ValueError(
      f"count={count}: at most {most} distinct {split} words of lengths {tuple(lengths)} can be "
      "drawn. Ask for fewer words, or add a longer length."
    )
  words = {}
  while len(words) < count:
    words.update(dict.fromkeys(sample_words(rng, count, lengths=lengths, split=split)))
  return list(words)[:count]


def render(
  words: Sequence[str],
  rng: np.random.Generator | None = None,
  *,
  height: int = HEIGHT,
  width: int = WIDTH,
) -> UInt8[np.ndarray, "words height width"]:
  """Paints every word in white on black, centred, one character a cell.

  Args:
    words: N words over ALPHABET of at most LONGEST characters.
    rng: moves each word by up to one pixel in both directions; None keeps it in the centre.
    height: of a picture, in pixels; a multiple of 8.
    width: of a picture, in pixels; a multiple of 8.

  Returns:
    [N, height, width].

  Raises:
    ValueError: a word that is empty, too long or not over ALPHABET, or a size that is not a
      positive multiple of 8.
  """
  glyphs, cell = _glyphs(height, width)
  for word in words:
    if not 0 < len(word) <= LONGEST or not glyphs.keys() >= set(word):
      raise ValueError(
        f"word={word!r}: must be 1 to {LONGEST} characters of {ALPHABET}. Change the word."
      )
  shifts = np.zeros((len(words), 2), int)
  if rng is not None:
    shifts = rng.integers(-_JITTER, _JITTER + 1, size=shifts.shape)
  pictures = np.zeros((len(words), height, width), np.uint8)
  for picture, word, (down, right) in zip(pictures, words, shifts.tolist()):
    # Cells carry a margin above and below, so a vertical shift is a choice of rows.
    rows = slice(_JITTER - down, _JITTER - down + height)
    left = (width - cell * len(word)) // 2 + right
    picture[:, left : left + cell * len(word)] = np.hstack([glyphs[c][rows] for c in word])
  return pictures


def _check_draw(lengths, split):
  if split not in SPLITS:
    raise ValueError(f"split={split!r}: unknown name.{registry.nearest(split, SPLITS)}")
  if not lengths or not all(1 <= n <= LONGEST for n in lengths):
    raise ValueError(
      f"lengths={tuple(lengths)!r}: must be one or more of 1 ... {LONGEST}, what fits a picture. "
      f"Use lengths={LENGTHS}."
    )


@functools.lru_cache
def _glyphs(height, width):
  """({character: uint8 [height + 2 jitter, cell]}, cell); drawn once, as Pillow is slow at text."""
  if height < 8 or width < 16 or height % 8 or width % 8:
    raise ValueError(
      f"height={height}, width={width}: must be multiples of 8, at least 8 x 16 pixels. "
      f"Use height={HEIGHT}, width={WIDTH}."
    )
  cell = (width - 2 * _JITTER) // LONGEST
  # The widest letter of Pillow's built-in font fills a cell at this size; few rows stay empty.
  font = ImageFont.load_default(size=min(round(1.45 * cell), height * 5 // 6))
  top, bottom = font.getbbox("H", anchor="ls")[1::2]
  baseline = (height - top - bottom) // 2 + _JITTER
  glyphs = {}
  for character in ALPHABET:
    image = Image.new("L", (cell, height + 2 * _JITTER))
    ImageDraw.Draw(image).text((cell // 2, baseline), character, font=font, fill=255, anchor="ms")
    glyphs[character] = np.asarray(image)
  return glyphs, cell
