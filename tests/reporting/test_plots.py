"""The report shows what is in the run folders, whatever state they are in."""

import base64
import dataclasses
import html.parser
import io
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.reporting import history, page, plots, tables, trajectories, watch

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


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
  """Plots of few pixels: drawing takes most of the time."""
  monkeypatch.setitem(plots.STYLE, "savefig.dpi", 40)


@pytest.fixture
def written(monkeypatch):
  """The seconds of refresh of the pages that watch has written, without their plots."""
  seconds = []

  def write_report(groups, output, *, refresh=0.0):
    seconds.append(refresh)
    return pathlib.Path(output) / "report.html"

  monkeypatch.setattr(page, "write_report", write_report)
  return seconds


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
    self.sources, self.tags, self.shown, self.names = [], [], "", []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.names += [name for name, _ in attrs]
    self.sources += [v for k, v in attrs if k in ("src", "href", "srcset")]

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
  spent = {"total/teraflops": 0.5, "total/teraflops_with_rewards": 0.75, "image/edge_density": 0.25}
  runs = [
    make_run(f"s{seed}", [eval_row(0, 0.1), eval_row(6, score, **spent)], seed=seed)
    for seed, score in enumerate((0.3, 0.5))
  ]
  (row,) = tables.table(history.load_runs(runs), "ocr")
  # Of .3 and .5 the standard deviation is .1 sqrt(2), and the standard error .1.
  assert dict(zip(tables.COLUMNS, row, strict=True)) == {
    "label": "tp_grpo",
    "seeds": "2",
    "epochs": "6 / 100",
    "base score": "0.100",
    "final score": "0.400 ± 0.100",
    "gain": "+0.300 ± 0.100",
    "edge density": "0.250",
    "evaluations": "600",
    "model TFLOP": "0.5",
    "TFLOP with rewards": "0.75",
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
  row = dict(zip(tables.COLUMNS, tables.table(history.load_runs(runs), "ocr")[0]))
  # Gains .2 and .4: mean .3, standard error .1 sqrt(2) / sqrt(2).
  assert row["gain"] == "+0.300 ± 0.100"
  assert row["base score"] == "0.450 ± 0.050"  # two bases
  assert (row["final score"], row["seeds"]) == ("0.750 ± 0.050", "2")


def test_label_and_folder_may_hold_equals_signs(make_run):
  folder = make_run("a+credit.balance=False_s0", [eval_row(10, 0.7)])
  assert list(history.load_runs([f"a+credit.balance=False={folder}"])) == ["a+credit.balance=False"]
  assert len(history.load_runs([str(folder)])) == 1


def test_run_without_a_base_score_has_no_gain(make_run):
  groups = history.load_runs([make_run("a", [eval_row(10, 0.7)])])
  row = dict(zip(tables.COLUMNS, tables.table(groups, "ocr")[0]))
  assert (row["base score"], row["gain"]) == ("–", "–")


def test_page_refers_to_no_other_file(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), train_row(1), eval_row(1, 0.2)], rollout=RISING)
  result = write(history.load_runs([folder]), tmp_path / "out")
  assert result.sources and all(s.startswith("data:image/png;base64,") for s in result.sources)
  assert not {"script", "link"} & set(result.tags) and "http-equiv" not in result.names


def test_every_plot_is_also_a_png(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), train_row(1), eval_row(1, 0.2)], rollout=RISING)
  result = write(history.load_runs([folder]), tmp_path / "out")
  names = {p.stem for p in (tmp_path / "out").glob("*.png")}
  drawn = {
    "held_out_ocr",
    "training_reward",
    "trajectories_tp_grpo",
    "mean_completion_reward",
    "turning_point_density",
    "diagnostics",
  }
  assert names == drawn | {f"{name}_narrow" for name in drawn}
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
  tables.render_text(groups)


def test_report_leaves_out_what_is_half_written(make_run, tmp_path):
  text = json.dumps(eval_row(0, 0.125)) + "\n" + '{"epoch": 1, "ki'
  folder = make_run("a", [], text=text, rollout=RISING)
  rollout = tmp_path / "a" / "rollouts" / "epoch_00001.npz"
  rollout.write_bytes(rollout.read_bytes()[:200])
  (tmp_path / "a" / "images").mkdir()
  (tmp_path / "a" / "images" / "eval_00000.png").write_bytes(b"\x89PNG")
  result = write(history.load_runs([folder]), tmp_path / "out")
  assert (
    "0.125" in result.shown and len(result.sources) == 2
  )  # one plot, for a desk and for a phone


def test_sample_grids_are_the_first_and_the_last(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1)])
  (tmp_path / "a" / "images").mkdir()
  for epoch in (0, 10, 20):
    path = tmp_path / "a" / "images" / f"eval_{epoch:05d}.png"
    Image.new("RGB", (4, 4)).save(path)
  assert [grid.epoch for grid in history.sample_grids(history.load_run(folder))] == [0, 20]


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
    figure = trajectories.example_trajectories(make_rollout(reward, marks), count=2)
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  assert titles[0] == "P7\nR[W] = 0.00"


def test_examples_show_different_prompts():
  rollout = make_rollout(
    np.arange(4.0)[:, None] * np.ones((4, 6)), np.zeros((3, 6)), list("AAABBC")
  )
  with plots.style():
    figure = trajectories.example_trajectories(rollout, count=3)
  titles = [axis.get_title(loc="left") for axis in figure.axes]
  assert {title[0] for title in titles if title} == set("ABC")


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


def test_one_seed_has_the_standard_error_over_its_prompts(make_run):
  error = {"reward/ocr/standard_error": 0.02}
  judged = {"epoch": 4, "kind": "judge", "prompts": 9}
  judged |= {"base/reward/ocr/mean": 0.2, "base/reward/ocr/standard_error": 0.03}
  judged |= {"last/reward/ocr/mean": 0.6, "last/reward/ocr/standard_error": 0.04}
  judged |= {"last/gain/ocr/mean": 0.4, "last/gain/ocr/standard_error": 0.01}
  rows = [eval_row(0, 0.25, **error), eval_row(4, 0.5, **error), judged]
  groups = history.load_runs([make_run("a", rows)])
  row = dict(zip(tables.COLUMNS, tables.table(groups, "ocr")[0]))
  assert (row["base score"], row["final score"]) == ("0.250 ± 0.020", "0.500 ± 0.020")
  assert row["gain"] == "+0.250"  # whose pairs the evaluations have not kept
  (row,) = tables.judged(groups, "ocr")
  wanted = ("tp_grpo", "1", "9", "0.200 ± 0.030", "0.600 ± 0.040", "+0.400 ± 0.010", "–", "–")
  assert row == wanted
  text = tables.render_text(groups)
  assert all(cell in text for cell in wanted)


def test_older_runs_get_the_standard_error_that_their_rows_imply(make_run):
  judged = {"epoch": 1, "kind": "judge", "prompts": 4}
  rows = [eval_row(0, 0.5, **{"reward/ocr/std": 0.4})]
  settings = config_lib.Eval(prompts=17)
  run = history.load_run(make_run("a", [*rows, judged], eval=settings))
  # Over 17 prompts: .4 sqrt(17 / 16) / sqrt(17).
  assert run.evals[0]["reward/ocr/standard_error"] == pytest.approx(0.1)
  # Without further prompts behind them there may have been fewer.
  assert "reward/ocr/standard_error" not in history.load_run(make_run("b", rows)).evals[0]


def test_curve_of_one_seed_has_its_standard_error_and_the_base_a_line(make_run):
  error = {"reward/ocr/standard_error": 0.05}
  groups = history.load_runs(
    [make_run("a", [eval_row(0, 0.25, **error), eval_row(1, 0.5, **error)])]
  )
  with plots.style():
    axis = plots.held_out_reward(groups, "ocr").axes[0]
  (base,) = [line for line in axis.lines if line.get_linestyle() == "--"]
  assert base.get_ydata()[0] == 0.25
  spans = [c.get_paths()[0].get_extents() for c in axis.collections]
  assert any(np.allclose((s.y0, s.y1), (0.2, 0.55)) for s in spans)  # .25 - .05 ... .5 + .05


def test_sums_of_other_rewards_have_axes_of_their_own(make_run):
  rows = [eval_row(0, 0.1), train_row(1), train_row(2)]
  groups = history.load_runs(
    [
      make_run("a", rows),
      f"b={make_run('b', rows, seed=1)}",
      f"c={make_run('c', rows, rewards={'ocr': 1.0, 'jpeg_compressibility': 0.1})}",
    ]
  )
  with plots.style():
    for width in (plots.WIDE, plots.NARROW):
      axes = plots.training_reward(groups, width).axes
      assert [axis.get_ylabel() for axis in axes[::2]] == [
        "training reward: ocr",
        "training reward: ocr + 0.1 jpeg_compressibility",
      ]
      shared = axes[0].get_shared_y_axes()
      assert shared.joined(axes[0], axes[1]) and not shared.joined(axes[0], axes[2])
    first, second, third = trajectories.mean_completion_reward(groups).axes
    shared = first.get_shared_y_axes()
    assert shared.joined(first, second) and not shared.joined(first, third)


def test_reward_that_is_made_in_another_way_is_another_reward(make_run):
  groups = history.load_runs(
    [
      make_run("a", [eval_row(0, 0.1)]),
      f"b={make_run('b', [eval_row(0, 0.1)], rewards={'ocr': {'weight': 0.5}})}",
      f"c={make_run('c', [eval_row(0, 0.1)], rewards={'ocr': {'weight': 1.0, 'detect': True}})}",
    ]
  )
  assert [(title, [*part]) for title, _, part in tables.parts(groups)] == [
    ("ocr, as tp_grpo, b makes it", ["tp_grpo", "b"]),
    ("ocr, as c makes it", ["c"]),
  ]


def test_turning_points_that_balancing_dropped_are_drawn_apart(make_run, tmp_path):
  # Of both samples step 0 falls and step 1 begins to rise; balancing has kept that of the first alone.
  kept = np.zeros((3, 2), bool)
  kept[1, 0] = True
  rollout = make_rollout([[0.5, 0.5], [0, 0], [0.5, 0.5], [1, 1]], kept)
  folder = make_run("a", [eval_row(0, 0.1)], rollout=rollout._replace(found=kept, branched=False))
  (loaded,) = history.load_rollouts(history.load_run(folder))
  assert loaded.found.tolist() == [[False, False], [True, True], [False, False]]
  with plots.style():
    first, second = trajectories.example_trajectories(loaded).axes[:2]
  marks = lambda axis: [m.get_marker() for m in axis.lines if m.get_markersize() == 9]
  assert (marks(first), marks(second)) == (["o"], ["s"])


def test_found_and_paid_turning_points_have_panels_of_their_own(make_run):
  found = {f"turning_point_found/{k}": 0.3 for k in range(WINDOW)}
  groups = history.load_runs([make_run("a", [train_row(1, **found), train_row(2, **found)])])
  with plots.style():
    titles = [a.get_title(loc="left") for a in trajectories.turning_point_density(groups).axes]
  assert titles[:2] == ["tp_grpo: found", "tp_grpo: paid after balancing"]


def test_every_trajectory_that_is_shown_has_its_picture():
  rollout = make_rollout(np.arange(4.0)[:, None] * np.arange(1, 9), np.zeros((3, 8)))
  with plots.style():
    figure = trajectories.example_trajectories(rollout._replace(images=rollout.images[:3]))
  shown = [axis for axis in figure.axes if axis.get_title(loc="left")]
  assert [axis.get_title(loc="left")[:2] for axis in shown] == ["P2", "P1", "P0"]
  assert all(len(axis.child_axes[0].images) == 1 for axis in shown)


def test_picture_of_a_branch_has_the_score_of_its_anchor():
  rollout = make_rollout([[0.25], [0.5], [0], [0.25]], np.zeros((3, 1)))
  with plots.style():
    (axis,) = trajectories.example_trajectories(rollout._replace(branched=True)).axes
  assert axis.get_title(loc="left") == "P0\nanchor = 0.25"
  assert [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "o"] == [0.5, 0, 0.25]


def save_grid(folder, epoch, score, read):
  """What an evaluation of two pictures keeps: 4 x 2 pixels each, side by side."""
  (folder / "images").mkdir(exist_ok=True)
  sheet = np.zeros((4, 20, 3), np.uint8)
  sheet[1:3, 1:5], sheet[1:3, 10:14] = (255, 0, 0), (0, 0, 255)
  Image.fromarray(sheet).save(folder / "images" / f"eval_{epoch:05d}.png")
  said = {
    "boxes": [(1, 1, 5, 3), (10, 1, 14, 3)],
    "prompts": ["CAT", "<b>&"],
    "scores": {"ocr": [score, 0.0], "jpeg": [-1.5, -2.0]},
    "readings": {"ocr": [read, ""]},
  }
  (folder / "images" / f"eval_{epoch:05d}.json").write_text(json.dumps(said))


def test_each_picture_has_its_score_and_reading_under_it(make_run, tmp_path):
  folder = make_run("a", [eval_row(0, 0.1), eval_row(8, 0.2)])
  save_grid(tmp_path / "a", 0, 0.25, "C<T")
  save_grid(tmp_path / "a", 8, 1.0, "CAT")
  result = write(history.load_runs([folder]), tmp_path / "out")
  shown = " ".join(result.shown.split())
  assert (
    "CATbefore trainingocr 0.25reads “C<T”jpeg -1.5after epoch 8ocr 1reads “CAT”jpeg -1.5" in shown
  )
  assert "<b>&before trainingocr 0reads nothingjpeg -2" in shown
  pictures = [s for s, name in zip(result.sources, result.tags) if s][-4:]
  colors = []
  for source in pictures:
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
      assert image.size == (4, 2)
      colors.append(image.getpixel((0, 0)))
  assert colors == [(255, 0, 0), (255, 0, 0), (0, 0, 255), (0, 0, 255)]


def test_page_is_written_again_when_the_run_has_changed_until_it_has_ended(
  make_run, tmp_path, written
):
  folder = make_run("a", [], train=config_lib.Train(epochs=2))
  rows, seen = tmp_path / "a" / "metrics.jsonl", []
  judged = {"epoch": 2, "kind": "judge", "prompts": 4}
  comes = [eval_row(0, 0.125), None, train_row(1), train_row(2), judged]

  def sleep(seconds):
    assert seconds == 7.0
    seen.append(len(written))
    if (row := comes.pop(0)) is not None:
      with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")

  said = []
  path = watch.watch([folder], tmp_path / "out", every=7.0, say=said.append, sleep=sleep)
  # Waits for the first row, writes at each of the four, and not at the look at which nothing was new.
  assert seen == [0, 1, 1, 2, 3] and written == [7.0, 7.0, 7.0, 0.0]
  assert said[0] == "waits for the first evaluation"
  assert said[-1] == f"{path}: 2 epochs; all runs have ended"


def test_watch_that_is_interrupted_leaves_a_page_that_stays_as_it_is(make_run, tmp_path, written):
  def interrupt(seconds):
    raise KeyboardInterrupt

  folder = make_run("a", [eval_row(0, 0.125)])
  watch.watch([folder], tmp_path, every=7.0, say=lambda line: None, sleep=interrupt)
  assert written == [7.0, 0.0]
  with pytest.raises(ValueError, match="nowhere"):
    watch.watch(["nowhere"], tmp_path, every=7.0)


def test_page_of_a_running_run_loads_itself_again(make_run, tmp_path):
  groups = history.load_runs([make_run("a", [eval_row(0, 0.125)])])
  page.write_report(groups, tmp_path / "out", refresh=7.0)
  path = tmp_path / "out" / "report.html"
  assert '<meta http-equiv="refresh" content="7">' in path.read_text()
  page.write_report(groups, tmp_path / "out")
  assert "http-equiv" not in path.read_text()
  assert not [*tmp_path.glob("out/*.part"), *tmp_path.glob("out/.*")]
