"""The report shows what is in the run folders, whatever state they are in."""

import dataclasses
import html.parser
import json

import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.reporting import history, page, plots

WINDOW = 3


def eval_row(epoch, score, **more):
  totals = {"total/evaluations": 100 * epoch, "time/total": 10.0 * epoch}
  return {"epoch": epoch, "kind": "eval", **totals, "reward/ocr/mean": score, **more}


def train_row(epoch, completions=True, **more):
  row = {"epoch": epoch, "kind": "train", "reward/mean": 0.5, "completion_reward/3": 0.5, **more}
  row |= {"total/evaluations": 100 * epoch, "time/total": 10.0 * epoch, "grad_norm": 0.1}
  row |= {f"turning_point/{k}": 0.1 * k * completions for k in range(WINDOW)}
  if completions:
    row |= {f"completion_reward/{k}": 0.1 * k for k in range(WINDOW)}
  return row


@pytest.fixture
def make_run(tmp_path):
  """Returns a function that writes a run folder and gives its path as text."""

  def make(name, rows, *, text=None, rollout=None, **fields):
    folder = tmp_path / name
    folder.mkdir()
    config = dataclasses.replace(config_lib.Config(), **fields)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines if text is None else text)
    if rollout is not None:
      (folder / "rollouts").mkdir()
      np.savez(folder / "rollouts" / "epoch_00001.npz", **rollout._asdict())
    return str(folder)

  return make


def make_rollout(completion_reward, is_turning_point, prompts=None):
  """A Rollout with an image for every sample."""
  count = np.shape(completion_reward)[1]
  return history.Rollout(
    1,
    np.asarray(completion_reward, np.float32),
    np.asarray(is_turning_point, bool),
    np.asarray(prompts or [f"P{i}" for i in range(count)]),
    np.zeros((count, 8, 16, 3), np.uint8),
  )


RISING = make_rollout([[0, 1], [1, 0], [0, 0.5], [1, 1]], [[0, 0], [0, 0], [1, 1]])
TERMINAL = make_rollout([[np.nan], [np.nan], [np.nan], [1]], [[0], [0], [0]])


class _Page(html.parser.HTMLParser):
  """Collects what a page refers to and the text that it shows."""

  def __init__(self, text):
    super().__init__()
    self.sources, self.tags, self.shown = [], [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.sources += [v for k, v in attrs if k in ("src", "href")]

  def handle_data(self, data):
    self.shown += data


def write(groups, folder):
  return _Page(page.write_report(groups, folder).read_text(encoding="utf-8"))


def test_band_is_mean_and_extremes_over_seeds(make_run):
  scores = {0: (0.2, 0.5), 1: (0.4, 0.6), 2: (0.3, 1.0)}
  runs = [
    make_run(f"s{seed}", [eval_row(e, s[e]) for e in (0, 1)], seed=seed)
    for seed, s in scores.items()
  ]
  band = history.band(history.load_runs(runs)["tp_grpo"], "evals", "reward/ocr/mean", "seconds")
  # The exact decimal fractions; the sums round in the last bit.
  np.testing.assert_allclose(band.x, [0, 10])
  np.testing.assert_allclose(band.mean, [0.3, 0.7], rtol=1e-12)
  np.testing.assert_allclose(band.low, [0.2, 0.5])
  np.testing.assert_allclose(band.high, [0.4, 1.0])


def test_updates_axis_counts_the_updates_of_every_epoch(make_run):
  train = config_lib.Train(updates_per_epoch=4)
  run = history.load_run(make_run("a", [eval_row(0, 0.1), eval_row(5, 0.2)], train=train))
  assert history.band([run], "evals", "reward/ocr/mean").x.tolist() == [0, 20]


@pytest.mark.parametrize(
  "against, wanted", [("evaluations", 400), ("teraflops", 0.5), ("seconds", 40)]
)
def test_curves_are_drawn_against_what_was_spent(make_run, against, wanted):
  run = history.load_run(make_run("a", [eval_row(4, 0.2, **{"total/teraflops": 0.5})]))
  assert history.band([run], "evals", "reward/ocr/mean", against).x.tolist() == [wanted]


def test_table_says_what_the_runs_came_to_and_what_they_took(make_run):
  spent = {"total/teraflops": 0.5, "image/edge_density": 0.25}
  runs = [
    make_run(f"s{seed}", [eval_row(0, 0.1), eval_row(6, score, **spent)], seed=seed)
    for seed, score in enumerate((0.3, 0.5))
  ]
  (row,) = page.table(history.load_runs(runs), "ocr")
  assert dict(zip(page.COLUMNS, row, strict=True)) == {
    "label": "tp_grpo",
    "seeds": "2",
    "epochs": "6 / 100",
    "base score": "0.100",
    "final score": "0.400",
    "gain": "+0.300 ± 0.141",
    "edge density": "0.250",
    "evaluations": "600",
    "TFLOP": "0.5",
    "minutes": "1.0",
  }


def test_band_ends_where_the_shortest_seed_ends(make_run):
  runs = [
    make_run("long", [eval_row(e, 0.1) for e in range(4)]),
    make_run("short", [eval_row(e, 0.1) for e in range(2)], seed=1),
  ]
  band = history.band(history.load_runs(runs)["tp_grpo"], "evals", "reward/ocr/mean")
  assert len(band.x) == 2


def test_values_that_are_not_finite_are_left_out(make_run):
  run = history.load_run(make_run("a", [eval_row(0, 0.1), eval_row(1, "nan"), eval_row(2, 0.3)]))
  np.testing.assert_allclose(history.band([run], "evals", "reward/ocr/mean").mean, [0.1, 0.3])


def test_gain_is_the_mean_of_each_seeds_own(make_run):
  runs = [
    make_run("a", [eval_row(0, 0.50), eval_row(10, 0.70)]),
    make_run("b", [eval_row(0, 0.40), eval_row(10, 0.80)], seed=1),
  ]
  row = dict(zip(page.COLUMNS, page.table(history.load_runs(runs), "ocr")[0]))
  # Gains .2 and .4: mean .3, standard deviation .1 sqrt(2).
  assert row["gain"] == "+0.300 ± 0.141"
  assert (row["base score"], row["final score"], row["seeds"]) == ("0.450", "0.750", "2")


def test_run_without_a_base_score_has_no_gain(make_run):
  groups = history.load_runs([make_run("a", [eval_row(10, 0.7)])])
  row = dict(zip(page.COLUMNS, page.table(groups, "ocr")[0]))
  assert (row["base score"], row["gain"]) == ("–", "–")


def test_page_refers_to_no_other_file(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), train_row(1), eval_row(1, 0.2)], rollout=RISING)
  result = write(history.load_runs([folder]), tmp_path / "out")
  assert result.sources and all(s.startswith("data:image/png;base64,") for s in result.sources)
  assert not {"script", "link"} & set(result.tags)


def test_every_plot_is_also_a_png(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), train_row(1), eval_row(1, 0.2)], rollout=RISING)
  result = write(history.load_runs([folder]), tmp_path / "out")
  names = {p.stem for p in (tmp_path / "out").glob("*.png")}
  assert names == {
    "held_out_ocr",
    "training_reward",
    "trajectories_tp_grpo",
    "mean_completion_reward",
    "turning_point_density",
    "diagnostics",
  }
  assert len(result.sources) == len(names)


@pytest.mark.parametrize(
  "rows",
  [
    [eval_row(0, 0.1)],
    [train_row(1)],
    [eval_row(0, 0.1), train_row(1, completions=False), train_row(2, completions=False)],
    [eval_row(0, "nan"), train_row(1, grad_norm="inf")],
    [{"epoch": 0, "kind": "eval"}],
  ],
  ids=["base_only", "no_evaluation", "no_completions", "not_finite", "no_metrics"],
)
def test_report_of_a_run_that_has_little(make_run, tmp_path, rows):
  folder = make_run("a", rows, rollout=TERMINAL)
  groups = history.load_runs([folder])
  assert "tp_grpo" in write(groups, tmp_path / "out").shown
  assert "trajectories_tp_grpo.png" not in {p.name for p in (tmp_path / "out").iterdir()}
  page.render_text_table(groups)


def test_report_leaves_out_what_is_half_written(make_run, tmp_path):
  text = json.dumps(eval_row(0, 0.125)) + "\n" + '{"epoch": 1, "ki'
  folder = make_run("a", [], text=text, rollout=RISING)
  rollout = tmp_path / "a" / "rollouts" / "epoch_00001.npz"
  rollout.write_bytes(rollout.read_bytes()[:200])
  (tmp_path / "a" / "images").mkdir()
  (tmp_path / "a" / "images" / "eval_00000.png").write_bytes(b"\x89PNG")
  result = write(history.load_runs([folder]), tmp_path / "out")
  assert "0.125" in result.shown and len(result.sources) == 1


def test_sample_grids_are_the_first_and_the_last(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1)])
  (tmp_path / "a" / "images").mkdir()
  for epoch in (0, 10, 20):
    path = tmp_path / "a" / "images" / f"eval_{epoch:05d}.png"
    Image.new("RGB", (4, 4)).save(path)
  assert [epoch for epoch, _ in history.sample_grids(history.load_run(folder))] == [0, 20]


def test_text_from_users_is_escaped(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), train_row(1)], rollout=RISING._replace(
    prompts=np.array(["$5 & $6", "<b>"])))  # fmt: skip
  result = write(history.load_runs([f"<i>$x_$</i>={folder}"]), tmp_path / "out")
  assert "<i>$x_$</i>" in result.shown and "i" not in result.tags


def test_examples_are_trajectories_with_turning_points_first():
  reward = np.zeros((4, 8))
  reward[1, :7] = 1  # all but the last move, only the last has a turning point
  marks = np.zeros((3, 8))
  marks[1, 7] = 1
  with plots.style():
    figure = plots.example_trajectories(make_rollout(reward, marks), count=2)
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  assert titles[0] == "P7"


def test_examples_show_different_prompts():
  rollout = make_rollout(
    np.arange(4.0)[:, None] * np.ones((4, 6)), np.zeros((3, 6)), list("AAABBC")
  )
  with plots.style():
    figure = plots.example_trajectories(rollout, count=3)
  assert {axis.get_title(loc="left") for axis in figure.axes if axis.get_title(loc="left")} == set(
    "ABC"
  )


def test_labels_have_distinct_colors_that_do_not_depend_on_the_order():
  labels = ["tp_grpo", "flow_grpo", "mine", "yours"]
  chosen = plots.colors(labels)
  assert len(set(chosen.values())) == len(labels)
  assert plots.colors(["flow_grpo", "tp_grpo"])["tp_grpo"] == chosen["tp_grpo"]


def test_label_is_the_credit_method_unless_it_is_given(make_run):
  credit = config_lib.Credit("increments")
  folders = [make_run(n, [eval_row(0, 0.1)], credit=credit, seed=i) for i, n in enumerate("ab")]
  groups = history.load_runs([folders[0], f"mine={folders[1]}"])
  assert list(groups) == ["increments", "mine"]


def test_folder_with_an_equals_sign_is_not_a_label(make_run):
  assert list(history.load_runs([make_run("lr=1", [eval_row(0, 0.1)])])) == ["tp_grpo"]


def test_runs_of_one_label_that_differ_are_refused(make_run):
  a = make_run("a", [eval_row(0, 0.1)])
  b = make_run("b", [eval_row(0, 0.1)], optimizer=config_lib.Optimizer(learning_rate=1.0))
  with pytest.raises(ValueError, match=r"optimizer\.learning_rate.*other_name="):
    history.load_runs([a, b])
  with pytest.warns(UserWarning, match=r"optimizer\.learning_rate.*drawn as one"):
    assert len(history.load_runs([f"both={a}", f"both={b}"])["both"]) == 2


def test_folder_given_twice_is_refused(make_run):
  folder = make_run("a", [eval_row(0, 0.1)])
  with pytest.raises(ValueError, match="given twice"):
    history.load_runs([folder, folder])


def test_missing_folder_is_named():
  with pytest.raises(ValueError, match=r"run='nowhere': no such folder"):
    history.load_runs(["nowhere"])


def test_folder_that_holds_runs_names_them(make_run, tmp_path):
  make_run("inner", [eval_row(0, 0.1)])
  with pytest.raises(ValueError, match=r"no config\.json.*inner"):
    history.load_runs([str(tmp_path)])


@pytest.mark.parametrize("text", ["", '{"epo'], ids=["empty", "half_a_row"])
def test_run_without_metrics_is_named(make_run, text):
  with pytest.raises(ValueError, match=r"metrics\.jsonl"):
    history.load_runs([make_run("a", [], text=text)])


def test_config_of_another_version_is_named(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1)])
  (tmp_path / "a" / "config.json").write_text('{"sed": 1}')
  with pytest.raises(ValueError, match=r"config\.json.*sed.*'seed'"):
    history.load_runs([folder])
