"""What goes over the network: every bit arrives, and what does not fit is refused with a reason."""

import base64
import io
import json
import pickle

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.rewards import flow_grpo_wire, jpeg, ocr, wire

PICTURES = hnp.arrays(
  np.uint8,
  hnp.array_shapes(min_dims=2, max_dims=2, min_side=8, max_side=12).map(lambda s: (*s, 3)),
  fill=st.integers(0, 255),
)


def png(image):
  return wire.encode_image(np.asarray(image, np.uint8))


@pytest.mark.parametrize("multipart", [False, True])
@hypothesis.given(st.lists(st.tuples(PICTURES, st.text()), min_size=1, max_size=5))
def test_a_request_arrives_as_it_was_sent(multipart, sent):
  sent = [(image, prompt) for image, prompt in sent if image.shape == sent[0][0].shape]
  images = np.stack([image for image, _ in sent])
  prompts = [prompt for _, prompt in sent]
  metadata = [{"index": i, "text": p, "nested": [{"a": None}]} for i, p in enumerate(prompts)]
  body, kind = wire.encode_request(images, prompts, metadata, multipart=multipart)
  (batch,) = wire.decode_request(body, kind, wire.Limits())
  np.testing.assert_array_equal(batch.images, images)
  assert (batch.prompts, batch.metadata, batch.rows) == (prompts, metadata, list(range(len(sent))))


def test_a_form_is_smaller_than_json():
  images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
  json_body, form = (
    wire.encode_request(images, ["p"] * 4, [{}] * 4, multipart=multipart)[0]
    for multipart in (False, True)
  )
  assert len(form) < 0.77 * len(json_body)


def test_pictures_of_several_sizes_are_told_apart_and_keep_their_places():
  sizes = [(8, 9), (10, 10), (8, 9)]
  pictures = [png(np.full((*size, 3), i)) for i, size in enumerate(sizes)]
  batches = wire.make_batches(pictures, ["a", "b", "c"], None, wire.Limits())
  assert [batch.rows for batch in batches] == [[0, 2], [1]]
  assert batches[0].prompts == ["a", "c"] and batches[0].images[:, 0, 0, 0].tolist() == [0, 2]


@hypothesis.given(
  st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8)
)
def test_scores_and_infos_come_back_bit_for_bit(values):
  scores = np.asarray(values, np.float32)
  info = {"text": [str(v) for v in values], "exact": scores, "count": np.arange(len(values))}
  read, read_info = wire.decode_answer(wire.encode_answer(scores, info), len(values))
  np.testing.assert_array_equal(read.astype(np.float32), scores)
  assert read_info["text"] == info["text"]
  for name in ("exact", "count"):
    assert read_info[name].dtype == info[name].dtype
    np.testing.assert_array_equal(read_info[name], info[name])


@pytest.mark.parametrize("score", ["1" + "0" * 400, "-1" + "0" * 400, "NaN", "1e999", "1" * 5000])
def test_a_score_that_no_float_holds_is_said_in_a_line(score):
  with pytest.raises(wire.Bad, match="^(the score|what is no JSON)") as caught:
    wire.decode_answer(b'{"rewards": [%s]}' % score.encode(), 1)
  assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
  "value, dtype", [("NaN", "int32"), ("1099511627776", "int32"), ("1" + "0" * 400, "float32"),
    ("1" + "0" * 400, "int64"), ("Infinity", "int64"), ('"a"', "int32"), ("1", '["int32"]'), ("1", "O8")]
)  # fmt: skip
def test_an_info_that_its_dtype_does_not_hold_stays_a_list(value, dtype):
  dtype = dtype if dtype.startswith("[") else f'"{dtype}"'
  body = f'{{"rewards": [1], "info": {{"x": {{"values": [{value}], "dtype": {dtype}}}}}}}'
  (kept,) = wire.decode_answer(body.encode(), 1)[1].values()
  assert isinstance(kept, list) and str(kept) == str(json.loads(f"[{value}]"))


def test_what_of_an_info_json_cannot_hold_stays_behind():
  info = {"object": [object()], "nan": [float("nan")], "long": [1, 2], "other": 3, "kept": ["a"]}
  _, read = wire.decode_answer(wire.encode_answer(np.ones(1, np.float32), info), 1)
  assert read == {"kept": ["a"]}


def test_metadata_of_numpy_are_sent_as_plain_numbers():
  body, kind = wire.encode_request(
    np.zeros((1, 8, 8, 3), np.uint8),
    ["p"],
    [{"n": np.int64(3), "a": np.arange(2)}],
    multipart=False,
  )
  assert wire.decode_request(body, kind, wire.Limits())[0].metadata == [{"n": 3, "a": [0, 1]}]
  with pytest.raises(ValueError, match="metadata of the prompts: cannot be sent as JSON.*set"):
    wire.encode_request(np.zeros((1, 1, 1, 3), np.uint8), ["p"], [{"n": {1}}], multipart=False)


IMAGE = base64.b64encode(png(np.zeros((8, 8, 3)))).decode()
SMALL = wire.Limits(body=10_000, images=3, pixels=100, all_pixels=150, text=50)


def request(**fields):
  return json.dumps({"prompt": ["p"], "image": [IMAGE], "metadata": [{}]} | fields).encode()


def big(width, height):
  buffer = io.BytesIO()
  Image.new("RGB", (width, height)).save(buffer, format="PNG")
  return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
  "body, status, said",
  [
    (b"", 400, "no JSON"), (b"{", 400, "no JSON"), (b"[1]", 422, "must be a JSON object"),
    (b"\xff\xfe", 400, "no JSON"), (b"[" * 9_000, 400, "no JSON.*Recursion"),
    (request(prompt="p"), 422, "list of texts"), (request(prompt=[1]), 422, "list of texts"),
    (request(image="x"), 422, "list of base64"), (request(image=[3]), 422, "list of base64"),
    (request(image=["%%"]), 422, "no base64"), (request(image=["AAAA"]), 422, "no PNG or JPEG"),
    (request(image=[]), 422, "0 images"), (request(image=[IMAGE] * 4), 413, "4 images: must be 1 to 3"),
    (request(image=[IMAGE] * 2), 422, "2 images, 1 prompts, 1 metadata"),
    (request(metadata={}), 422, "list of objects"), (request(metadata=[1]), 422, "list of objects"),
    (request(prompt=["p" * 51]), 413, "51 characters"), (request(metadata=[{"a": "x" * 60}]), 413, "62 char"),
    (request(image=[big(11, 10)]), 413, "11 x 10"),
    (request(image=[big(7, 8)]), 422, "7 x 8: the shorter side must have 8 pixels or more"),
    (request(image=[big(1, 100)]), 422, "1 x 100: the shorter side"),
    (request(image=[big(9, 9)] * 2, prompt=["p"] * 2, metadata=None), 413, "only 69 more pixels"),
    (request(metadata=[eval("[" * 150 + "]" * 150)]), 422, "list of objects"),
    (request(x=[0] * 1_000_001), 413, "more than 1000000 values"),
  ],
)  # fmt: skip
def test_requests_that_cannot_be_scored_are_refused_with_the_reason(body, status, said):
  with pytest.raises(wire.BadRequest, match=said) as caught:
    wire.decode_request(body, wire.JSON, SMALL)
  assert caught.value.status == status


def test_formats_of_pictures_that_nobody_needs_are_not_read():
  for format in ("GIF", "TIFF", "WEBP", "BMP", "PPM"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format=format)
    with pytest.raises(wire.BadRequest, match="no PNG or JPEG"):
      wire.decode_image(buffer.getvalue(), 100)


def test_a_picture_that_is_narrow_is_refused_before_a_reward_enlarges_it():
  for width, height, read in (
    (8, 128, True),
    (8, 129, False),
    (20_000, 1, False),
    (2000, 100, False),
  ):
    data = base64.b64decode(big(width, height))
    if read:
      assert wire.decode_image(data, 10**6).shape == (height, width, 3)
      continue
    with pytest.raises(wire.BadRequest, match="at most 16 times as many") as caught:
      wire.decode_image(data, 10**6)
    assert caught.value.status == 422


def test_transparent_grey_and_indexed_pictures_become_rgb():
  for mode in ("RGBA", "L", "P", "1", "I;16"):
    buffer = io.BytesIO()
    Image.new(mode, (9, 8)).save(buffer, format="PNG")
    assert wire.decode_image(buffer.getvalue(), 100).shape == (8, 9, 3)


@pytest.mark.parametrize(
  "body, kind",
  [
    (b"", "multipart/form-data"), (b"--x\r\n", "multipart/form-data; boundary=x"),
    (b"--x--\r\n", "multipart/form-data; boundary=x"), (b"junk", "multipart/form-data; boundary=x"),
    (b"--x\r\nContent-Disposition: form-data; name=\"request\"\r\n\r\n{}\r\n--x--\r\n",
     "multipart/form-data; boundary=x"),
    (b"--x\r\n\r\n{}\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    (b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\n\r\n--x--", "multipart/form-data; boundary=x"),
  ],
)  # fmt: skip
def test_forms_that_are_none_are_refused(body, kind):
  with pytest.raises(wire.BadRequest):
    wire.decode_request(body, kind, wire.Limits())


def test_canaries_of_the_librarys_rewards_hold():
  for name, make in {
    "jpeg_compressibility": jpeg.make_compressibility, "jpeg_incompressibility": jpeg.make_incompressibility,
    "ocr": ocr.make,
  }.items():  # fmt: skip
    pair, reward = canary_lib.CANARIES[name](), make()
    assert canary_lib.problem(lambda *batch, reward=reward: reward(*batch)[0], pair) == ""
    swapped = pair._replace(better=pair.worse, worse=pair.better)
    assert "must score higher" in canary_lib.problem(
      lambda *batch, reward=reward: reward(*batch)[0], swapped
    )


def test_a_canary_is_not_fooled_by_scores_that_are_none():
  for scores in ([1.0], [np.nan, 0.0], [0.5, 0.5]):
    assert canary_lib.problem(lambda *_, scores=scores: np.asarray(scores), canary_lib.noise())


def test_flow_grpos_dialect_goes_both_ways():
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  metadata = [{"tag": "counting"}, {"tag": "colors"}, {"tag": "counting"}]
  body = flow_grpo_wire.encode_request(images, ["a", "b", "c"], metadata)
  (batch,), said = flow_grpo_wire.decode_request(body, wire.Limits())
  assert batch.prompts == ["a", "b", "c"] and batch.metadata == said
  # GenEval's server looks for the prompt in the metadata too.
  assert said == [{"prompt": p, **m} for p, m in zip("abc", metadata)]
  info = {"strict": np.asarray([0, 1, 1], np.float32)}
  answer = flow_grpo_wire.encode_answer(np.asarray([0.5, 1, 0.25], np.float32), info, said)
  scores, rest = flow_grpo_wire.decode_answer(answer, 3)
  assert scores.tolist() == [0.5, 1, 0.25] and rest["strict_rewards"] == [0, 1, 1]
  (batch,), said = flow_grpo_wire.decode_request(
    pickle.dumps({"images": [wire.encode_image(images[0], "JPEG")]}), wire.Limits()
  )
  assert batch.prompts == [""] and said is None


def test_pictures_among_the_metadata_travel_as_base64_png():
  picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
  images, told = np.zeros((1, 8, 8, 3), np.uint8), [{"image": picture, "n": np.float32(2)}]
  for multipart in (False, True):
    body, kind = wire.encode_request(images, ["p"], told, multipart=multipart)
    (batch,) = wire.decode_request(body, kind, wire.Limits())
    sent = Image.open(io.BytesIO(base64.b64decode(batch.metadata[0]["image"])))
    np.testing.assert_array_equal(sent, picture)
    assert batch.metadata[0]["n"] == 2
