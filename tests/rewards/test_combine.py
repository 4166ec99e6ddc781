import ctypes
import http.client
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpgrpo_jax import config, rewards, types
from tpgrpo_jax.config import names
from tpgrpo_jax.rewards import combine

IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
PROMPTS = ["a cat", "a dog", "a bird"]
METADATA = [{}, {}, {}]


def make_constant(value=1.0):
  """A reward as a user would write it."""
  return lambda images, prompts, metadata: (np.full(len(images), value), {"value": value})


def make_with_any_option(**options):
  return lambda images, prompts, metadata: ([len(options)] * len(images), {})


def reward_without_a_maker(images, prompts, metadata):
  return np.ones(len(images)), {}


def make_nothing():
  return None


TABLE = {
  "one": make_constant,
  "index": lambda: lambda images, prompts, metadata: (np.arange(len(images)), {}),
}


def _build(specs):
  return combine.make_weighted_sum(specs, TABLE, {})


def _call(specs, prompts=PROMPTS):
  return _build(specs)(IMAGES, prompts, METADATA)()


def _returning(result):
  """A combined reward "mine" whose function returns `result`."""
  table = {"mine": lambda: lambda images, prompts, metadata: result}
  return combine.make_weighted_sum({"mine": 1.0}, table, {})


def test_table_has_the_names_that_the_config_knows():
  assert set(rewards.REWARDS) == set(names.REWARD_NAMES)


def test_reward_that_paints_on_the_images_is_refused():
  def make():
    def reward(images, prompts, metadata):
      images[:] = 0
      return np.zeros(len(images), np.float32), {}

    return reward

  images = np.full((2, 4, 4, 3), 7, np.uint8)
  with pytest.raises(ValueError, match="read-only"):
    combine.make_weighted_sum({"mine": 1.0}, {"mine": make}, {})(images, ["a", "b"], [{}, {}])()
  assert images.min() == 7 and images.flags.writeable


def test_default_config_makes_its_rewards():
  assert callable(rewards.make_rewards(config.Config().rewards))


def test_total_is_the_weighted_sum():
  total, _, _ = _call({"one": 0.5, "index": -2.0})
  np.testing.assert_array_equal(total, np.asarray([0.5, -1.5, -3.5], np.float32))


def test_operations_of_all_rewards_add_up_and_are_unknown_where_one_is_silent():
  def making(flops=None):
    def make():
      def reward(images, prompts, metadata):
        return np.zeros(len(images)), {}

      if flops:
        reward.flops = flops
      return reward

    return make

  table = {
    "area": making(lambda h, w: h * w),
    "rows": making(lambda h, w: 10 * h),
    "silent": making(),
  }
  build = lambda *labels: combine.make_weighted_sum(dict.fromkeys(labels, 0.5), table, {})
  assert build("area", "rows").flops(5, (2, 3)) == 5 * (6 + 20)
  assert build("area", "silent").flops(5, (2, 3)) is None
  assert build("area").flops(0, ()) is None  # nothing was painted


def test_each_reward_is_reported_without_its_weight():
  _, by_label, _ = _call({"one": 0.5, "index": -2.0})
  np.testing.assert_array_equal(by_label["one"], [1, 1, 1])
  np.testing.assert_array_equal(by_label["index"], [0, 1, 2])


def test_info_is_kept_by_label():
  _, _, info = _call({"one": 1.0, "index": 1.0})
  assert info == {"one": {"value": 1.0}, "index": {}}


def test_all_scores_are_float32():
  total, by_label, _ = _call({"one": 1, "index": 1})
  assert {total.dtype, by_label["one"].dtype, by_label["index"].dtype} == {np.dtype(np.float32)}


def test_one_reward_goes_in_twice_with_different_options():
  total, by_label, _ = _call(
    {
      "low": {"weight": 1.0, "make": "one", "value": 2.0},
      "high": {"weight": 10.0, "make": "one", "value": 3.0},
    }
  )
  assert list(by_label) == ["low", "high"] and total[0] == 32.0


def test_users_own_reward_is_imported_by_its_path():
  total, _, _ = _call({"mine": {"weight": 1.0, "make": f"{__name__}:make_constant", "value": 4.0}})
  np.testing.assert_array_equal(total, [4, 4, 4])


def test_label_may_be_the_path_itself():
  total, by_label, _ = _call({f"{__name__}:make_constant": 3.0})
  assert list(by_label) == [f"{__name__}:make_constant"] and total[0] == 3.0


def test_maker_with_keyword_arguments_takes_any_option():
  path = f"{__name__}:make_with_any_option"
  total, _, _ = _call({"mine": {"weight": 1, "make": path, "a": 1, "b": 2}})
  assert total[0] == 2.0


def test_rewards_of_one_call_run_at_the_same_time():
  barrier = threading.Barrier(2, timeout=30)  # breaks, and fails the test, unless both arrive

  def make():
    def reward(images, prompts, metadata):
      barrier.wait()
      return np.ones(len(images)), {}

    return reward

  total, _, _ = combine.make_weighted_sum({"a": 1, "b": 1}, {"a": make, "b": make}, {})(
    IMAGES, PROMPTS, METADATA
  )()
  np.testing.assert_array_equal(total, [2, 2, 2])


@pytest.mark.parametrize(
  ["specs", "message"],
  [
    ({}, "must be a mapping with one reward or more"),
    ({"on": 1.0}, "rewards.on='on': unknown name. Did you mean 'one'"),
    ({"x": {"weight": 1.0, "make": "on"}}, "rewards.x='on': unknown name"),
    ({"x": {"weight": 1.0, "make": None}}, "rewards.x.make=None: must be a name"),
    ({"x": {"weight": 1.0, "make": "no_such_module:make"}}, "cannot import 'make'"),
    ({"one": float("nan")}, "rewards.one=nan: must be a finite number"),
    ({"one": "1"}, "rewards.one='1': must be a finite number"),
    ({"one": True}, "rewards.one=True: must be a finite number"),
    ({"one": 1e39}, "must be a finite number"),
    ({"one": {"weight": float("inf")}}, "rewards.one.weight=inf: must be a finite number"),
    ({"one": {"value": 2.0}}, "has no weight"),
    ({"one": {"weight": 1.0, "vale": 2.0}}, "rewards.one.vale: .* Did you mean 'value'"),
    ({"index": {"weight": 1.0, "x": 2.0}}, "rewards.index.x: unknown option .* has none"),
    ({f"{__name__}:reward_without_a_maker": 1.0}, "needs the options images, prompts"),
    ({f"{__name__}:make_nothing": 1.0}, "its maker returned None"),
  ],
)
def test_mistake_in_the_config_is_an_error_before_any_image(specs, message):
  with pytest.raises(ValueError, match=message):
    _build(specs)


def test_option_that_a_reward_refuses_is_an_error_with_its_label():
  with pytest.raises(ValueError, match="rewards.ocr: workers=-1"):
    rewards.make_rewards({"ocr": {"weight": 1.0, "workers": -1}})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_score_that_is_not_finite_names_label_prompt_and_value(bad):
  with pytest.raises(rewards.RewardError) as error:
    _returning(([0.0, bad, 0.0], {}))(IMAGES, PROMPTS, METADATA)()
  for part in ("'mine'", "'a dog'", str(bad), "finite", "start the same command again"):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ["result", "message"],
  [
    (([1.0, 2.0], {}), r"shape \(2,\) .* must be of shape \(3,\)"),
    ((np.ones((3, 1)), {}), r"shape \(3, 1\)"),
    ((["1", "2", "3"], {}), "dtype <U1"),
    (([None] * 3, {}), "dtype object"),
    ((np.ones(3, complex), {}), "dtype complex128"),
    (np.ones(3), "returned ndarray .* must be a pair"),
  ],
)
def test_result_of_the_wrong_form_is_an_error(result, message):
  with pytest.raises(rewards.RewardError, match=message):
    _returning(result)(IMAGES, PROMPTS, METADATA)()


def test_a_reward_cannot_change_what_another_sees():
  seen = []

  def painting(images, prompts, metadata):
    # What torch.from_numpy(images).zero_() does: it does not ask whether the array may be written to.
    ctypes.memset(images.ctypes.data, 0, images.nbytes)
    metadata[0]["text"] = "mine"
    prompts.clear()
    return np.zeros(len(images)), {}

  def looking(images, prompts, metadata):
    time.sleep(0.2)
    seen.append((images.copy(), list(prompts), [dict(m) for m in metadata]))
    return np.zeros(len(images)), {}

  table = {"painting": lambda: painting, "looking": lambda: looking}
  given, metadata = np.full((3, 4, 4, 3), 7, np.uint8), [{"text": "a"}, {}, {}]
  combine.make_weighted_sum({"painting": 1.0, "looking": 1.0}, table, {})(
    given, PROMPTS, metadata
  )()
  images, prompts, theirs = seen[0]
  assert (images == 7).all() and (given == 7).all()
  assert prompts == list(PROMPTS) and theirs == metadata == [{"text": "a"}, {}, {}]


class Tensor:
  """As torch.Tensor behaves: bfloat16 and gradients have no NumPy array."""

  def __init__(self, values, ready=False, floating=True):
    self._values, self._ready, self._floating = values, ready, floating

  def __array__(self, *args, **kwargs):
    raise TypeError("Got unsupported ScalarType BFloat16")

  def detach(self):
    return self

  cpu = detach

  def is_floating_point(self):
    return self._floating

  def double(self):
    return Tensor(self._values, ready=True)

  def numpy(self):
    assert self._ready or not self._floating
    return np.asarray(self._values)


@pytest.mark.parametrize(
  "scores",
  [
    Tensor([0.5, 1.0, 0.0]),
    [Tensor(0.5), 1.0, Tensor(0, floating=False)],
    jnp.asarray([0.5, 1.0, 0.0], jnp.bfloat16),
    np.asarray([0.5, 1.0, 0.0], np.float16),
  ],
)
def test_scores_of_any_dtype_and_library_are_taken(scores):
  found = _returning((scores, {}))(IMAGES, PROMPTS, METADATA)()[1]["mine"]
  assert found.dtype == np.float32 and found.tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parity
def test_scores_of_torch_are_taken():
  torch = pytest.importorskip("torch")
  scores = torch.tensor([0.5, 1.0, 0.0], requires_grad=True)
  for given in (scores, scores.to(torch.bfloat16), scores.half(), [*scores]):
    found = _returning((given, {}))(IMAGES, PROMPTS, METADATA)()[1]["mine"]
    assert found.tolist() == [0.5, 1.0, 0.0]


def test_scores_that_cannot_be_read_name_the_reward():
  with pytest.raises(rewards.RewardError, match="'mine' returned scores that cannot be read"):
    _returning(([[1.0], [1.0, 2.0], 3.0], {}))(IMAGES, PROMPTS, METADATA)()


def test_a_failure_that_is_no_exception_and_one_of_the_maker_name_the_reward():
  class Panic(BaseException):
    pass

  def broken(*_):
    raise Panic("index out of bounds")

  with pytest.raises(Panic) as caught:
    combine.make_weighted_sum({"mine": 1.0}, {"mine": lambda: broken}, {})(
      IMAGES, PROMPTS, METADATA
    )()
  assert "the reward 'mine'" in caught.value.__notes__[0]

  def make():
    raise FileNotFoundError("no weights.pt")

  with pytest.raises(FileNotFoundError) as caught:
    combine.make_weighted_sum({"mine": 1.0}, {"mine": make}, {})
  assert "the reward 'mine'" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [KeyError, ConnectionError])
def test_failure_inside_a_reward_names_label_and_prompt(kind):
  def broken(images, prompts, metadata):
    raise kind("no server")

  # What may pass (a server that is away) becomes a RewardError when it does not; a mistake stays itself.
  raised = combine.RewardError if kind is ConnectionError else kind
  with pytest.raises(raised, match="no server") as caught:
    combine.make_weighted_sum({"mine": 1.0}, {"mine": lambda: broken}, {})(
      IMAGES, PROMPTS, METADATA
    )()
  error = caught.value.__cause__ if kind is ConnectionError else caught.value
  assert type(error) is kind
  assert "'mine'" in error.__notes__[0] and "'a cat'" in error.__notes__[0]


def test_a_call_that_takes_too_long_is_made_again_and_given_up(caplog):
  calls = []

  def slow(images, prompts, metadata):
    calls.append(time.monotonic())
    time.sleep(0.5)
    return np.zeros(len(images), np.float32), {}

  patience = dict(timeout=0.05, retries=2, backoff=0.01)
  score = combine.make_weighted_sum({"mine": 1.0}, {"mine": lambda: slow}, {}, **patience)
  with pytest.raises(combine.RewardError, match="failed 3 times.*no answer within 0.05 s"):
    score(IMAGES, PROMPTS, METADATA)()
  assert len(calls) == 3 and "again in 0.01 s" in caplog.text
  assert len(caplog.records) == 1  # and not once a retry


@pytest.mark.parametrize(
  "passing", [http.client.IncompleteRead(b""), json.JSONDecodeError("502", "<html>", 0)]
)
def test_answers_of_a_server_that_fails_are_asked_for_again(passing):
  failures = [passing]

  def mine(images, prompts, metadata):
    if failures:
      raise failures.pop()
    return np.ones(len(images), np.float32), {}

  score = combine.make_weighted_sum(
    {"mine": 1.0}, {"mine": lambda: mine}, {}, retries=1, backoff=0.0
  )
  assert score(IMAGES, PROMPTS, METADATA)()[0].sum() == len(IMAGES)


def test_reward_that_exits_does_not_end_the_run_as_if_it_were_finished():
  def mine(images, prompts, metadata):
    raise SystemExit(0)

  score = combine.make_weighted_sum({"mine": 1.0}, {"mine": lambda: mine}, {}, retries=1)
  with pytest.raises(combine.RewardError, match=r"'mine' called sys\.exit\(0\)"):
    score(IMAGES, PROMPTS, METADATA)()


def test_rows_of_other_processes_are_not_scored():
  seen = []

  def mine(images, prompts, metadata):
    seen.extend(prompts)
    return np.arange(1, len(images) + 1, dtype=np.float32), {"text": list(prompts)}

  score = combine.make_weighted_sum({"mine": 1.0}, {"mine": lambda: mine}, {})
  total, _, infos = score(IMAGES, PROMPTS, METADATA, rows=np.asarray([True, False, True]))()
  assert seen == [PROMPTS[0], PROMPTS[2]] == infos["mine"]["text"]
  np.testing.assert_array_equal(total, [1, 0, 2])


@pytest.mark.parametrize("make", ["math:pi", "math:sin"])
def test_a_maker_that_is_none_is_named(make):
  with pytest.raises(ValueError, match="rewards.mine"):
    combine.make_weighted_sum({"mine": {"weight": 1.0, "make": make}}, {}, {})


def test_unequal_numbers_of_images_and_prompts_are_an_error():
  with pytest.raises(ValueError, match="3 images, 2 prompts, 3 metadata"):
    _call({"one": 1.0}, prompts=PROMPTS[:2])


def test_empty_batch_has_an_empty_total():
  total, _, _ = _build({"one": 1.0})(IMAGES[:0], [], [])()
  assert total.shape == (0,)


def make_device(log, name, function=lambda images: images[:, 0, 0, 0].astype(jnp.float32)):
  """A maker of a device reward that writes down who calls it, and with how many rows."""

  def make(*, scale=1.0, placement=None):
    def reward(images, prompts, metadata):
      assert isinstance(images, jax.Array) and len(images) == len(prompts) == len(metadata)
      log.append((name, threading.get_ident(), len(prompts)))
      return scale * function(images)

    return reward

  return make


def count_up(rows):
  return np.arange(rows, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)


def test_device_rewards_are_dispatched_by_the_caller_in_the_labels_order_and_host_rewards_later():
  log = []

  def make_host():
    def reward(images, prompts, metadata):
      log.append(("host", threading.get_ident(), len(prompts)))
      return np.ones(len(images)), {"said": 1}

    return reward

  device = {name: make_device(log, name) for name in "cab"}
  begin = combine.make_weighted_sum({"c": 1, "h": 10, "a": 100, "b": 1}, {"h": make_host}, device)
  finish = begin(count_up(3), PROMPTS, METADATA)
  caller = threading.get_ident()
  assert log == [("c", caller, 3), ("a", caller, 3), ("b", caller, 3)]
  total, by_label, infos = finish()
  assert log[3][0] == "host" and log[3][1] != caller
  assert list(by_label) == ["c", "h", "a", "b"] and infos["h"] == {"said": 1} and infos["a"] == {}
  np.testing.assert_array_equal(total, np.asarray([10, 112, 214], np.float32))
  assert total.dtype == by_label["a"].dtype == np.float32


@pytest.mark.parametrize("on_device", [False, True])
def test_rows_that_fill_up_a_mesh_are_dropped_again(on_device):
  log, batches = [], []

  def place(tree):
    batches.append(len(tree))
    return jnp.asarray(tree)

  device = {"d": make_device(log, "d")}
  placement = types.Placement(lambda tree: None, place)
  begin = combine.make_weighted_sum({"d": 1.0}, {}, device, placement=placement)
  images = jnp.asarray(count_up(3)) if on_device else count_up(3)
  total, _, _ = begin(images, PROMPTS, METADATA)()
  assert batches == [8] and log[0][2] == 8  # there are eight devices
  np.testing.assert_array_equal(total, [0, 1, 2])


def test_device_reward_takes_options_but_not_the_placement():
  device = {"d": make_device([], "d")}
  build = lambda **options: combine.make_weighted_sum({"d": {"weight": 1.0, **options}}, {}, device)
  total, _, _ = build(scale=2.0)(count_up(3), PROMPTS, METADATA)()
  np.testing.assert_array_equal(total, [0, 2, 4])
  with pytest.raises(ValueError, match="rewards.d.placement: unknown option"):
    build(placement=1)


def test_device_score_that_is_not_finite_names_label_and_prompt():
  device = {"d": make_device([], "d", lambda images: jnp.asarray([0.0, jnp.nan, 0.0]))}
  with pytest.raises(
    rewards.RewardError, match="'d' returned the score nan for the prompt 'a dog'"
  ):
    combine.make_weighted_sum({"d": 1.0}, {}, device)(count_up(3), PROMPTS, METADATA)()


def test_device_scores_of_the_wrong_shape_are_an_error():
  device = {"d": make_device([], "d", lambda images: jnp.zeros((len(images), 2)))}
  with pytest.raises(rewards.RewardError, match=r"shape \(3, 2\)"):
    combine.make_weighted_sum({"d": 1.0}, {}, device)(count_up(3), PROMPTS, METADATA)()


def test_failure_at_dispatch_keeps_its_type_and_names_the_label():
  def fail(images):
    raise RuntimeError("out of memory")

  begin = combine.make_weighted_sum({"d": 1.0}, {}, {"d": make_device([], "d", fail)})
  with pytest.raises(RuntimeError, match="out of memory") as error:
    begin(count_up(3), PROMPTS, METADATA)
  assert "'d'" in error.value.__notes__[0] and "'a cat'" in error.value.__notes__[0]
