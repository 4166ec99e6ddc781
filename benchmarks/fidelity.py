"""How well cheap completions stand for exact ones: python benchmarks/fidelity.py [--run RUN_DIR]

The same trajectories, completed exactly and in other ways, read by the run's own rewards. For each way:

evaluations    of the model, a sample
increments     correlation of d[k] = R[k+1] - R[k] with the exact ones, over all steps and samples
within         the same within each prompt's group and step, which is what an advantage sees
turning        turning points (Def. 4.1) that both have, over those that either has
final          correlation with the exact R[k] itself

Prints a table, and one JSON line for each way. Without --run: the built-in model before training, or another
recipe's with --config; the increments' own sampling error is the spread over --parts parts of the prompts.
--decoder names a small decoder of the completions (completion.decoder), and adds it, with exact completions
and with those of two steps.
"""

import argparse
import dataclasses
import importlib.util
import json

import jax
import numpy as np

from tpgrpo_jax.config import presets, rules
from tpgrpo_jax.credit import stepwise, turning_point
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import restore, rollout
from tpgrpo_jax.training import session as session_lib

EXACT = {
  "completion.steps": 0,
  "completion.solver": "euler",
  "completion.strides": (),
  "completion.decoder": "",
}
WAYS = [
  *({"completion.steps": n} for n in (1, 2, 3, 4, 5)),
  *({"completion.steps": n, "completion.solver": "dpmpp_2m"} for n in (3, 4, 5)),
  *({"completion.steps": n, "completion.solver": "dpmpp_2m_history"} for n in (2, 3, 4)),
  *({"completion.strides": (stride,)} for stride in (2, 3)),
]


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_arguments(parser)
  parser.add_argument("--decoder", default="", help="folder or hub id of an AutoencoderTiny")
  parser.add_argument("--parts", type=int, default=4, help="of the prompts, for the spread")
  args = parser.parse_args()
  session, params = open_session(args, args.decoder)
  exact, _ = rewards_of(session, params, EXACT)
  rows = []
  small = [{"completion.decoder": args.decoder, "completion.steps": n} for n in (0, 2)]
  for way in WAYS + small * bool(args.decoder):
    if 0 < way.get("completion.steps", 0) >= args.num_steps:
      continue
    found, evaluations = rewards_of(session, params, EXACT | way)
    parts = [compare(exact[:, part], found[:, part], args.group) for part in parts_of(exact, args)]
    row = {"way": name_of(way), "evaluations": evaluations}
    row |= {k: [float(np.mean(v)), float(np.std(v))] for k, v in stack(parts).items()}
    print(json.dumps(row), flush=True)
    rows.append(row)
  print(table(rows))


def add_arguments(parser):
  """What says whose trajectories, and how many."""
  parser.add_argument("--run", default="", help="a run folder: its newest checkpoint, EMA weights")
  parser.add_argument("--config", default="configs/tiny_text.py", help="recipe, without --run")
  parser.add_argument("--num-steps", type=int, default=8, help="T; all but the last are stochastic")
  parser.add_argument("--prompts", type=int, default=16)
  parser.add_argument("--group", type=int, default=8, help="samples a prompt")


def open_session(args, decoder=""):
  """(session, params) of a run, or of the recipe's base model; with a small decoder of completions."""
  recipe = None if args.run else load_recipe(args.config)
  config = restore.choose_config(args.run, recipe)
  last = args.num_steps - 1
  config = presets.apply(
    config,
    {
      "sampler.rollout": "trajectory",
      "sampler.branches": 1,
      "sampler.num_steps": args.num_steps,
      "sampler.window": (0, last),
      "sampler.window_range": (),
      "credit.method": "increments",
      "completion.decoder": decoder,
      "advantage.group": "prompt",
      "loss.chunks": (),
      "train.prompts_per_epoch": args.prompts,
      "train.group_size": args.group,
      "train.microbatch": args.prompts * args.group // 2,
      "train.updates_per_epoch": 2,
      "train.epochs": 1,
      "eval.prompts": 1,
    },
  )
  rules.validate(config)
  session = session_lib.open_session(config)
  params = session.model.params(session.model.trainable)
  if args.run:
    decoders = {name: params[name] for name in ("decoder", "completion_decoder")}
    params = restore.open_model(config, args.run).params | decoders
  return session, params


def load_recipe(path):
  """The ConfigDict of a recipe file, "file.py:method"."""
  file, _, method = path.partition(":")
  spec = importlib.util.spec_from_file_location("recipe", file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*[method] * bool(method))


def rewards_of(session, params, way):
  """(R [W+1, B], evaluations a sample) of the same trajectories, completed in one way."""
  rolled, evaluations = make_roll(session, params, way)(0)
  return rolled.completion_reward[0], evaluations


def make_roll(session, params, way):
  """Returns epoch -> (its Rollout, evaluations a sample), with completions made in one way."""
  config, model = presets.apply(session.config, way), session.model
  if not config.completion.decoder:
    around = model.pipeline._replace(decode_completions=None)
    model = dataclasses.replace(model, pipeline=around)
  method = method_lib.build_method(config, model)
  sample = rollout.make_rollout_fn(config, model, method)

  def roll(epoch):
    place = method_lib.draw_place(config, epoch, 0)
    plan = method_lib.build_plan(config, method, place)
    indices = session_lib.epoch_indices(config, epoch, len(session.train_prompts))
    prompts = [session.train_prompts[int(i)] for i in np.repeat(indices, config.train.group_size)]
    key = rollout.epoch_key(config.seed, epoch)
    with jax.set_mesh(session.mesh):
      rolled = rollout.collect(
        config,
        model,
        method,
        session.mesh,
        lambda chunk, group, condition: sample(
          params, key, chunk, group, condition, place.astype(np.int32), plan
        ),
        session.reward_fn,
        prompts,
      )
    return rolled, method_lib.evaluations_per_sample(config, method, plan, place)

  return roll


def parts_of(exact, args):
  """Columns of each part of the prompts."""
  prompts = np.array_split(np.arange(args.prompts), args.parts)
  return [(p[:, None] * args.group + np.arange(args.group)).ravel() for p in prompts]


def compare(exact, found, group):
  """The figures of one part, of R [W+1, B] both."""
  true, cheap = (np.asarray(stepwise.increments(r)) for r in (exact, found))
  centred = lambda d: (
    d.reshape(len(d), -1, group) - d.reshape(len(d), -1, group).mean(-1, keepdims=True)
  )
  turns = [np.asarray(turning_point.turning_points(r)) for r in (exact, found)]
  either = (turns[0] | turns[1]).sum()
  return {
    "increments": correlation(true, cheap),
    "within": correlation(centred(true), centred(cheap)),
    "turning": (turns[0] & turns[1]).sum() / max(either, 1),
    "final": correlation(exact[:-1], found[:-1]),
  }


def correlation(a, b):
  """Pearson's, 0 where one of them is constant."""
  a, b = a.ravel(), b.ravel()
  return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0


def stack(parts):
  """name -> values of all parts."""
  return {name: [part[name] for part in parts] for name in parts[0]}


def name_of(way):
  """A few words for one way."""
  if strides := way.get("completion.strides"):
    return f"stride {strides[0]}"
  if way.get("completion.decoder"):
    return f"{way['completion.steps'] or 'all'} steps, small decoder"
  return f"{way['completion.steps']} steps, {way.get('completion.solver', 'euler')}"


def table(rows):
  """The figures as Markdown, mean and spread over the parts."""
  names = ("increments", "within", "turning", "final")
  lines = ["| completions | evaluations | " + " | ".join(names) + " |", "| --- " * 6 + "|"]
  for row in rows:
    cells = [f"{row[n][0]:.2f} +- {row[n][1]:.2f}" for n in names]
    lines.append(f"| {row['way']} | {row['evaluations']:g} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
