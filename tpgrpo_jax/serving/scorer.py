"""The workers of one reward: requests wait their turn, and those of devices are scored together."""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import logging
import queue
import threading
import time
from typing import Any, NamedTuple

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.rewards import combine, wire

log = logging.getLogger(__name__)

ParseFn = Callable[[], list[wire.Batch]]


class Scored(NamedTuple):
  """What a request is answered with: scores float32 [N] and an info, in the request's own order."""

  scores: np.ndarray
  info: dict[str, Any]


@dataclasses.dataclass
class _Job:
  """A request that waits: its body is unpacked when its turn comes, so that waiting costs no memory."""

  parse: ParseFn
  future: futures.Future
  batches: list[wire.Batch] = dataclasses.field(default_factory=list)
  results: dict[int, tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=dict)


class Scorer:
  """A reward with its threads, opened when it is made.

  Attributes:
    label: of the reward.
    canary: the pair that tells whether it is well, or None.
  """

  def __init__(
    self,
    label: str,
    reward_fn: combine.CombinedRewardFn,
    *,
    workers: int,
    together: int = 0,
    canary: canary_lib.Canary | None = None,
  ):
    """Starts the workers.

    Args:
      label: of the reward.
      reward_fn: as of `rewards.make_rewards`, of this reward alone with weight 1.
      workers: how many requests are scored at the same time.
      together: pictures of several requests that are scored as one batch, filled up to a power of two
        so that few programs are compiled; 0 scores every request for itself.
      canary: to be asked before anything else.
    """
    self.label, self.canary = label, canary
    self._reward_fn, self._together = reward_fn, together
    self._found, self._checked, self._asking = "", time.monotonic(), threading.Lock()
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._threads = [
      threading.Thread(target=self._work, daemon=True, name=f"{label} {i}") for i in range(workers)
    ]
    for thread in self._threads:
      thread.start()

  @property
  def problem(self) -> str:
    """What its last canary found wrong, or that no worker lives; "" where nothing is wrong."""
    if not any(thread.is_alive() for thread in self._threads):
      return "has no worker left"
    return self._found

  def submit(self, parse: ParseFn) -> futures.Future:
    """The future Scored of a request, whose body `parse` unpacks in a worker.

    What goes wrong is raised by the future: wire.BadRequest for the asker, any other error for the
    server's log.
    """
    job = _Job(parse, futures.Future())
    self._jobs.put(job)
    return job.future

  def check_canary(self) -> str:
    """Asks the canary in the caller's thread, and keeps and returns what is wrong.

    While another thread asks it, it is not asked a second time.
    """
    if self.canary is None or not self._asking.acquire(blocking=False):
      return self.problem
    try:
      self._checked = time.monotonic()
      found = canary_lib.problem(lambda *batch: self._score(*batch)[0], self.canary)
    except KeyboardInterrupt:
      raise
    except BaseException as error:  # a reward may raise anything, and is not well then
      found = f"its canary met {type(error).__name__}: {error}"
    finally:
      self._asking.release()
    if found and found != self._found:  # said once, however often it is asked
      log.error("reward %r: %s", self.label, found)
    self._found = found
    return self.problem

  def is_canary_due(self, every: float) -> bool:
    """Whether the canary was asked `every` seconds ago or earlier, or found something wrong."""
    late = time.monotonic() - self._checked > every
    return self.canary is not None and (late or bool(self._found))

  def close(self, timeout: float = 5.0) -> None:
    """Ends the workers when they have scored what waits."""
    for _ in self._threads:
      self._jobs.put(None)
    for thread in self._threads:
      thread.join(timeout)

  def _work(self):
    while (job := self._jobs.get()) is not None:
      jobs = [job] if self._unpack(job) else []
      count = sum(len(batch.rows) for batch in job.batches)
      ends = False
      while self._together and count < self._together and not ends:
        try:
          following = self._jobs.get_nowait()
        except queue.Empty:
          break
        ends = following is None
        if following is not None and self._unpack(following):
          jobs.append(following)
          count += sum(len(batch.rows) for batch in following.batches)
      self._score_jobs(jobs)
      if ends:
        return

  def _unpack(self, job):
    """Whether the job can be scored; else its future says why not."""
    if not job.future.set_running_or_notify_cancel():
      return False
    try:
      job.batches = job.parse()
      for batch in job.batches:
        prompts = [types.Prompt(p, m) for p, m in zip(batch.prompts, batch.metadata)]
        try:
          # Without surveys: a line for each request would fill the log.
          self._reward_fn.check(prompts, surveys=False)  # pyright: ignore[reportFunctionMemberAccess]
        except ValueError as error:
          raise wire.BadRequest(422, str(error)) from error
    except BaseException as error:
      job.future.set_exception(_as_exception(error))
      return False
    return True

  def _score_jobs(self, jobs):
    """Scores them together, and one after another where that fails."""
    try:
      sizes: dict[tuple[int, ...], list[tuple[_Job, wire.Batch]]] = {}
      for job in jobs:
        for batch in job.batches:
          sizes.setdefault(batch.images.shape[1:], []).append((job, batch))
      for pairs in sizes.values():
        self._score_pairs(pairs)
      scored = [_assemble(job) for job in jobs]
    except BaseException as error:  # a worker outlives whatever a reward raises
      if len(jobs) > 1:
        for job in jobs:
          self._score_jobs([job])
      else:
        jobs[0].future.set_exception(_as_exception(error))
      return
    for job, result in zip(jobs, scored, strict=True):
      job.future.set_result(result)

  def _score_pairs(self, pairs):
    batches = [batch for _, batch in pairs]
    prompts = [p for batch in batches for p in batch.prompts]
    metadata = [m for batch in batches for m in batch.metadata]
    images = np.concatenate([b.images for b in batches]) if len(batches) > 1 else batches[0].images
    scores, info = self._score(images, prompts, metadata)
    first = 0
    for job, batch in pairs:
      rows = slice(first, first + len(batch.rows))
      own = {n: v[rows] for n, v in info.items() if _is_per_picture(v, len(prompts))}
      for place, row in enumerate(batch.rows):
        job.results[row] = (scores[rows][place], {name: v[place] for name, v in own.items()})
      first = rows.stop

  def _score(
    self,
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    count = len(prompts)
    if self._together:
      extra = (1 << (count - 1).bit_length()) - count
      images = np.pad(images, [(0, extra), (0, 0), (0, 0), (0, 0)], mode="edge")
      prompts = [*prompts, *[prompts[-1]] * extra]
      metadata = [*metadata, *[metadata[-1]] * extra]
    _, scores, infos = self._reward_fn(images, prompts, metadata)()
    return scores[self.label][:count], infos[self.label]


def _as_exception(error: BaseException) -> Exception:
  """The error, as one that an event loop hands on: SystemExit would end it, StopIteration cannot be set."""
  if isinstance(error, Exception) and not isinstance(error, StopIteration):
    return error
  wrapped = RuntimeError(f"{type(error).__name__}: {error}")
  wrapped.__cause__ = error
  return wrapped


def _is_per_picture(values, count):
  return isinstance(values, list | tuple | np.ndarray) and len(values) == count


def _assemble(job):
  """The Scored of a job, from its pictures' own."""
  results = [job.results[row] for row in range(len(job.results))]
  info: dict[str, Any] = {}
  for name in results[0][1]:
    if all(name in each for _, each in results):
      values = [each[name] for _, each in results]
      info[name] = np.asarray(values) if isinstance(values[0], np.generic) else values
  return Scored(np.asarray([score for score, _ in results], np.float32), info)
