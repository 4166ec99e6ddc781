"""The reader of Flow-GRPO's answers: all plain data of every protocol, and nothing else."""

import collections
import io
import os
import pickle
import struct
import time

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from tpgrpo_jax.rewards import plain_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)


def assert_same(read, written):
  assert type(read) is type(written)
  if isinstance(written, np.ndarray):
    assert read.dtype == written.dtype
    np.testing.assert_array_equal(read, written)
  elif isinstance(written, dict):
    assert list(read) == list(written)
    for key in written:
      assert_same(read[key], written[key])
  elif isinstance(written, list | tuple):
    assert len(read) == len(written)
    for a, b in zip(read, written):
      assert_same(a, b)
  else:
    assert read == written


@every_protocol
def test_answers_of_reward_servers_are_read_as_they_were_written(protocol):
  metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
  answer = {
    "outputs": [0.5, 1, np.float64(0.25), np.float32(0.1), np.int64(3), None, True, -(2**40)],
    "scores": np.linspace(0, 1, 5, dtype=np.float32),
    "other": (np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 2))),
    "prompts": np.array(["a cat", "ein Häuschen"]),
    "bytes": np.array([b"ab", b"c"]),
    "flags": np.array([True, False]),
    "big_endian": np.arange(3, dtype=">i2"),
    "images": [b"\xff\xd8jpeg", b""],
    "meta_datas": [metadata] * 3,
    "group_rewards": {"counting": [1.0, 0.0]},
  }
  assert_same(plain_pickle.loads(pickle.dumps(answer, protocol)), answer)


plain = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text()
  | st.binary(),
  lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(), each, max_size=4)
  | st.tuples(each, each),
  max_leaves=12,
)  # fmt: skip


@hypothesis.given(plain, st.sampled_from(PROTOCOLS))
def test_plain_data_is_read_as_it_was_written(value, protocol):
  assert_same(plain_pickle.loads(pickle.dumps(value, protocol)), value)


class Runs:
  """A pickle that would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (os.system, (f"touch {self.path}",))


class Plain:
  pass


@every_protocol
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, protocol):
  trap = tmp_path / "ran"
  for value in (Runs(trap), [Runs(trap)], {"outputs": [0.5, Runs(trap)]}):
    with pytest.raises(plain_pickle.Refused, match="system, which could run code"):
      plain_pickle.loads(pickle.dumps(value, protocol))
  assert not trap.exists()


@pytest.mark.parametrize(
  "value",
  [
    Plain(), {1, 2}, frozenset([1]), 1 + 2j, collections.OrderedDict(a=1), np.array([None, 1]), slice(1),
    np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]), np.datetime64("2020-01-01"), 2**70, print, int,
    {("a", "b"): 1}, {1.5: 1}, np.ma.masked_array([1]),
  ],
  ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_plain_data_is_refused(value):
  for protocol in PROTOCOLS[2:]:
    with pytest.raises(plain_pickle.Refused):
      plain_pickle.loads(pickle.dumps(value, protocol))


def within_itself():
  value = []
  value.append(value)
  return value


@pytest.mark.parametrize(
  "data, said",
  [
    (b"cos\nsystem\n(S'true'\ntR.", "os.system, which could run code"),
    (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "builtins.eval"),
    (b"cnumpy\ndtype\n.", "a name or an unfinished value"),
    (b"(cnumpy\ndtype\nt.", "a name or an unfinished value"),
    (b"](cnumpy\ndtype\nte.", ""),
    (b"cnumpy\ndtype\n(S'O8'\ntR.", "numbers and text alone"),
    (b"cnumpy\ndtype\n(S'f4,f4'\ntR.", "numbers and text alone"),
    (b"c_codecs\nencode\n(VX\nS'rot13'\ntR.", "another way"),
    (b"\x80\x02}q\x00(K\x01K\x02K\x03u.", "items of what is no dict"),
    (b"K\x01a.", ""),
    (b"a.", ""),
    (b"e.", ""),
    (b"g9\n.", "KeyError"),
    (b"(.", ""),
    (b"0.", ""),
    (b"N2.", "instruction DUP"),
    (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    (b"P1\n.", "instruction PERSID"),
    (b"i__main__\nPlain\n.", "instruction INST"),
    (b"\x82\x01.", "instruction EXT1"),
    (pickle.dumps(within_itself()), "within itself"),
    (b"", "no pickle"),
    (b"<html>503</html>", ""),
    (pickle.dumps([1, 2, 3])[:-3], "no pickle"),
    (b"I" + b"9" * 10_000 + b"\n.", ""),
    (b"\x8b" + struct.pack("<i", 1000) + b"\x7f" * 1000 + b".", "64 bits"),
  ],
)
def test_pickles_made_to_harm_are_refused(data, said):
  with pytest.raises(plain_pickle.Refused, match=said.replace(".", r"\.") or None):
    plain_pickle.loads(data)


@pytest.mark.parametrize(
  "opcode, width", [(b"X", 4), (b"B", 4), (b"T", 4), (b"\x8a", 1), (b"\x8b", 4),
    (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8)]
)  # fmt: skip
def test_lengths_beyond_the_end_are_refused_at_once(opcode, width):
  began = time.process_time()
  for length in (2 ** (8 * width - 1) - 1, 2 ** (8 * width) - 1):
    with pytest.raises(plain_pickle.Refused):
      plain_pickle.loads(opcode + length.to_bytes(width, "little") + b"abc.")
  assert time.process_time() - began < 1


def array_of_shape(shape, content=b"\0" * 8):
  """The pickle of an array that says of itself that it has this shape."""
  parts = io.BytesIO()
  parts.write(b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR")
  parts.write(b"(K\x01")
  parts.write(pickle.dumps(shape, 2)[2:-1])
  parts.write(
    b"cnumpy\ndtype\n(U\x02i8K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  )
  parts.write(b"\x89" + b"B" + struct.pack("<i", len(content)) + content + b"tb.")
  return parts.getvalue()


def test_arrays_have_exactly_the_bytes_of_their_shape():
  assert plain_pickle.loads(array_of_shape((1,))).tolist() == [0]
  for shape in [(10**9, 10**9), (2,), (-1,), (1,) * 30, (2**63 - 1,), (0, 2**62), ("a",)]:
    with pytest.raises(plain_pickle.Refused):
      plain_pickle.loads(array_of_shape(shape))


def bomb(levels, width=10, leaf=b"]"):
  """Lists of the same list, level upon level: width ** levels leaves when they are unfolded."""
  data = b"\x80\x02" + leaf + b"q\x00"
  for level in range(levels):
    data += (
      b"]("
      + b"h"
      + bytes([level])
      + (b"h" + bytes([level])) * (width - 1)
      + b"eq"
      + bytes([level + 1])
    )
  return data + b"."


def calls(arguments, times=2000):
  """One text of 1 MB, and `times` calls that each make bytes or an array of it."""
  text = b"X" + struct.pack("<i", 1_000_000) + b"a" * 1_000_000
  data = b"\x80\x02" + text + b"q\x00c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
  data += b"h\x01h\x00h\x02\x86Rq\x03"  # 3: the bytes
  data += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbq\x04"
  data += b"cnumpy.core.numeric\n_frombuffer\nq\x05J\x40\x42\x0f\x00\x85q\x06"
  data += b"cnumpy.core.multiarray\nscalar\nq\x07"
  return data + arguments * times + b"."


def test_what_calls_make_is_counted_before_it_is_made():
  few = plain_pickle.Limits(size=2_000_000)
  for arguments in (b"h\x01h\x00h\x02\x86R", b"h\x05(h\x03h\x04h\x06U\x01CtR"):
    with pytest.raises(plain_pickle.Refused, match="is cut short"):
      plain_pickle.loads(calls(arguments, 2), few)
    with pytest.raises(plain_pickle.Refused, match="makes more than 4000000 bytes"):
      plain_pickle.loads(calls(arguments, 4), few)


@every_protocol
def test_an_array_of_nearly_the_limit_is_read(protocol):
  array = np.full(10_000, 7, np.uint8)
  limits = plain_pickle.Limits(size=10_300)
  assert_same(plain_pickle.loads(pickle.dumps(array, protocol), limits), array)


@pytest.mark.parametrize(
  "shape, said",
  [
    ((1,) * 9, "9 dimensions"),
    ((2**60,) * 30_000, "30000 dimensions"),
    ((2**60,) * 8, "8 bytes for"),
  ],
)
def test_a_shape_is_looked_at_before_it_is_multiplied_out(shape, said):
  began = time.process_time()
  with pytest.raises(plain_pickle.Refused, match=said) as caught:
    plain_pickle.loads(array_of_shape(shape))
  assert len(str(caught.value)) < 500 and time.process_time() - began < 2


@pytest.mark.parametrize(
  "data",
  [
    bomb(12),
    bomb(10, leaf=b"U\xff" + b"x" * 255),
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    b"\x80\x02)" + b"\x85" * 100_000 + b".",
    b"N" * 1_000_000 + b".",
    b"(" * 1_000_000 + b".",
    b"\x80\x02]" + b"(" + b"N" * 60_000 + b"e.",
    b"\x80\x02Nq\x00" + b"0" * 10,
    calls(b"h\x01h\x00h\x02\x86R"),
    calls(b"h\x05(h\x03h\x04h\x06U\x01CtR"),
    calls(b"h\x07h\x04h\x03\x86R"),
  ],
  ids=["memo", "memo_text", "deep_lists", "deep_tuples", "many", "marks", "long_list", "pops",
    "encode", "frombuffer", "scalar"],
)  # fmt: skip
def test_bombs_are_refused_in_little_time(data):
  began = time.process_time()
  with pytest.raises(plain_pickle.Refused):
    plain_pickle.loads(data, plain_pickle.Limits(items=10_000))
  assert time.process_time() - began < 5


def test_a_large_pickle_is_refused_unread():
  with pytest.raises(plain_pickle.Refused, match="at most 10 are read"):
    plain_pickle.loads(pickle.dumps(b"x" * 20), plain_pickle.Limits(size=10))


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.data())
def test_a_spoiled_pickle_is_read_or_refused(data):
  good = pickle.dumps(
    {"outputs": [0.5, "a"], "scores": np.arange(3.0)}, data.draw(st.integers(0, 5))
  )
  spoiled = bytearray(good)
  for _ in range(data.draw(st.integers(1, 4))):
    spoiled[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
  try:
    plain_pickle.loads(bytes(spoiled))
  except plain_pickle.Refused:
    pass


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.binary(max_size=60))
def test_noise_is_read_or_refused(data):
  try:
    plain_pickle.loads(data)
  except plain_pickle.Refused:
    pass
