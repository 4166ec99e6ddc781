"""The training loop: resume, evaluate, train, save."""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import re
import tempfile
import time
from typing import Any

from etils import epath
import jax
from PIL import Image
import tqdm

from tpgrpo_jax import config as config_lib
from tpgrpo_jax.runs import best as best_lib
from tpgrpo_jax.runs import boards, checkpoint, metrics, preemption, processes, run_folder
from tpgrpo_jax.training import announcement, calibration, evaluation, judging, notices, progress
from tpgrpo_jax.training import epoch as epoch_lib
from tpgrpo_jax.training import session as session_lib

GRID_IMAGES = 32


def train(config: config_lib.Config, *, announced: bool = False) -> dict[str, float]:
  """Trains, or resumes when the run folder holds a checkpoint of the same config.

  Args:
    config: of the run.
    announced: the caller has said `announcement.start` already, before it imported this module.

  Returns:
    The last evaluation's scores and image statistics.

  Raises:
    ValueError: a config that cannot run, or a run folder made by another one.
    RewardError: a reward gave up or returned what cannot be trained on; the run can be resumed.
    Preempted: the process was asked to end; the finished epochs are saved.
  """
  config = config_lib.name_run(config)
  boards.check(config.log)
  run_dir = config.run.dir
  with (
    run_folder.named_errors(run_dir),
    jax.enable_x64(False),  # whatever the environment or a notebook says
    contextlib.ExitStack() as held,
  ):

    def open_folder():
      with run_folder.named_errors(run_dir):
        held.enter_context(run_folder.hold(run_dir))
        run_folder.check_config(run_dir, config)

    processes.on_first(open_folder)
    if not announced:
      progress.say(announcement.start(config))
    session = session_lib.open_session(config, _announce(config))
    with preemption.watch() as notice:
      return _train_in_folder(session, notice)


def _announce(config):
  return lambda model, method: progress.say(notices.opened(config, model, method))


def _train_in_folder(session, notice):
  """Resumes or starts, and trains to the end, or until it is asked to end."""
  config, run_dir = session.config, epath.Path(session.config.run.dir)
  with (
    jax.set_mesh(session.mesh),
    _open_checkpoints(run_dir, config.checkpoint) as checkpoints,
  ):
    run_folder.check_length(run_dir, config.train.epochs, checkpoints.latest())
    run_folder.save_config(run_dir, config)
    on_chunk = functools.partial(preemption.agree, notice)
    began = time.perf_counter()
    session = calibration.calibrated(session, on_chunk)
    before = time.perf_counter() - began
    session.old_scores.load(run_dir)
    state, totals = _restore_or_start(session, checkpoints, before)
    # Rows carry the number of finished epochs; a fresh start keeps none, not even that of epoch 0.
    done = int(totals["epoch"])
    next_epoch = done + 1 if done else 0
    dropped = run_folder.truncate_metrics(run_dir / "metrics.jsonl", next_epoch)
    if dropped:
      why = (
        f"after epoch {done}, its newest checkpoint" if done else "of a run without a checkpoint"
      )
      progress.say(f"{run_dir}: drops {dropped} rows of metrics.jsonl {why}; they will come again")
    with (
      metrics.MetricsLog(
        run_dir, config.log, dataclasses.asdict(config), next_epoch=next_epoch
      ) as sink,
      contextlib.closing(
        best_lib.BestWeights(
          run_dir, config.checkpoint.best, start=not done, kind=_kind_of_evaluation(config)
        )
      ) as best,
    ):
      try:
        return _train(session, state, totals, checkpoints, best, sink, run_dir, notice)
      except preemption.Preempted as ended:
        ended.epoch = checkpoints.latest() or 0
        raise


def _kind_of_evaluation(config):
  """What makes scores of two evaluations comparable."""
  settings = config.eval
  return {"prompts": settings.prompts, "num_steps": settings.num_steps, "rewards": settings.rewards}


def _open_checkpoints(run_dir, settings):
  return checkpoint.RunCheckpoints(
    run_dir, every=settings.every, keep=settings.keep, keep_every=settings.keep_every
  )


def _restore_or_start(session, checkpoints, before):
  """(state, totals) of the newest checkpoint, or of a run that begins, `before` seconds of it ago."""
  config, run_dir = session.config, session.config.run.dir
  if checkpoints.latest() is None:
    state = session_lib.init_state(session)
    totals = {"epoch": 0, "samples": 0, "seconds": before} | calibration.spent(session)
  else:
    state, totals = checkpoints.restore(session_lib.abstract_state(session))
    session_lib.check_files(session, totals)
    if processes.is_first():
      tqdm.tqdm.write(f"{run_dir}: resumes after epoch {totals['epoch']} of {config.train.epochs}")
  return state, totals | {k: identity for k, (_, identity) in session_lib.files_of(session).items()}


def _train(session, state, totals, checkpoints, best, sink, run_dir, notice):
  """From `totals` to the last epoch, or to the one at which nothing has become better for long."""
  config = session.config
  on_chunk = functools.partial(preemption.agree, notice)
  saved_on_failure = functools.partial(_saved_on_failure, checkpoints, notice)

  def evaluate():
    with saved_on_failure(state, totals):
      row = _evaluate(session, state, totals, best, sink, run_dir, on_chunk)
      noticed.evaluation(row)
      return row

  has_stalled = functools.partial(
    best.has_stalled, every=config.eval.every, patience=config.eval.patience
  )
  noticed = notices.Notices(config)
  first, row = totals["epoch"], _last_row(run_dir, "eval")
  clock = time.perf_counter() - totals["seconds"]
  # The row is missing at the start, and where a run was cut between a checkpoint and its evaluation.
  if is_due(config, first) and row.get("epoch") != first:
    row = evaluate()
  quiet = not processes.is_first()
  hidden = True if quiet else None  # None: where stderr is no terminal
  with tqdm.tqdm(total=config.train.epochs, initial=first, desc="epochs", disable=hidden) as bar:
    for epoch in range(first, config.train.epochs):
      if is_due(config, epoch) and has_stalled(epoch):
        checkpoints.save(epoch, state, totals, force=True)
        if not quiet:
          tqdm.tqdm.write(
            f"{run_dir}: ends after epoch {epoch}: the best evaluation was after epoch {best.epoch} "
            f"(eval.patience={config.eval.patience})"
          )
        break
      with _profiled(config, epoch):
        with saved_on_failure(state, totals):
          sampled = epoch_lib.sample_epoch(session, state, epoch, on_chunk)
        try:
          state, train_row = epoch_lib.update_epoch(session, state, epoch, sampled)
        except Exception as error:  # the state that it began from is used up
          error.add_note(_what_is_kept(checkpoints, epoch))
          raise
      if processes.is_first() and config.log.images_every and epoch % config.log.images_every == 0:
        epoch_lib.save_rollout(run_dir, epoch + 1, sampled)
      totals["evaluations"] += round(sampled.evaluations * len(sampled.rollout.prompts))
      totals["samples"] += len(sampled.rollout.prompts)
      _add_rewards(totals, session, sampled.rollout)
      del sampled  # its trajectories leave the devices before the next ones are made
      totals["flops"] = totals.get("flops", 0.0) + session.meter.total()
      totals |= {"epoch": epoch + 1, "seconds": time.perf_counter() - clock}
      sink.write({"epoch": epoch + 1, "kind": "train", **totals_row(totals), **train_row})
      session.old_scores.save(run_dir)
      noticed.epoch(train_row)
      checkpoints.save(epoch + 1, state, totals, force=epoch + 1 == config.train.epochs)
      if checkpoints.preempted:
        checkpoints.wait()
        raise preemption.Preempted
      if is_due(config, epoch + 1):
        row = evaluate()
        totals["seconds"] = time.perf_counter() - clock
      shown = f"reward {train_row['reward/mean']:.3f}, held_out {_shown(row)}"
      bar.set_postfix_str(shown, refresh=False)
      bar.update()
      if bar.disable:  # a log file has whole lines
        progress.say(
          f"epoch {epoch + 1}/{config.train.epochs}: {shown}, {train_row['time/epoch']:.1f} s"
        )
  checkpoints.wait()  # what is said at the end stands on what was saved
  with saved_on_failure(state, totals):
    _judge(session, state, totals, best, sink, run_dir, on_chunk)
  return {name: value for name, value in row.items() if name.startswith(("reward/", "image/"))}


def is_due(config, done):
  """Whether the weights after `done` epochs are evaluated."""
  every = config.eval.every
  return done in (0, config.train.epochs) or bool(every and done % every == 0)


def _last_row(run_dir, kind):
  """The newest row of this kind, with its epoch, for all processes; {} where there is none."""
  rows = metrics.rows_of(run_dir) if processes.is_first() else []
  row = next((row for row in reversed(rows) if row["kind"] == kind), {})
  return processes.from_first(row)


@contextlib.contextmanager
def _saved_on_failure(checkpoints, notice, state, totals):
  """Keeps the finished epochs when what follows is not finished, whatever checkpoint.every says."""
  try:
    yield
  except Exception:
    epoch = totals["epoch"]
    if epoch and (notice.agreed or jax.process_count() == 1):  # else the others do not save
      checkpoints.save(epoch, state, totals, force=True)
      checkpoints.wait()
    raise


def _what_is_kept(checkpoints, done):
  """Where a run stands that fails in the update after `done` epochs."""
  checkpoints.wait()
  kept = checkpoints.latest() or 0
  newest = f"The newest checkpoint is that of epoch {kept}" if kept else "No checkpoint was saved"
  lost = f", and what came after it is lost: {done - kept} finished epochs" if done > kept else ""
  return f"{newest}{lost}. checkpoint.every says how often one is saved."


@contextlib.contextmanager
def _profiled(config, epoch):
  """Traces the epoch that log.profile names."""
  if epoch + 1 != config.log.profile:
    yield
    return
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      yield
    for file in filter(pathlib.Path.is_file, pathlib.Path(folder).rglob("*")):
      name = file.relative_to(folder)
      run_folder.write(epath.Path(config.run.dir) / "profile" / name, file.read_bytes())


def totals_row(totals: dict[str, Any]) -> dict[str, Any]:
  """What a run has spent so far, under the names of the metrics."""
  flops, of_rewards = totals.get("flops", 0.0), totals.get("reward_flops")
  row = {
    "total/evaluations": totals["evaluations"],
    "total/samples": totals["samples"],
    "total/scored": totals.get("scored", 0),
    "total/teraflops": flops / 1e12,
    "time/total": totals["seconds"],
  }
  if of_rewards is not None:
    row["total/teraflops_with_rewards"] = (flops + of_rewards) / 1e12
  return row


def _add_rewards(totals, session, rolled):
  """Counts the pictures that were scored and, as long as all rewards say it, what scoring them took."""
  totals["scored"] = totals.get("scored", 0) + rolled.scored
  spent = totals.get("reward_flops")
  more = session.reward_fn.flops(rolled.scored, rolled.images.shape[1:3])
  totals["reward_flops"] = None if spent is None or more is None else spent + more


def _judge(session, state, totals, best, sink, run_dir, on_chunk):
  """Writes the row that ends a run and says what was learned, unless it is there already."""
  epoch = totals["epoch"]
  row = _last_row(run_dir, "judge")
  if session.evaluate_unseen is None:
    if processes.is_first():
      rows = [row for row in metrics.rows_of(run_dir) if row["kind"] == "eval"]
      rows = metrics.comparable(rows, rows[-1]) if rows else []
      folder = session.config.run.dir
      tqdm.tqdm.write(judging.summary_of_evaluations(folder, rows, best.epoch))
    return
  if row.get("epoch") != epoch:
    weights = {"base": session.model.trainable, "last": state.ema}
    if best.epoch is not None:
      abstract = session_lib.abstract_state(session).ema
      is_last = best.epoch == epoch
      weights["best"] = state.ema if is_last else best_lib.load(run_dir, abstract)[0]
    evaluate = lambda trainable: session.evaluate_unseen(session.model.params(trainable), on_chunk)
    row: dict[str, Any] = {"epoch": epoch, "kind": "judge"}
    row |= {} if best.epoch is None else {"best/epoch": best.epoch}
    row["prompts_evaluated"] = judging.count_evaluated(session.unseen, session.held_out)
    row |= judging.judge(evaluate, weights)
    sink.write(row)
  if processes.is_first():
    tqdm.tqdm.write(judging.summary(session.config.run.dir, row))


def _evaluate(session, state, totals, best, sink, run_dir, on_chunk):
  """Keeps the weights if they are the best, then writes the row and a sample grid."""
  result = session.evaluate(session.model.params(state.ema), on_chunk)
  number = totals["epoch"]
  settings, updates = session.config, number * session.config.train.updates_per_epoch
  row = {"epoch": number, "kind": "eval", "update": updates, **totals_row(totals), **result.row}
  count = len(result.prompts)
  row |= {
    "ema/moves": updates // settings.ema.every,
    "prompts": count,
    "num_steps": settings.eval.num_steps,
  }
  rows = metrics.rows_of(run_dir) if processes.is_first() else []
  earlier = [r for r in rows if r["kind"] == "eval" and r["epoch"] < number]
  earlier = metrics.comparable(earlier, row)
  if settings.checkpoint.best:
    row |= notices.below_best(settings.checkpoint.best, result.row, count, earlier)
  # Before its row: where the row is missing, a resumed run evaluates again.
  best.offer(number, state.ema, result.row)
  sink.write(row)
  if not processes.is_first():
    return row
  images, captions = result.images[:GRID_IMAGES], evaluation.captions(result)[:GRID_IMAGES]
  sheet = evaluation.grid(images, captions)
  content = io.BytesIO()
  Image.fromarray(sheet).save(content, "PNG")
  said = json.dumps(evaluation.describe(result, GRID_IMAGES), ensure_ascii=False)
  run_folder.write(run_dir / "images" / f"eval_{number:05d}.json", said.encode())
  run_folder.write(run_dir / "images" / f"eval_{number:05d}.png", content.getvalue())
  lines = [" | ".join(filter(None, caption)) for caption in captions]
  sink.pictures("eval/samples", sheet, images, lines, number)
  return row


def _shown(row):
  means = {k.split("/")[1]: v for k, v in row.items() if re.fullmatch(r"reward/[^/]+/mean", k)}
  return evaluation.named(means)
