"""The rules of how many: samples, updates, calls. Imports no jax."""

from collections.abc import Iterator
import math

from tpgrpo_jax.config import fields

MOST_UPDATES = 2**31 - 1  # optax counts in int32


def check(config: fields.Config) -> Iterator[str]:
  """One line for each broken rule: field, value, rule, fix."""
  yield from _sizes(config)
  yield from _calls(config)


def at_least(rows) -> Iterator[str]:
  """One line for each (field, value, least) whose value is less."""
  for field, value, least in rows:
    if value < least:
      yield f"{field}={value}: must be at least {least}."


def _sizes(config) -> Iterator[str]:
  t = config.train
  yield from at_least(
    (
      ("train.epochs", t.epochs, 1),
      ("train.prompts_per_epoch", t.prompts_per_epoch, 1),
      ("train.microbatch", t.microbatch, 1),
      ("train.updates_per_epoch", t.updates_per_epoch, 1),
      ("lora.rank", config.lora.rank, 0),
      ("completion.steps", config.completion.steps, 0),
      ("completion.lanes_per_chunk", config.completion.lanes_per_chunk, 0),
      ("eval.every", config.eval.every, 0),
      ("eval.num_steps", config.eval.num_steps, 1),
      ("eval.prompts", config.eval.prompts, 1),
      ("eval.batch", config.eval.batch, 1),
      ("eval.patience", config.eval.patience, 0),
      ("eval.judge_prompts", config.eval.judge_prompts, 0),
      ("checkpoint.every", config.checkpoint.every, 1),
      ("checkpoint.keep", config.checkpoint.keep, 1),
      ("checkpoint.keep_every", config.checkpoint.keep_every, 0),
      ("log.profile", config.log.profile, 0),
      ("scoring.retries", config.scoring.retries, 0),
      ("log.images_every", config.log.images_every, 0),
    )
  )
  if t.epochs * max(t.updates_per_epoch, 1) > MOST_UPDATES:
    yield (
      f"train.epochs={t.epochs}: with train.updates_per_epoch={t.updates_per_epoch} must make at most "
      f"{MOST_UPDATES:,} updates, which is what the optimizer can count. Ask for fewer."
    )
  if t.group_size < 2:
    yield (
      f"train.group_size={t.group_size}: must be at least 2; an advantage compares the samples of "
      "one prompt. The papers use 24."
    )
  samples = t.prompts_per_epoch * t.group_size
  if min(samples, t.microbatch, t.updates_per_epoch) < 1:
    return  # said above
  updates = t.updates_per_epoch if t.updates_by == "samples" else 1
  if samples % updates:
    yield (
      f"train.updates_per_epoch={t.updates_per_epoch}: must divide the prompts_per_epoch x group_size "
      f"= {samples} samples of an epoch. Set it to {math.gcd(samples, t.updates_per_epoch)}, or "
      "change the other two."
    )
  elif (share := samples // updates) % t.microbatch:
    whole = config.sampler.branches if config.sampler.branches > 1 else 1
    whole = whole if share % whole == 0 else 1  # members of an anchor stay together where they can
    yield (
      f"train.microbatch={t.microbatch}: must divide the {share} samples of an update "
      f"(prompts_per_epoch x group_size / updates = {samples} / {updates}). "
      f"Set microbatch to {nearest_divisors(t.microbatch, share, of=whole)}, or change the "
      "other three."
    )


def _calls(config) -> Iterator[str]:
  size, part = config.train.microbatch, config.train.update_microbatch
  if part < 0 or (part and size % part):
    yield (
      f"train.update_microbatch={part}: must divide train.microbatch={size}, or be 0 for that. Set it to "
      f"{nearest_divisors(part, size)}."
    )
  count, s, t = config.train.steps_per_call, config.sampler, config.train
  drawn = {"branch": s.branch_steps, "ode": config.loss.levels}.get(s.rollout, 0)
  rows = drawn or s.window[1] - s.window[0]
  rows //= max(t.updates_per_epoch, 1) if t.updates_by == "steps" else 1
  if count < 1 or rows % count:
    found = math.gcd(rows, max(count, 1))
    yield f"train.steps_per_call={count}: must divide the {rows} steps of an update. Set it to {found}."
  if count > 1 and config.mesh.tensor > 1:
    yield f"train.steps_per_call={count}: gathers whole weights. Set mesh.tensor=1, or it to 1."


def nearest_divisors(number: int, size: int, *, of: int = 1, least: int = 1) -> str:
  """The divisors of `size`, of at least `least` and multiples of `of`, next to `number`: "4 or 8"."""
  fit = [m for m in range(least, size + 1) if size % m == 0 and m % of == 0]
  below, above = [m for m in fit if m < number], [m for m in fit if m > number]
  return " or ".join(map(str, below[-1:] + above[:1]))
