"""The rules of the five choices: which of them go together. Imports no jax."""

from collections.abc import Iterator
import math

from tpgrpo_jax.config import fields, names, size_rules

_OUTCOME = ("flow_grpo", "coca")  # credit of the finished image alone
_STATES = ("latent_increments",)  # credit of the noisy states themselves
_MEMBERS = ("branch", "branch_gain")  # credit of members


def check(config: fields.Config) -> Iterator[str]:
  """One line for each broken rule: field, value, rule, fix."""
  groups = (_branches, _moving_windows, _noise_levels, _completions, _credit, _latents, _objective)
  for group in groups:
    yield from group(config)
  yield from _policy(config) if config.loss.objective == "policy" else _forward(config)


def _branches(config) -> Iterator[str]:
  s, size = config.sampler, config.train.group_size
  if s.rollout == "branch":
    if s.branches < 2:
      yield (
        f"sampler.branches={s.branches}: must be at least 2 with sampler.rollout='branch'; an advantage "
        f"compares the members of a state. Try {size}."
      )
    elif size > 1 and size % s.branches:
      yield (
        f"sampler.branches={s.branches}: must divide train.group_size={size}, so that a prompt has a "
        f"whole number of anchors. Set it to {size_rules.nearest_divisors(s.branches, size, least=2)}."
      )
    length = s.window[1] - s.window[0]
    if not 0 <= s.branch_steps <= length:
      yield (
        f"sampler.branch_steps={s.branch_steps}: must be 0 (all) ... {length}, the steps of "
        f"sampler.window={s.window}."
      )
    if s.antithetic and s.branches % 2:
      fix = (
        ""
        if size % 2
        else f"sampler.branches to {size_rules.nearest_divisors(s.branches, size, of=2)}, or "
      )
      yield (
        f"sampler.antithetic=True: pairs need an even sampler.branches, which is {s.branches}. Set "
        f"{fix}antithetic to False."
      )
    if s.antithetic and config.train.microbatch % 2:
      yield (
        f"train.microbatch={config.train.microbatch}: must be even with sampler.antithetic=True, so that "
        "both of a pair are sampled together. Set it to an even number, or antithetic to False."
      )
    if s.same_latent:
      yield (
        "sampler.same_latent=True: with sampler.rollout='branch' the members of an anchor share its noise "
        "already. Set it to False; sampler.branches=train.group_size makes one anchor of a prompt."
      )
    return
  for name, value, default in (
    ("branches", s.branches, 1),
    ("branch_steps", s.branch_steps, 0),
    ("antithetic", s.antithetic, False),
  ):
    if value != default:
      yield (
        f"sampler.{name}={value}: is only for sampler.rollout='branch', which is {s.rollout!r}. Set it to "
        f"{default}, or the rollout to 'branch'."
      )
  if config.advantage.group == "state":
    yield (
      f"advantage.group='state': only the members of sampler.rollout='branch' share a state, and it is "
      f"{s.rollout!r}. Use 'prompt'."
    )


def _moving_windows(config) -> Iterator[str]:
  s = config.sampler
  last = s.num_steps - (s.dynamics == "cps")
  if s.window_every < 0:
    yield f"sampler.window_every={s.window_every}: must be at least 0; 0 keeps the window."
  elif s.window_every and s.window[1] >= last:
    yield (
      f"sampler.window_every={s.window_every}: moves a window towards the end, and "
      f"sampler.window={s.window} ends at {last} already. Shorten the window, or set window_every to 0."
    )
  if s.window_every and s.window_range:
    yield (
      f"sampler.window_every={s.window_every}: the window moves, and sampler.window_range="
      f"{s.window_range} draws it. Choose one."
    )
  if s.window_draw == "microbatch":
    if not s.window_range:
      yield (
        "sampler.window_draw='microbatch': says how often a window is drawn, and sampler.window_range=() "
        "draws none. Set the range, or leave it out."
      )
    if config.credit.method not in _OUTCOME:
      yield (
        f"sampler.window_draw='microbatch': credit.method={config.credit.method!r} compares the samples of "
        "a prompt step by step, and these would be other steps. Use 'epoch'."
      )
  if s.rollout == "ode" and (s.window_every or s.window_range):
    yield (
      "sampler.rollout='ode': has no stochastic window that could move. Set sampler.window_every=0 and "
      "sampler.window_range=()."
    )


def _noise_levels(config) -> Iterator[str]:
  s = config.sampler
  length = s.window[1] - s.window[0]
  most = 1.0 if s.dynamics == "cps" else math.inf
  if s.noise_levels and len(s.noise_levels) != length:
    yield (
      f"sampler.noise_levels={s.noise_levels}: has {len(s.noise_levels)} levels, must have one for each of "
      f"the {length} steps of sampler.window={s.window}."
    )
  if not all(math.isfinite(a) and 0 < a <= most for a in s.noise_levels):
    yield f"sampler.noise_levels={s.noise_levels}: must be finite and > 0, and at most 1 for cps."
  if s.noise_levels and s.rollout == "ode":
    yield (
      f"sampler.noise_levels={s.noise_levels}: sampler.rollout='ode' has no stochastic step. Set it to ()."
    )
  if s.calibration < 0:
    yield f"sampler.calibration={s.calibration}: must be at least 0; 0 does without."
  if s.calibration_rounds < 1:
    yield f"sampler.calibration_rounds={s.calibration_rounds}: must be at least 1."
  elif s.calibration_rounds != fields.Sampler().calibration_rounds and not s.calibration:
    yield (
      f"sampler.calibration_rounds={s.calibration_rounds}: sampler.calibration=0 makes none. Leave it at "
      f"{fields.Sampler().calibration_rounds}, or set calibration to 1 or more."
    )
  for name in ("latents", "noise_level") if s.rollout == "ode" else ():
    value, default = getattr(s, name), getattr(fields.Sampler(), name)
    if value != default:
      yield (
        f"sampler.{name}={value!r}: sampler.rollout='ode' keeps no noisy states. Leave it at {default!r}."
      )
  if s.calibration and config.credit.method in _OUTCOME:
    yield (
      f"sampler.calibration={s.calibration}: counts the signs of increments, and credit.method="
      f"{config.credit.method!r} makes no completions. Use 'increments', or set calibration to 0."
    )
  if s.calibration and s.rollout != "trajectory":
    yield (
      f"sampler.calibration={s.calibration}: needs the stochastic window of sampler.rollout='trajectory', "
      f"which is {s.rollout!r}. Set it to 0."
    )
  if (s.calibration or s.noise_levels) and (s.window_every or s.window_range):
    field = "calibration" if s.calibration else "noise_levels"
    yield (
      f"sampler.{field}={getattr(s, field)}: belongs to the steps of one window, and yours moves. Set "
      "sampler.window_every=0 and sampler.window_range=(), or leave it out."
    )
  if s.calibration and s.noise_levels:
    yield (
      f"sampler.calibration={s.calibration}: finds what sampler.noise_levels={s.noise_levels} says. "
      "Choose one."
    )


def _completions(config) -> Iterator[str]:
  asked, default = config.completion, fields.Completion()
  for name in ("steps", "strides", "solver", "decoder"):
    value = getattr(asked, name)
    if value != getattr(default, name) and config.credit.method in _OUTCOME + _STATES:
      yield (
        f"completion.{name}={value!r}: credit.method={config.credit.method!r} makes no completions. Leave it "
        f"at {getattr(default, name)!r}."
      )
  if any(stride < 1 for stride in asked.strides) or len({*asked.strides}) < len(asked.strides):
    yield f"completion.strides={asked.strides}: must be different numbers of at least 1, such as (1, 2)."
  if asked.strides and asked.steps:
    yield (
      f"completion.steps={asked.steps}: and completion.strides={asked.strides} both shorten the grid. "
      "Choose one."
    )
  if asked.solver == "dpmpp_2m_history" and config.sampler.rollout != "trajectory":
    yield (
      "completion.solver='dpmpp_2m_history': remembers a trajectory's evaluations, and sampler.rollout is "
      f"{config.sampler.rollout!r}. Use 'dpmpp_2m'."
    )
  if asked.decoder and config.model.variant in names.BUILT_IN_VARIANTS:
    yield (
      f"completion.decoder={asked.decoder!r}: model.variant={config.model.variant!r} paints pixels itself, "
      "and has nothing to decode. Leave it empty."
    )
  if asked.decoder and all(
    _maker(label, spec) in names.LATENT_REWARDS for label, spec in config.rewards.items()
  ):
    yield (
      f"completion.decoder={asked.decoder!r}: all rewards take latents, so that completions are never "
      "decoded. Leave it empty."
    )


def _credit(config) -> Iterator[str]:
  method, rollout = config.credit.method, config.sampler.rollout
  own = ":" in method
  fits = {
    "trajectory": own or method not in _MEMBERS,
    "branch": own or method in _MEMBERS,
    "ode": method in _OUTCOME and method != "coca",
  }
  if not fits.get(rollout, True):
    fix = {
      "trajectory": "Use 'increments', or sampler.rollout='branch'",
      "branch": f"Use {' or '.join(map(repr, _MEMBERS))}",
      "ode": "Use 'flow_grpo': only the finished image has a reward",
    }
    yield (
      f"credit.method={method!r}: does not go with sampler.rollout={rollout!r}. {fix[rollout]}."
    )
  yield from _of_values(config)
  for name in ("floor", "bonus"):
    value = getattr(config.advantage, name)
    if not 0 <= value < math.inf:
      yield f"advantage.{name}={value}: must be finite and >= 0; 0 is none."


def _latents(config) -> Iterator[str]:
  """What belongs to rewards of latents."""
  made = {label: _maker(label, spec) for label, spec in config.rewards.items()}
  made |= {label: label for label in config.eval.rewards if label not in made}
  for label, name in made.items():
    fits = names.LATENT_REWARDS.get(name)
    if fits and config.model.variant not in fits:
      yield (
        f"rewards.{label}: {name!r} takes latents of model.variant={' or '.join(map(repr, fits))}, and "
        f"yours is {config.model.variant!r}, whose latents are others. Use a reward of pictures."
      )
  of_pictures = [label for label in config.rewards if made[label] not in names.LATENT_REWARDS]
  if config.credit.method in _STATES and of_pictures:
    yield (
      f"credit.method={config.credit.method!r}: takes the rewards of noisy states, and rewards."
      f"{', rewards.'.join(of_pictures)} can only look at finished pictures. Train on rewards of latents "
      f"alone ({', '.join(names.LATENT_REWARDS)}), and name the others in eval.rewards."
    )


def _maker(label, spec):
  return spec.get("make", label) if isinstance(spec, dict) else label


def _of_values(config) -> Iterator[str]:
  """What belongs to the values of VGPO."""
  credit, asked = config.credit, config.advantage
  if not 0 <= credit.gamma <= 1:
    yield f"credit.gamma={credit.gamma}: must be in [0, 1]."
  if credit.gamma != fields.Credit().gamma and not (
    credit.method == "vgpo" or ":" in credit.method
  ):
    yield (
      f"credit.gamma={credit.gamma}: is of credit.method='vgpo', and it is {credit.method!r}. Leave it at "
      f"{fields.Credit().gamma}."
    )
  if asked.bonus != fields.Advantage().bonus and asked.normalization != "value":
    yield (
      f"advantage.bonus={asked.bonus}: is of advantage.normalization='value', and it is "
      f"{asked.normalization!r}. Leave it at {fields.Advantage().bonus}."
    )


def _objective(config) -> Iterator[str]:
  forward = config.loss.objective != "policy"
  if forward != (config.sampler.rollout == "ode"):
    yield (
      f"loss.objective={config.loss.objective!r}: does not go with sampler.rollout="
      f"{config.sampler.rollout!r}. 'policy' needs the stochastic steps of 'trajectory' or 'branch', 'nft' "
      "and 'awm' finished images ('ode')."
    )
  if config.train.updates_by == "steps":
    rows = config.sampler.branch_steps or config.sampler.window[1] - config.sampler.window[0]
    if forward:
      yield f"train.updates_by='steps': loss.objective={config.loss.objective!r} has none. Use 'samples'."
    elif config.train.updates_per_epoch >= 1 and rows % config.train.updates_per_epoch:
      yield (
        f"train.updates_per_epoch={config.train.updates_per_epoch}: must divide the {rows} steps that "
        f"train.updates_by='steps' shares out. Set it to {math.gcd(rows, config.train.updates_per_epoch)}."
      )
    if config.loss.chunks or config.loss.step_weight == "std":
      field = "chunks" if config.loss.chunks else "step_weight"
      yield (
        "train.updates_by='steps': an update then sees some of the steps, and "
        f"loss.{field}={getattr(config.loss, field)!r} needs all of them. Use 'samples'."
      )


def _policy(config) -> Iterator[str]:
  loss, default = config.loss, fields.Loss()
  if not 0 < loss.clip_range < (1 if loss.trust_region == "clip" else math.inf):
    yield (
      f"loss.clip_range={loss.clip_range}: must be finite and > 0, and below 1 for 'clip'. The papers use "
      "1e-5 (cps) and 1e-4 (sde)."
    )
  if not 0 <= loss.negative_weight < math.inf:
    yield (
      f"loss.negative_weight={loss.negative_weight}: must be finite and >= 0; 1 is none, Self-OPD's is .5."
    )
  rows = config.sampler.branch_steps or config.sampler.window[1] - config.sampler.window[0]
  if loss.chunks and (sum(loss.chunks) != rows or min(loss.chunks) < 1):
    yield (
      f"loss.chunks={loss.chunks}: must be lengths of at least 1 that sum to the {rows} steps that are "
      f"trained, and sum to {sum(loss.chunks)}. Try {_halves(rows)}."
    )
  if not 0 <= loss.chunks_per_sample <= len(loss.chunks):
    yield (
      f"loss.chunks_per_sample={loss.chunks_per_sample}: must be 0 (all) ... {len(loss.chunks)}, the number "
      "of loss.chunks."
    )
  for name in ("levels", "level_draw", "beta", "old_decay", "old_coef"):
    value = getattr(loss, name)
    if value != getattr(default, name):
      yield (
        f"loss.{name}={value!r}: is only for loss.objective='nft' and 'awm'. Leave it at "
        f"{getattr(default, name)!r}."
      )


def _halves(rows):
  return (rows - rows // 2, rows // 2) if rows > 1 else (1,)


def _forward(config) -> Iterator[str]:
  loss, default = config.loss, fields.Loss()
  if loss.clip_range:
    yield (
      f"loss.clip_range={loss.clip_range}: loss.objective={loss.objective!r} has no ratio that could be "
      "clipped. Set it to 0."
    )
  for name in (
    "ratio",
    "trust_region",
    "old_log_prob",
    "step_weight",
    "negative_weight",
    "chunks",
    "chunks_per_sample",
  ):
    value = getattr(loss, name)
    if value != getattr(default, name):
      yield (
        f"loss.{name}={value!r}: is of loss.objective='policy', and it is {loss.objective!r}. Leave it at "
        f"{getattr(default, name)!r}."
      )
  length = config.sampler.window[1] - config.sampler.window[0]
  if not 0 <= loss.levels <= length:
    yield (
      f"loss.levels={loss.levels}: must be 0 (all) ... {length}, the noise levels of "
      f"sampler.window={config.sampler.window}."
    )
  if not 0 < loss.beta < math.inf:
    yield f"loss.beta={loss.beta}: must be finite and > 0. The paper uses 1 and .1."
  elif loss.objective == "awm" and loss.beta != default.beta:
    yield f"loss.beta={loss.beta}: is of loss.objective='nft'. Leave it at {default.beta}."
  if not 0 <= loss.old_coef < math.inf:
    yield f"loss.old_coef={loss.old_coef}: must be finite and >= 0."
  flat, rate, most = loss.old_decay
  if not (flat >= 0 and 0 <= rate < math.inf and 0 <= most < 1):
    yield (
      f"loss.old_decay={loss.old_decay}: must be (flat, rate, most) with flat >= 0, rate >= 0 and 0 <= most "
      "< 1, such as (0, .001, .5)."
    )
  if loss.objective == "awm" and config.train.updates_per_epoch != 1:
    yield (
      f"train.updates_per_epoch={config.train.updates_per_epoch}: AWM's ratio is 1, since it makes one "
      "update an epoch. Set it to 1."
    )
