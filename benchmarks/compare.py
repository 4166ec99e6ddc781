"""Methods against each other: python benchmarks/compare.py --methods flow_grpo,tempflow --seeds 3

Trains every method with every seed, as many runs at once as there are cores, and prints two tables for each
task: final and best held-out score, scores at equal evaluations and equal operations, with 95 % intervals
over seeds (tpgrpo_jax.reporting.comparison), image statistics, minutes, and differences to Flow-GRPO seed by
seed; and at which steps turning points are. Plots are in OUTPUT/TASK/report/report.html. A run has one core,
or --cores_per_run.

A method may have changed fields: --methods "tp_grpo,tp_grpo+credit.balance=False" compares it with itself.

--budget evaluations=61440 (or teraflops=..., of the model, teraflops_with_rewards=..., minutes=... of its
cores) gives every method as many epochs as it can pay: three epochs of each are run first, to see what one
takes. Without it every method has those of its recipe.

--keep FOLDER packs configs and metrics of the finished runs into FOLDER, a few kilobytes each;
--tables --output FOLDER reads them there.

The same command goes on where it was: what is finished is skipped, what was cut resumes. --tables trains
nothing. Ctrl-C and SIGTERM end the runs, which save first.
"""

import argparse
import os
import pathlib
import queue
import re
import signal
import statistics
import subprocess
import sys
import threading

from absl import flags
from ml_collections import config_flags

from tpgrpo_jax import command
from tpgrpo_jax import config as config_lib
from tpgrpo_jax.config import presets, rules
from tpgrpo_jax.reporting import comparison, history, page
from tpgrpo_jax.runs import metrics

HERE = pathlib.Path(__file__).parent
DAMAGE = (OSError, EOFError, ValueError)  # what files that are cut, or cannot be written, raise
CAN_BIND = hasattr(os, "sched_setaffinity")  # not on a Mac
# A process of a few cores: whoever starts it has many.
BOUND = (
  "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1].split(','))); "
  "os.execv(sys.argv[2], sys.argv[2:])"
)


PROBE = {
  "train.epochs": 3,
  "eval.every": 0,
  "eval.patience": 0,
  "eval.prompts": 1,
  "eval.judge_prompts": 0,
}
OWN = ("seed", "run.dir", "log.tensorboard")  # fields that every run has from here


def of_total(name):
  """What one epoch adds to a metric, from the rows of three."""
  return lambda rows: (rows[2][name] - rows[0][name]) / 2


BUDGETS = {
  "evaluations": of_total("total/evaluations"),
  "teraflops": of_total("total/teraflops"),
  "teraflops_with_rewards": of_total("total/teraflops_with_rewards"),
  "minutes": lambda rows: statistics.mean(row["time/epoch"] for row in rows[1:]) / 60,
}


def main() -> None:
  """Parses, trains and compares."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--tasks", default="tiny_text", help="names, with commas")
  parser.add_argument(
    "--methods", default="flow_grpo,tp_grpo,tempflow", help='NAME or NAME+FIELD=VALUE, or "all"'
  )
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--output", default="runs/compare", help="folder of the runs and reports")
  parser.add_argument("--cores", type=int, default=0, help="to use, of all runs; 0 is all")
  parser.add_argument("--cores_per_run", type=int, default=1, help="a rest of fewer is idle")
  parser.add_argument("--budget", type=parse_budget, help="of a run: evaluations=61440")
  parser.add_argument("--keep", help="folder for configs and packed metrics of what is finished")
  parser.add_argument(
    "--tables", action="store_true", help="of the runs that are there; trains none"
  )
  parser.add_argument(
    "fields", nargs="*", help="of all recipes: --config.train.epochs=12, after --"
  )
  args = parser.parse_args()
  tasks = args.tasks.split(",")
  methods = list(presets.METHODS) if args.methods == "all" else split_methods(args.methods)
  if args.seeds < 1:
    parser.error(f"--seeds {args.seeds}: must be at least 1")
  if args.cores < 0:
    parser.error(f"--cores {args.cores}: must be at least 0, which is all")
  for flag, folder in (("--output", args.output), ("--keep", args.keep)):
    if folder and pathlib.Path(folder).is_file():
      parser.error(f"{flag} {folder}: must be a folder, and is a file")
  for task in tasks:
    for method in methods:
      try:
        refuse_own(method, args.fields, args.budget)
        parse(task, method, args.fields)
      except (ValueError, TypeError, SyntaxError, flags.Error) as error:
        parser.error(f"{method} on {task}: {error}")
  output = pathlib.Path(args.output)
  for flag, folder in (("--output", None if args.tables else args.output), ("--keep", args.keep)):
    try:
      for task in tasks if folder else ():
        (pathlib.Path(folder) / task).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      parser.error(f"{flag} {folder}: cannot be written ({error}). Name another folder")
  failed = [] if args.tables else train(output, tasks, methods, args)
  for task in tasks if args.keep else ():
    keep(output / task, pathlib.Path(args.keep) / task, methods, failed)
  shown = [show(output / task, methods, failed) for task in tasks]
  if args.tables and not any(shown):
    sys.exit(f"error: --output {output}: has no finished run of these tasks and methods.")
  if failed:
    names = ", ".join(dict.fromkeys(failed))
    sys.exit(f"error: failed, as said above: {names}. What a run printed is in its train.log.")


def split_methods(text):
  """The methods of a list with commas; one in brackets, as in sampler.window=(0,2), parts nothing."""
  return re.split(r",(?![^(]*\))", text)


def parse_budget(text):
  """(name of BUDGETS, amount)."""
  name, _, amount = text.partition("=")
  try:
    found = name, float(amount)
  except ValueError:
    found = name, 0.0
  if name not in BUDGETS or not 0 < found[1] < float("inf"):
    raise argparse.ArgumentTypeError(
      f"{text!r}: must be {', '.join(f'{n}=N' for n in BUDGETS)}, with N > 0"
    )
  return found


def refuse_own(method, fields, budget):
  """Raises ValueError for a field that is not the user's: with one seed for all, seeds would be copies."""
  own = dict.fromkeys(OWN, "compare.py sets it for every run")
  if budget:
    own["train.epochs"] = "--budget sets it"
  changes = method.split("+")[1:] + [field.removeprefix("--config.") for field in fields]
  for name in (change.partition("=")[0] for change in changes):
    if name in own:
      raise ValueError(f"{name}: {own[name]}. Leave it out.")


def parse(task, method, fields):
  """The config of a run; raises ValueError, or an error of the flags, for what training would refuse."""
  presets.recipe(task, method.split("+")[0])  # raises for a name that there is not
  argv = ["train", *recipe_of(task, method), *fields]
  command.check_fields(config_lib.Config, argv)
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=argv, lock_config=True
  )
  command.refuse_arguments(values(argv))
  parsed = config_lib.from_config_dict(config_lib.Config, config.value)
  rules.validate(parsed)
  return parsed


def recipe_of(task, method):
  """The flags of training that name a recipe and its changes."""
  name, *changes = method.split("+")
  config = f"--config={HERE.parent / 'configs' / task}.py:{name}"
  return [config, *(f"--config.{change}" for change in changes)]


def train(output, tasks, methods, args):
  """Runs everything that is not finished; returns the names of what failed."""
  jobs = queue.SimpleQueue()
  for seed in range(args.seeds):  # all methods have their first seed first
    for task in tasks:
      for method in methods:
        jobs.put((task, method, seed))
  cores = sorted(os.sched_getaffinity(0)) if CAN_BIND else [*range(os.cpu_count() or 1)]
  shares = share_out(cores[: args.cores or None], args.cores_per_run)
  stop, alive, failed = threading.Event(), set(), []
  locks = {(task, method): threading.Lock() for task in tasks for method in methods}

  def end(*_):
    stop.set()
    for process in list(alive):
      process.send_signal(signal.SIGTERM)

  def fail(name, why):
    print(why, file=sys.stderr, flush=True)
    failed.append(name)

  def run(folder, task, method, seed, share, fields):
    """Whether the run is finished, which it may have been before."""
    if is_finished(folder) and is_judged(folder):
      if other := differences(folder, parse(task, method, [f"--config.seed={seed}", *fields])):
        fail(folder.name, f"{folder}: is finished with {other}. Another --output begins anew")
      return not other
    process = start(folder, task, method, seed, share, fields)
    alive.add(process)
    if stop.is_set():  # it came between the signal and its answer
      process.send_signal(signal.SIGTERM)
    status = process.wait()
    alive.discard(process)
    if status and not stop.is_set():
      fail(folder.name, f"{folder}: exit status {status}: {last_line(folder)}")
    else:
      print(f"{folder}: {'ended' if status else 'done'}", file=sys.stderr, flush=True)
    return not status

  def paid(task, method, share):
    """The fields that give a method the epochs that the budget pays; None if that cannot be seen."""
    if not args.budget:
      return []
    folder = output / task / f"probe_{method}"
    fields = [f"--config.{name}={value}" for name, value in PROBE.items()]
    with locks[task, method]:
      if not run(folder, task, method, 0, share, args.fields + fields):
        return None
    return [f"--config.train.epochs={affordable(folder, *args.budget)}"]

  def work(share):
    while not stop.is_set():
      try:
        task, method, seed = jobs.get_nowait()
      except queue.Empty:
        return
      folder = output / task / f"{method}_s{seed}"
      try:
        fields = paid(task, method, share)
        if fields is not None and not stop.is_set():
          run(folder, task, method, seed, share, args.fields + fields)
      except (*DAMAGE, LookupError) as error:  # the other runs go on
        fail(folder.name, f"{folder}: {error}")

  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, end)
  workers = [threading.Thread(target=work, args=(share,)) for share in shares]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  if stop.is_set():
    sys.exit("error: ended; the same command goes on.")
  return failed


def share_out(cores, each):
  """The cores of each run that goes on at the same time."""
  if not 1 <= each <= len(cores):
    sys.exit(f"error: --cores_per_run {each}: must be 1 to {len(cores)}, the cores to use.")
  return [cores[i : i + each] for i in range(0, len(cores) - each + 1, each)]


def start(folder, task, method, seed, share, fields):
  """The training process of one run, on its share of the cores; what it prints is in train.log."""
  folder.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "tpgrpo_jax.train", *recipe_of(task, method)]
  command += [
    f"--config.seed={seed}",
    f"--config.run.dir={folder}",
    "--config.log.tensorboard=False",
  ]
  bound = bound_to(share) if CAN_BIND else []
  environment = {"JAX_PLATFORMS": "cpu"} | os.environ
  with (folder / "train.log").open("a") as log:
    return subprocess.Popen(
      bound + command + fields,
      stdout=log,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,
    )


def last_line(folder):
  """Of what a run has printed."""
  lines = (folder / "train.log").read_text().splitlines()
  return lines[-1] if lines else "it has printed nothing"


def bound_to(share):
  """What stands before a command whose process and threads keep to these cores."""
  return [sys.executable, "-c", BOUND, ",".join(map(str, share))]


def affordable(folder, kind, amount):
  """How many whole epochs an amount pays, by the rows of a probe; ValueError where that is none."""
  rows = [row for row in metrics.rows_of(folder) if row["kind"] == "train"]
  if len(rows) != PROBE["train.epochs"]:
    raise ValueError(
      f"{folder}: has {len(rows)} rows of epochs, not 3. Delete it; it is made again."
    )
  try:
    each = BUDGETS[kind](rows)
  except KeyError as error:
    raise ValueError(
      f"--budget {kind}: a reward of {folder} does not say what it takes (docs/bring_your_own.md, "
      "reward.flops). Use teraflops, which are the model's alone."
    ) from error
  if not each <= amount < 1e6 * each:
    raise ValueError(
      f"--budget {kind}={amount:g}: must pay 1 to a million epochs, of which each takes {each:g}. Give "
      "another amount."
    )
  return int(amount / each + 1e-6)


def is_finished(folder):
  """Whether the run's last epoch is evaluated, or it has ended for want of progress."""
  rows = metrics.rows_of(folder)
  if any(row["kind"] == "judge" for row in rows):
    return True
  last = max((row["epoch"] for row in rows if row["kind"] == "eval"), default=-1)
  return last >= 0 and last >= history.load_run_config(folder).train.epochs


def differences(folder, asked):
  """Where a run had another recipe or length than is asked for: "train.epochs=3, not 9"."""
  kept = history.load_run_config(folder)
  found = history.differences([kept, asked])
  if kept.train.epochs != asked.train.epochs:
    found["train.epochs"] = [kept.train.epochs, asked.train.epochs]
  return ", ".join(f"{name}={has}, not {wanted}" for name, (has, wanted) in found.items())


def is_judged(folder):
  """Whether a finished run was not killed before its judging, which the same command then does."""
  judged = any(row["kind"] == "judge" for row in metrics.rows_of(folder))
  return judged or not history.load_run_config(folder).eval.judge_prompts


def keep(folder, target, methods, failed):
  """Packs the finished runs of a task; names of those that cannot be go to `failed`."""
  for method in methods:
    for run in sorted(folder.glob(f"{method}_s*")):
      try:
        if is_finished(run):
          metrics.pack(run, target / run.name)
      except DAMAGE as error:
        print(f"--keep {target / run.name}: {error}", file=sys.stderr)
        failed.append(run.name)


def show(folder, methods, failed):
  """Prints the task's tables and writes its report, of the finished runs; False if there are none.

  Names of runs that cannot be read go to `failed`.
  """
  runs = []
  for method, run in ((m, run) for m in methods for run in sorted(folder.glob(f"{m}_s*"))):
    try:
      if is_finished(run):
        history.load_run(run)
        runs.append(f"{method}={run}")
      elif metrics.rows_of(run):
        print(f"{run}: not finished, so not in the tables", file=sys.stderr)
    except DAMAGE as error:
      print(f"{run}: not in the tables: {error}", file=sys.stderr)
      failed.append(run.name)
  if not runs:
    print(f"{folder}: no finished runs yet", file=sys.stderr)
    return False
  groups = history.load_runs(runs)
  print(f"\n## {folder.name}\n")
  for reward in history.reward_labels(groups):
    print(f"Held-out {reward}:\n\n{comparison.as_markdown(comparison.table(groups, reward))}\n")
  if rows := comparison.turning_points(groups):
    print(f"Share of samples with a turning point:\n\n{comparison.as_markdown(rows)}\n")
  print(f"Plots: {page.write_report(groups, folder / 'report')}")
  return True


if __name__ == "__main__":
  main()
