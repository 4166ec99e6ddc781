"""Every rule that a config must obey, checked before anything compiles. Imports no jax."""

from collections.abc import Iterator
import math
import re
import warnings

from tpgrpo_jax import registry
from tpgrpo_jax.config import advice, bridge, fields, method_rules, names, size_rules


def validate(config: fields.Config) -> None:
  """Raises ValueError with one line for each broken rule: field, value, rule, fix.

  A choice that works and is probably not meant is a warning. What depends on devices, weights or files is
  checked where they are opened.
  """
  bridge.check_types(config)
  groups = (
    _run,
    _model,
    _pipeline,
    _adapter,
    _names,
    _sampler,
    _credit_scale,
    size_rules.check,
    _optimizer,
  )
  groups += (_distributed, _best, method_rules.check)
  _raise([problem for group in groups for problem in group(config)])
  for line in advice.advise(config):
    warnings.warn(line, stacklevel=2)


def validate_pretrain(config: fields.PretrainConfig) -> None:
  """As `validate`, for pretraining."""
  _raise([problem for group in (_run, _model, _pretrain, _optimizer) for problem in group(config)])


def _raise(problems):
  if problems:
    raise ValueError("\n".join(problems))


def _check_names(rows) -> Iterator[str]:
  for field, value, table, importable in rows:
    try:
      registry.check(value, table, field=field, importable=importable)
    except ValueError as error:
      yield str(error)


def _model(config) -> Iterator[str]:
  yield from _check_names(
    (
      ("model.variant", config.model.variant, names.MODEL_VARIANTS, False),
      ("model.dtype", config.model.dtype, names.DTYPES, False),
      ("model.remat", config.model.remat, names.REMAT_POLICIES, False),
      ("model.quantize", config.model.quantize, names.QUANTIZATIONS, False),
    )
  )


def _pipeline(config) -> Iterator[str]:
  variant, text, s = config.model.variant, config.text, config.sampler
  yield from _check_names(
    (
      ("text.dtype", text.dtype, names.DTYPES, False),
      ("text.device", text.device, names.TEXT_DEVICES, False),
      ("vae.dtype", config.vae.dtype, names.DTYPES, False),
    )
  )
  yield from size_rules.at_least(
    (
      ("sampler.height", s.height, 0),
      ("sampler.width", s.width, 0),
      ("vae.images_per_chunk", config.vae.images_per_chunk, 1),
    )
  )
  if not 0 <= text.max_sequence_length <= 512:
    yield (
      f"text.max_sequence_length={text.max_sequence_length}: must be 1 ... 512, as in diffusers, or 0 for "
      "the pipeline's own."
    )
  if variant not in names.BUILT_IN_VARIANTS and not config.model.path:
    yield (
      f"model.path='': model.variant={variant!r} needs a pipeline in diffusers' layout, a folder or a "
      "hub id such as 'stabilityai/stable-diffusion-3.5-medium'. Set model.path."
    )
  if variant in names.TOLD_VARIANTS and not text.t5:
    yield "text.t5=False: FLUX.1 reads nothing but T5's tokens. Set it to True."
  if variant in ("flux2", "z_image") and not text.t5:
    yield f"text.t5=False: model.variant={variant!r} has no T5 to leave out. Set it to True."
  if variant in names.EDITING_VARIANTS and config.prompts.name != "folder":
    yield (
      f"prompts.name={config.prompts.name!r}: model.variant={variant!r} edits pictures, so each prompt needs "
      'one. Use \'folder\' with train.jsonl and test.jsonl, whose lines have an "image" beside the "prompt".'
    )
  if variant not in names.OWN_SCHEDULES.get(s.schedule, (variant,)):
    yield (
      f"sampler.schedule={s.schedule!r}: its shift grows with the tokens of the model of that name, and "
      f"model.variant={variant!r} was made for another. Use {names.USUAL_SCHEDULES.get(variant, 'sd3')!r}."
    )


def _adapter(config) -> Iterator[str]:
  if config.lora.path and config.lora.rank == 0:
    yield (
      f"lora.path={config.lora.path!r}: adapters need lora.rank > 0, and lora.rank=0 trains every "
      "weight instead. Set lora.rank, lora.alpha and lora.targets to the file's own."
    )
  if config.model.quantize and not config.lora.rank:
    yield (
      f"model.quantize={config.model.quantize!r}: weights that are trained cannot be quantised. Set "
      "lora.rank, or leave it empty."
    )
  if config.lora.rank and not config.lora.targets:
    yield "lora.targets=(): adapters must name layers. Use ('attn.to_q', 'attn.to_v'), or leave it out."


def _run(config) -> Iterator[str]:
  if not 0 <= config.seed < 2**32:
    yield f"seed={config.seed}: must be 0 ... 2**32 - 1. Use 0."
  if not config.run.dir:
    yield "run.dir='': must name a folder. Use run.dir='runs/mine'."
  elif re.match(r"[a-z0-9]+:/", config.run.dir) and not re.fullmatch(
    r"gs://[^/]+(/[^/]+)+/?", config.run.dir
  ):
    yield f"run.dir={config.run.dir!r}: must be a folder, or gs://bucket/folder. Name one of them."


def _names(config) -> Iterator[str]:
  yield from _check_names(
    (
      ("lora.init", config.lora.init, names.LORA_INITS, False),
      ("prompts.name", config.prompts.name, names.PROMPT_SOURCES, False),
      ("sampler.schedule", config.sampler.schedule, names.SCHEDULES, False),
      ("sampler.dynamics", config.sampler.dynamics, names.DYNAMICS, False),
      ("sampler.rollout", config.sampler.rollout, names.ROLLOUTS, False),
      ("sampler.window_draw", config.sampler.window_draw, names.WINDOW_DRAWS, False),
      ("sampler.latents", config.sampler.latents, names.LATENT_DTYPES, False),
      ("completion.solver", config.completion.solver, names.SOLVERS, False),
      ("credit.method", config.credit.method, names.CREDIT_METHODS, True),
      ("advantage.normalization", config.advantage.normalization, names.NORMALIZATIONS, False),
      ("advantage.group", config.advantage.group, names.ADVANTAGE_GROUPS, False),
      ("loss.objective", config.loss.objective, names.OBJECTIVES, False),
      ("loss.ratio", config.loss.ratio, names.RATIOS, True),
      ("loss.trust_region", config.loss.trust_region, names.TRUST_REGIONS, True),
      ("loss.old_log_prob", config.loss.old_log_prob, names.OLD_LOG_PROBS, False),
      ("loss.step_weight", config.loss.step_weight, names.STEP_WEIGHTS, False),
      ("loss.level_draw", config.loss.level_draw, names.LEVEL_DRAWS, False),
      ("train.updates_by", config.train.updates_by, names.UPDATES_BY, False),
    )
  )
  yield from _check_names(
    ("eval.rewards", name, names.REWARD_NAMES, True)
    for name in config.eval.rewards
    if name not in config.rewards
  )
  if not config.rewards:
    yield "rewards={}: must hold one reward or more, label -> weight. Try rewards={'ocr': 1.0}."
  elif not any(s.get("weight", 1) if isinstance(s, dict) else s for s in config.rewards.values()):
    labels = ", ".join(config.rewards)
    yield f"rewards: all weights are 0 ({labels}), so nothing is learned. Give one a weight."
  if config.prompts.name == "geneval" and not config.prompts.path:
    yield (
      "prompts.path='': prompts.name='geneval' needs a folder with train_metadata.jsonl and "
      "test_metadata.jsonl, or one such file. Set prompts.path."
    )
  if config.prompts.name == "folder" and not config.prompts.path:
    yield (
      "prompts.path='': prompts.name='folder' needs a folder with train.txt and test.txt, or "
      ".jsonl. Set prompts.path."
    )


def _sampler(config) -> Iterator[str]:
  s = config.sampler
  start, end = s.window
  if s.num_steps < 1:
    yield f"sampler.num_steps={s.num_steps}: must be at least 1."
  if not 0 <= start < end:
    yield f"sampler.window={s.window}: must be (start, end) with 0 <= start < end, such as (0, 9)."
  if end > s.num_steps:
    yield (
      f"sampler.window={s.window}: the end must be <= sampler.num_steps={s.num_steps}. "
      f"Shorten the window or set num_steps to {end}."
    )
  elif s.dynamics == "cps" and end == s.num_steps and s.rollout != "ode":
    yield (
      f"sampler.window={s.window}: the last step of cps has no noise, so it has no log-prob: the "
      f"end must be <= num_steps - 1 = {s.num_steps - 1}. "
      f"{'Shorten the window' if end - start > 1 else 'Raise sampler.num_steps'}, or use "
      "sampler.dynamics='sde'."
    )
  if s.window_range:
    if len(s.window_range) != 2:
      yield f"sampler.window_range={s.window_range}: must be () or (lo, hi)."
    else:
      low, high = s.window_range
      last = s.num_steps - (s.dynamics == "cps")
      if not (0 <= low and low + (end - start) <= high <= last):
        yield (
          f"sampler.window_range={s.window_range}: must hold the window's {end - start} steps and "
          f"lie in 0 ... {last}. Widen it, or shorten sampler.window."
        )
  if not 0 < s.noise_level < math.inf or (s.dynamics == "cps" and s.noise_level > 1):
    yield (
      f"sampler.noise_level={s.noise_level}: must be finite and > 0 (a step without noise has no log-prob), "
      "and at most 1 for cps. The papers use 0.7 (sde, cps) and 0.3 (dance)."
    )
  if not 0 < s.shift < math.inf:
    yield f"sampler.shift={s.shift}: must be finite and > 0; SD3 uses 3."
  if not 0 <= s.guidance_scale < math.inf:
    yield (
      f"sampler.guidance_scale={s.guidance_scale}: must be finite and >= 0. 0 ... 1 is no guidance; the "
      "papers use 4.5 (SD3.5) and 3.5 (FLUX.1)."
    )


def _distributed(config) -> Iterator[str]:
  d = config.distributed
  yield from size_rules.at_least(
    (
      ("distributed.timeout", d.timeout, 1),
      ("distributed.heartbeat_timeout", d.heartbeat_timeout, 1),
      ("distributed.num_processes", d.num_processes, 1),
    )
  )
  if not 0 <= d.process_id < max(d.num_processes, 1):
    yield (
      f"distributed.process_id={d.process_id}: must be 0 ... num_processes - 1 = {d.num_processes - 1}."
    )
  if d.coordinator in ("auto", "off"):
    if d.num_processes > 1:
      yield (
        f"distributed.num_processes={d.num_processes}: is only for distributed.coordinator=host:port, which "
        f"is {d.coordinator!r}. Name the address of process 0, or leave it out: a scheduler says how many."
      )
    return
  host, _, port = d.coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    yield (
      f"distributed.coordinator={d.coordinator!r}: must be 'auto', 'off' or host:port of process 0, such "
      "as '10.0.0.2:8476'."
    )


def _best(config) -> Iterator[str]:
  best, patience = config.checkpoint.best, config.eval.patience
  known = ["reward/mean", *(f"reward/{n}/mean" for n in config.eval.rewards or config.rewards)]
  if best and best not in known:
    yield (
      f"checkpoint.best={best!r}: must be a held-out score, {' or '.join(known)}, or '' for none."
      f"{registry.nearest(best, known)}"
    )
  if patience and not (best and config.eval.every):
    yield (
      f"eval.patience={patience}: counts evaluations since the best one, with checkpoint.best={best!r} and "
      f"eval.every={config.eval.every}. Set both of them, or patience to 0."
    )


def _credit_scale(config) -> Iterator[str]:
  yield from _positive(
    (
      ("advantage.clip", config.advantage.clip),
      ("lora.alpha", config.lora.alpha),
      ("scoring.timeout", config.scoring.timeout),
      ("scoring.backoff", config.scoring.backoff),
    )
  )
  if not (math.isfinite(config.loss.kl_coef) and config.loss.kl_coef >= 0):
    yield f"loss.kl_coef={config.loss.kl_coef}: must be >= 0; 0 leaves the term out."


def _positive(rows) -> Iterator[str]:
  for field, value in rows:
    if not (math.isfinite(value) and value > 0):
      yield f"{field}={value}: must be finite and > 0."


def _optimizer(config) -> Iterator[str]:
  o = config.optimizer
  yield from _positive(
    (
      ("optimizer.learning_rate", o.learning_rate),
      ("optimizer.max_grad_norm", o.max_grad_norm),
      ("optimizer.eps", o.eps),
    )
  )
  yield from size_rules.at_least(
    (("optimizer.warmup_updates", o.warmup_updates, 0), ("ema.every", config.ema.every, 1))
  )
  yield from _check_names(
    [
      ("optimizer.schedule", o.schedule, names.LEARNING_RATE_SCHEDULES, False),
      ("optimizer.decay_to", o.decay_to, names.DECAYS, False),
    ]
  )
  if not 0 <= o.final_scale <= 1:
    yield f"optimizer.final_scale={o.final_scale}: must be in [0, 1]; 0 ends at no rate at all."
  elif o.final_scale and o.schedule == "constant":
    yield (
      f"optimizer.final_scale={o.final_scale}: optimizer.schedule='constant' does not fall. Use 'linear' or "
      "'cosine', or set it to 0."
    )
  for field, value in (("b1", o.b1), ("b2", o.b2)):
    if not 0 <= value < 1:
      yield f"optimizer.{field}={value}: must be in [0, 1)."
  if not 0 <= o.weight_decay < math.inf:
    yield f"optimizer.weight_decay={o.weight_decay}: must be finite and >= 0; 0 is none."
  elif o.decay_to == "start" and not o.weight_decay:
    yield "optimizer.decay_to='start': optimizer.weight_decay is 0, so nothing decays. Set it: 10 to 100."
  elif o.learning_rate * o.weight_decay >= 1:
    yield (
      f"optimizer.weight_decay={o.weight_decay}: times optimizer.learning_rate={o.learning_rate} must be "
      "< 1, since an update takes away that part of the weights. Lower it."
    )
  if not 0 <= config.ema.decay < 1:
    yield f"ema.decay={config.ema.decay}: must be in [0, 1); 0 keeps no average."


def _pretrain(config) -> Iterator[str]:
  if "://" in config.run.dir:
    yield f"run.dir={config.run.dir!r}: pretraining writes to folders alone. Use run.dir='runs/mine'."
  t = config.train
  if config.model.variant not in names.BUILT_IN_VARIANTS:
    built_in = " and ".join(map(repr, names.BUILT_IN_VARIANTS))
    yield f"model.variant={config.model.variant!r}: only {built_in} are trained from scratch here."
  yield from size_rules.at_least(
    (
      ("train.updates", t.updates, 1),
      ("train.batch", t.batch, 1),
      ("train.log_every", t.log_every, 1),
      ("eval.every", config.eval.every, 1),
      ("eval.num_steps", config.eval.num_steps, 1),
      ("eval.prompts", config.eval.prompts, 1),
      ("eval.batch", config.eval.batch, 1),
    )
  )
  if config.model.path:
    yield (
      f"model.path={config.model.path!r}: must be empty, pretraining starts from random weights. "
      "Leave it out; `output` is where the result goes."
    )
  if not 0 <= t.text_dropout < 1:
    yield f"train.text_dropout={t.text_dropout}: must be in [0, 1)."
  if not math.isfinite(t.logit_mean):
    yield f"train.logit_mean={t.logit_mean}: must be finite. 0 trains all noise levels alike."
  yield from _check_names([("train.output_dtype", t.output_dtype, names.DTYPES, False)])
  yield from _check_names(
    ("eval.rewards", name, names.REWARD_NAMES, True) for name in config.eval.rewards
  )
  if not config.eval.rewards:
    yield "eval.rewards=(): must name one reward or more, such as ('ocr',)."
