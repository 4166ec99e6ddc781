"""Draws docs/images/one_epoch.png from the model that ships: python docs/images/make_one_epoch.py

Everything in it is computed by the functions that training calls, on one held-out word. Needs the
OCR extra (pip install -e '.[ocr]').
"""

import dataclasses
import pathlib

import jax
from matplotlib import patches
from matplotlib import pyplot as plt
import numpy as np

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import rewards
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.runs import processes
from tpgrpo_jax.training import build, rollout, step
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

OUTPUT = pathlib.Path(__file__).parent / "one_epoch.png"
NUM_STEPS, WINDOW, GROUP = 6, 5, 16
CANDIDATES = 24  # held-out words to choose the one with most turning points from
BLUE, ORANGE, GRAY = "#2a6fbb", "#d9661f", "#8a8a8a"


def main() -> None:
  """Samples one group and draws it."""
  base = config_lib.Config()
  config = dataclasses.replace(
    base,
    sampler=dataclasses.replace(base.sampler, num_steps=NUM_STEPS, window=(0, WINDOW)),
    credit=dataclasses.replace(base.credit, balance=False),
    train=dataclasses.replace(base.train, group_size=GROUP, microbatch=GROUP),
  )
  mesh = mesh_lib.make_mesh(config.mesh)
  prompts = prompts_lib.load_prompts("words", "", "test")
  model = build.build_model(config, mesh, [prompts[i].text for i in range(CANDIDATES)])
  method = method_lib.build_method(config, model)
  place = np.arange(WINDOW, dtype=np.int32)
  plan = method_lib.build_plan(config, method, place)
  sample = rollout.make_rollout_fn(config, model, method)
  reward_fn = rewards.make_rewards(config.rewards, placement=mesh_lib.make_placement(mesh))
  credit_fn = step.make_credit_fn(config, method)
  params = model.params(model.trainable)
  key = rollout.epoch_key(config.seed, 0)

  def sample_group(number: int) -> dict:
    """Rollout, rewards, credit and advantages of one prompt."""
    texts = [prompts[number].text] * GROUP
    noise = np.stack([np.full(GROUP, number), np.arange(GROUP)], axis=1).astype(np.int32)
    placed = (noise, method_lib.build_condition(config, model, texts))
    placed = processes.put_batch(mesh, placed)
    trajectory, images = jax.device_get(sample(params, key, number, *placed, place, plan))
    images = images.swapaxes(0, 1)
    flat = images.reshape(-1, *images.shape[2:])
    metadata = [prompts[number].metadata] * len(flat)
    reward, _, _ = reward_fn(flat, texts * len(images), metadata)()
    reward = reward.reshape(len(images), GROUP)
    credit, advantage, _ = jax.device_get(credit_fn(reward[None], np.ones(1, np.float32), {}))
    states = trajectory.states[..., 0]
    found = dict(word=texts[0], states=states, images=images, reward=reward)
    return found | dict(turns=credit.is_turning_point, advantage=advantage)

  with jax.set_mesh(mesh):
    groups = [sample_group(number) for number in range(CANDIDATES)]
  group = max(groups, key=lambda g: g["turns"][1:].sum())
  draw(group, plan).savefig(OUTPUT, dpi=110)
  print(f"written to {OUTPUT}, of the word {group['word']}")


def draw(group: dict, plan) -> plt.Figure:
  """The figure of one group."""
  turns = group["turns"]
  chosen = int(turns[1:].sum(axis=0).argmax())
  figure = plt.figure(figsize=(12.5, 9.2), layout="constrained")
  top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1.0, 1.0, 2.3))
  states = top.subplots(1, WINDOW + 1)
  for k, axes in enumerate(states):
    axes.imshow(group["states"][k, chosen], cmap="gray", vmin=-2, vmax=2)
    axes.set_title(f"x[{k}], sigma {1 - k / NUM_STEPS:.2f}", fontsize=9)
  top.suptitle(
    f"1  Rollout: {WINDOW} stochastic steps, then an ODE step (sample {chosen} of the {GROUP} of the word "
    f"{group['word']})",
    x=0.01,
    ha="left",
  )
  for k, axes in enumerate(middle.subplots(1, WINDOW + 1)):
    axes.imshow(group["images"][k, chosen])
    what = "the trajectory's own image" if k == WINDOW else f"completion of x[{k}]"
    axes.set_title(f"{what}\nR[{k}] = {group['reward'][k, chosen]:.2f}", fontsize=9)
  middle.suptitle("2  The state after every step is completed with the ODE, and read by the OCR")
  middle._suptitle.set(x=0.01, ha="left")
  for axes in (*top.axes, *middle.axes):
    axes.set(xticks=[], yticks=[])
  left, centre, right = bottom.subplots(1, 3, width_ratios=(1.0, 1.25, 1.1))
  draw_lanes(left, plan)
  draw_rewards(centre, group["reward"], turns, chosen)
  draw_advantages(right, bottom, group["advantage"], turns)
  return figure


def draw_lanes(axes, plan) -> None:
  """Which completion each lane computes in each step of the packed scan."""
  length, lanes = plan.load.shape
  current = np.full(lanes, -1)
  colors = plt.get_cmap("Blues")(np.linspace(0.35, 0.85, WINDOW))
  for row in range(length):
    current = np.where(plan.load[row] >= 0, plan.load[row], current)
    for lane in range(lanes):
      box = patches.Rectangle((row, lane), 1, 1, facecolor=colors[current[lane]], edgecolor="white")
      axes.add_patch(box)
      axes.text(row + 0.5, lane + 0.5, f"x[{current[lane]}]", ha="center", va="center", color="w")
  axes.set(xlim=(0, length), ylim=(lanes, 0), xlabel="step of the packed scan", ylabel="lane")
  axes.set_xticks(np.arange(length) + 0.5, range(1, length + 1))
  axes.set_yticks(np.arange(lanes) + 0.5, range(1, lanes + 1))
  axes.set_title("2  packed: one scan, here without an idle slot", fontsize=10, loc="left")


def draw_rewards(axes, reward, turns, chosen: int) -> None:
  """R[k] of the whole group, one trajectory and its turning points in front."""
  steps = np.arange(WINDOW + 1)
  for sample in range(GROUP):
    axes.plot(steps, reward[:, sample], color=GRAY, lw=0.7, alpha=0.5)
  axes.plot(steps, reward[:, chosen], color=BLUE, lw=2, marker="o", label="the trajectory above")
  for number, k in enumerate(np.flatnonzero(turns[:, chosen])):
    axes.annotate(
      "",
      xy=(k + 1, reward[k + 1, chosen]),
      xytext=(k, reward[k, chosen]),
      arrowprops={"arrowstyle": "-|>", "color": ORANGE, "lw": 2.5},
    )
    label = "turning point: step is paid R[W] - R[k]" if not number else None
    axes.plot([], [], color=ORANGE, lw=2.5, label=label)
  axes.set(xlabel="k stochastic steps taken", ylabel="R[k]", ylim=(-0.05, 1.3), xticks=steps)
  axes.legend(loc="upper left", fontsize=8, frameon=False)
  axes.set_title("3  Who gets the credit", fontsize=10, loc="left")


def draw_advantages(axes, figure, advantage, turns) -> None:
  """The advantage of every (step, sample); turning points are framed."""
  limit = np.abs(advantage).max()
  image = axes.imshow(advantage, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
  for k, sample in zip(*np.nonzero(turns)):
    frame = patches.Rectangle((sample - 0.5, k - 0.5), 1, 1, fill=False, edgecolor=ORANGE, lw=1.6)
    axes.add_patch(frame)
  axes.set(xlabel=f"the {GROUP} samples of the group", ylabel="step k", yticks=range(WINDOW))
  axes.set_title(
    "4  Advantage within the group, per step\n5  Update: every cell is a term of the loss",
    fontsize=10,
    loc="left",
  )
  figure.colorbar(image, ax=axes, shrink=0.8)


if __name__ == "__main__":
  main()
