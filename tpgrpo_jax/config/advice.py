"""What works and is probably not meant: warnings, where the rules refuse."""

from collections.abc import Iterator
import math

from tpgrpo_jax.config import fields, names


def advise(config: fields.Config) -> Iterator[str]:
  """One line for each choice that works and is probably not meant."""
  s, train = config.sampler, config.train
  told = config.model.variant in names.TOLD_VARIANTS
  if config.loss.objective != "policy" and s.guidance_scale > 1.0 and not told:
    yield (
      f"sampler.guidance_scale={s.guidance_scale}: DiffusionNFT and AWM sample and train without guidance. "
      "It goes on as you ask; 1.0 is the papers'."
    )
  fits = config.credit.method == "vgpo", config.advantage.normalization == "value"
  if fits[0] != fits[1] and ":" not in config.credit.method:
    yield (
      f"credit.method={config.credit.method!r}, advantage.normalization={config.advantage.normalization!r}: "
      "VGPO's values and its normalisation 'value' were made for each other."
    )
  field = "update_microbatch" if train.update_microbatch else "microbatch"
  together = math.gcd(s.branches, getattr(train, field))
  if together < s.branches:
    yield (
      f"train.{field}={getattr(train, field)}: takes an anchor's {s.branches} members {together} at a time, "
      f"and evaluates the anchor for each part again. Multiples of {s.branches} keep them together."
    )
  yield from _advise_on_length(config)


def _advise_on_length(config) -> Iterator[str]:
  o, evaluation, epochs = config.optimizer, config.eval, config.train.epochs
  updates = epochs * config.train.updates_per_epoch
  if o.warmup_updates >= updates:
    yield (
      f"optimizer.warmup_updates={o.warmup_updates}: the run has {updates} updates, so that "
      f"optimizer.learning_rate={o.learning_rate} is not passed and never falls."
    )
  decay = o.learning_rate * o.weight_decay
  if o.decay_to == "start" and 0 < decay * updates < 0.01:
    yield (
      f"optimizer.weight_decay={o.weight_decay}: takes less than 1 % of what is learned in the whole run. "
      "With optimizer.decay_to='start' 10 to 100 is usual."
    )
  if evaluation.patience and evaluation.patience * evaluation.every >= epochs:
    yield (
      f"eval.patience={evaluation.patience}: {epochs} epochs, evaluated every {evaluation.every}, are over "
      "before so many evaluations have brought nothing."
    )
