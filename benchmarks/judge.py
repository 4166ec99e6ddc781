"""What runs have learned, on held-out prompts that no evaluation saw: python benchmarks/judge.py RUN ...

A table of the base model and every run, RUN or LABEL=RUN; runs of one label are seeds, and their mean is
shown with a 95 % interval. Scored by the ODE and by the stochastic sampler, at the steps of the recipe and at
twice as many; and at part of what was learned, base + a (learned - base), by the ODE. In brackets edge
density, which tells noise. A cell is the score of the first reward that evaluations report, over --prompts
pictures of fixed noise.
"""

import argparse
import sys

import numpy as np

from tpgrpo_jax.reporting import comparison, history
from tpgrpo_jax.runs import distributed
from tpgrpo_jax.training import evaluation, restore, scoring
from tpgrpo_jax.training import session as session_lib


def main() -> None:
  """Parses, evaluates and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", metavar="RUN")
  parser.add_argument("--weights", choices=tuple(restore.WEIGHTS), default="ema")
  parser.add_argument(
    "--prompts", type=int, default=0, help="0 is as many as judge a run at its end"
  )
  parser.add_argument("--strengths", default=".25,.5,.75", help="with commas; 1 is always there")
  args = parser.parse_args()
  groups = history.load_runs(args.runs)
  distributed.share_programs("")
  strengths = [float(text) for text in args.strengths.split(",") if text]
  columns = [(kind, times, 1.0) for kind in evaluation.SAMPLERS for times in (1, 2)]
  columns += [("ode", 1, strength) for strength in strengths]
  first = next(iter(groups.values()))[0]
  steps = first.config.eval.num_steps
  names = [f"{kind}, {times * steps} steps" for kind, times, _ in columns[:4]]
  names += [f"strength {strength:g}" for strength in strengths]
  rows = [("model", *names)]
  base = measure(first, columns[:4], args, is_base=True)
  rows.append(("base", *(show([cell]) for cell in base), *[""] * len(strengths)))
  for label, runs in groups.items():
    cells = [measure(run, columns, args) for run in runs]
    rows.append((f"`{label}`", *(show(column) for column in zip(*cells))))
  print(comparison.as_markdown(rows))


def measure(run, columns, args, *, is_base=False):
  """(score, edge density) of each column."""
  config, found = run.config, []
  prompts = scoring.load_split(config, "judge", count=args.prompts or config.eval.judge_prompts)
  seed = scoring.noise_seed(config, "judge", prompts)
  mesh = restore.mesh_here(config)
  reward_fn = session_lib.build_eval_rewards(config, mesh)
  reward_fn = reward_fn or session_lib.make_rewards(config, mesh, config.rewards)
  for kind, times, strength in columns:
    opened = restore.open_model(
      config, None if is_base else run.folder, prompts=prompts,
      **({} if is_base else {"weights": args.weights, "strength": strength}),
    )  # fmt: skip
    num_steps = times * config.eval.num_steps
    images = scoring.sample_images(opened, prompts, num_steps=num_steps, seed=seed, kind=kind)
    result = scoring.evaluate_images(images, opened.model.pipeline.show(prompts), reward_fn)
    mean = next(iter(result["rewards"].values()))["mean"]
    found.append((mean, result["image"]["image/edge_density"]))
    print(f"{opened.name}: {kind}, {num_steps} steps: {mean:.3f}", file=sys.stderr, flush=True)
  return found


def show(cells):
  """Score with its interval, and edge density, of one cell a seed."""
  scores, edges = np.array(cells).T
  return f"{comparison.estimate(scores)} ({f'{edges.mean():.3f}'.lstrip('0')})"


if __name__ == "__main__":
  main()
