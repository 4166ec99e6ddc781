"""Choices that do not go together are refused in one line; advice is a warning and no more."""

import re
import warnings

import pytest
from test_rules import assert_line, changed, message_of

from tpgrpo_jax.config import method_rules, presets, rules

# Which config the fields change: a trajectory's (the defaults), branches', NFT's or AWM's.
BASES = {
  "": {},
  "branch": {
    "sampler.rollout": "branch",
    "sampler.branches": 8,
    "credit.method": "branch",
    "advantage.group": "state",
  },
  "nft": {
    "sampler.rollout": "ode",
    "credit.method": "flow_grpo",
    "loss.objective": "nft",
    "loss.clip_range": 0.0,
  },
}
BASES["awm"] = BASES["nft"] | {"loss.objective": "awm", "train.updates_per_epoch": 1}
PROGRESSIVE = {"sampler.window": (0, 4), "sampler.window_every": 5}
DRAWN = {"sampler.window": (0, 4), "sampler.window_range": (0, 9)}
NAN = float("nan")

# base, fields changed -> what one line of the message must say: field = value, rule, fix
BAD = {
  # names
  "rollout": (
    "",
    {"sampler.rollout": "branches"},
    ("sampler.rollout='branches':", "Did you mean 'branch'?"),
  ),
  "window_draw": (
    "",
    DRAWN | {"sampler.window_draw": "epochs"},
    ("'epochs'", "Did you mean 'epoch'?"),
  ),
  "latents": (
    "",
    {"sampler.latents": "bf16"},
    ("sampler.latents='bf16':", "Choices: bfloat16, float16, float32"),
  ),
  "normalization": (
    "",
    {"advantage.normalization": "std"},
    ("advantage.normalization='std':", "global_std"),
  ),
  "group": (
    "",
    {"advantage.group": "states"},
    ("advantage.group='states':", "Did you mean 'state'?"),
  ),
  "objective": ("", {"loss.objective": "nfl"}, ("loss.objective='nfl':", "Did you mean 'nft'?")),
  "ratio": (
    "",
    {"loss.ratio": "normalised"},
    ("loss.ratio='normalised':", "Did you mean 'normalized'?", "package.module:function"),
  ),
  "trust_region": (
    "",
    {"loss.trust_region": "dpo"},
    ("loss.trust_region='dpo':", "Did you mean 'dppo'?", "package.module:function"),
  ),
  "step_weight": (
    "",
    {"loss.step_weight": "inverse-dt"},
    ("loss.step_weight='inverse-dt':", "Did you mean 'inverse_dt'?"),
  ),
  "level_draw": (
    "nft",
    {"loss.level_draw": "permute"},
    ("loss.level_draw='permute':", "Did you mean 'permuted'?"),
  ),
  "steps_per_call on tensors": (
    "",
    {"train.steps_per_call": 3, "mesh.tensor": 2},
    ("train.steps_per_call=3:", "gathers whole weights", "Set mesh.tensor=1"),
  ),
  "update_microbatch": (
    "",
    {"train.microbatch": 48, "train.update_microbatch": 20},
    ("train.update_microbatch=20:", "must divide train.microbatch=48", "Set it to 16 or 24."),
  ),
  "steps_per_call": (
    "",
    {"train.steps_per_call": 4},
    ("train.steps_per_call=4:", "must divide the", "Set it to"),
  ),
  "updates_by": (
    "",
    {"train.updates_by": "step"},
    ("train.updates_by='step':", "Did you mean 'steps'?"),
  ),
  "rate_schedule": (
    "",
    {"optimizer.schedule": "lineal"},
    ("optimizer.schedule='lineal':", "Did you mean 'linear'?"),
  ),
  "history": ("", {"completion.solver": "dpmpp_2m_hist"}, ("Did you mean 'dpmpp_2m_history'?",)),
  # the learning rate
  "final_scale": (
    "",
    {"optimizer.schedule": "linear", "optimizer.final_scale": 2.0},
    ("optimizer.final_scale=2.0:", "in [0, 1]", "0 ends at"),
  ),
  "final_scale_constant": (
    "",
    {"optimizer.final_scale": 0.1},
    ("optimizer.final_scale=0.1:", "'constant' does not fall", "Use 'linear' or 'cosine'"),
  ),
  # branches
  "one_branch": (
    "branch",
    {"sampler.branches": 1},
    ("sampler.branches=1:", "at least 2", "Try 16"),
  ),
  "branches_of_no_divisor": (
    "branch",
    {"sampler.branches": 5},
    ("sampler.branches=5:", "must divide train.group_size=16", "Set it to 4 or 8."),
  ),
  "branches_beyond_the_group": (
    "branch",
    {"sampler.branches": 32},
    ("sampler.branches=32:", "Set it to 16."),
  ),
  "branch_steps_negative": (
    "branch",
    {"sampler.branch_steps": -1},
    ("sampler.branch_steps=-1:", "0 (all) ... 9", "sampler.window=(0, 9)"),
  ),
  "branch_steps_too_many": (
    "branch",
    {"sampler.branch_steps": 10},
    ("sampler.branch_steps=10:", "0 (all) ... 9"),
  ),
  "branch_in_the_last_step_of_cps": (
    "branch",
    {"sampler.window": (9, 10)},
    ("sampler.window=(9, 10):", "last step of cps has no noise", "sampler.dynamics='sde'"),
  ),
  "odd_pairs": (
    "branch",
    {
      "sampler.branches": 3,
      "train.group_size": 12,
      "train.microbatch": 48,
      "sampler.antithetic": True,
    },
    ("sampler.antithetic=True:", "even sampler.branches, which is 3", "sampler.branches to 2 or 4"),
  ),
  "odd_pairs_of_an_odd_group": (
    "branch",
    {
      "sampler.branches": 3,
      "train.group_size": 9,
      "train.microbatch": 36,
      "sampler.antithetic": True,
    },
    ("even sampler.branches, which is 3", "Set antithetic to False."),
  ),
  "pairs_cut_apart": (
    "branch",
    {"train.prompts_per_epoch": 9, "train.microbatch": 9, "sampler.antithetic": True},
    ("train.microbatch=9:", "even with sampler.antithetic=True", "an even number"),
  ),
  "shared_noise_twice": (
    "branch",
    {"sampler.same_latent": True},
    ("sampler.same_latent=True:", "share its noise already", "Set it to False"),
  ),
  "branches_of_trajectories": (
    "",
    {"sampler.branches": 8},
    (
      "sampler.branches=8:",
      "only for sampler.rollout='branch', which is 'trajectory'",
      "Set it to 1",
    ),
  ),
  "branch_steps_of_trajectories": (
    "",
    {"sampler.branch_steps": 3},
    ("sampler.branch_steps=3:", "only for sampler.rollout='branch'", "Set it to 0"),
  ),
  "pairs_of_trajectories": (
    "",
    {"sampler.antithetic": True},
    ("sampler.antithetic=True:", "only for sampler.rollout='branch'", "Set it to False"),
  ),
  "states_of_trajectories": (
    "",
    {"advantage.group": "state"},
    (
      "advantage.group='state':",
      "only the members of sampler.rollout='branch' share a state",
      "Use 'prompt'",
    ),
  ),
  # moving windows
  "window_every_negative": (
    "",
    {"sampler.window_every": -1},
    ("sampler.window_every=-1:", "at least 0", "0 keeps"),
  ),
  "window_without_room": (
    "",
    {"sampler.window_every": 5},
    ("sampler.window_every=5:", "sampler.window=(0, 9) ends at 9 already", "Shorten the window"),
  ),
  "window_moved_and_drawn": (
    "",
    PROGRESSIVE | DRAWN,
    ("sampler.window_every=5:", "sampler.window_range=(0, 9) draws it", "Choose one"),
  ),
  "draw_of_nothing": (
    "",
    {"credit.method": "flow_grpo", "sampler.window_draw": "microbatch"},
    ("sampler.window_draw='microbatch':", "sampler.window_range=() draws none", "Set the range"),
  ),
  "draw_for_dense_credit": (
    "",
    DRAWN | {"sampler.window_draw": "microbatch"},
    ("sampler.window_draw='microbatch':", "credit.method='tp_grpo' compares", "Use 'epoch'"),
  ),
  "window_of_an_ode_drawn": (
    "nft",
    DRAWN,
    ("sampler.rollout='ode':", "no stochastic window that could move", "sampler.window_range=()"),
  ),
  "window_of_an_ode_moved": (
    "nft",
    PROGRESSIVE,
    ("sampler.rollout='ode':", "Set sampler.window_every=0"),
  ),
  # noise levels
  "levels_too_few": (
    "",
    {"sampler.noise_levels": (0.7, 0.6)},
    ("sampler.noise_levels=(0.7, 0.6):", "has 2 levels", "one for each of the 9 steps"),
  ),
  "level_of_zero": (
    "",
    {"sampler.window": (0, 2), "sampler.noise_levels": (0.7, 0.0)},
    ("sampler.noise_levels=(0.7, 0.0):", "finite and > 0"),
  ),
  "level_beyond_cps": (
    "",
    {"sampler.window": (0, 2), "sampler.noise_levels": (0.7, 1.2)},
    ("(0.7, 1.2):", "at most 1 for cps"),
  ),
  "levels_of_an_ode": (
    "nft",
    {"sampler.noise_levels": (0.7,) * 9},
    ("sampler.noise_levels=", "no stochastic step", "Set it to ()"),
  ),
  "levels_that_move": (
    "",
    PROGRESSIVE | {"sampler.noise_levels": (0.7,) * 4},
    ("sampler.noise_levels=", "belongs to the steps of one window", "sampler.window_every=0"),
  ),
  "calibration_negative": (
    "",
    {"sampler.calibration": -1},
    ("sampler.calibration=-1:", "at least 0"),
  ),
  "calibration_of_no_rounds": (
    "",
    {"sampler.calibration": 1, "sampler.calibration_rounds": 0},
    ("sampler.calibration_rounds=0:", "at least 1"),
  ),
  "calibration_of_an_ode": (
    "nft",
    {"sampler.calibration": 1},
    (
      "sampler.calibration=1:",
      "stochastic window of sampler.rollout='trajectory', which is 'ode'",
      "Set it to 0",
    ),
  ),
  "calibration_of_branches": (
    "branch",
    {"sampler.calibration": 1},
    ("sampler.calibration=1:", "which is 'branch'"),
  ),
  "calibration_that_is_drawn": (
    "",
    DRAWN | {"sampler.calibration": 1},
    ("sampler.calibration=1:", "one window, and yours moves", "sampler.window_range=()"),
  ),
  "calibration_that_moves": (
    "",
    PROGRESSIVE | {"sampler.calibration": 1},
    ("sampler.calibration=1:", "sampler.window_every=0"),
  ),
  "calibration_of_known_levels": (
    "",
    {"sampler.calibration": 1, "sampler.noise_levels": (0.7,) * 9},
    ("sampler.calibration=1:", "finds what sampler.noise_levels", "Choose one"),
  ),
  "calibration_without_completions": (
    "",
    {"sampler.calibration": 1, "credit.method": "flow_grpo"},
    ("sampler.calibration=1:", "'flow_grpo' makes no completions", "Use 'increments'"),
  ),
  # completions
  "small_decoder_of_pixels": (
    "",
    {"completion.decoder": "taesd3"},
    ("completion.decoder='taesd3':", "model.variant='tiny' paints pixels itself", "Leave it empty"),
  ),
  "small_decoder_without_completions": (
    "",
    {"completion.decoder": "taesd3", "credit.method": "flow_grpo"},
    ("completion.decoder='taesd3':", "'flow_grpo' makes no completions", "Leave it at ''"),
  ),
  "small_decoder_of_latent_rewards": (
    "",
    {
      "completion.decoder": "taesd3",
      "model.variant": "sd3",
      "model.path": "folder",
      "rewards": {"dina_lrm": {"weight": 1.0, "path": "folder"}},
    },
    ("completion.decoder='taesd3':", "all rewards take latents", "Leave it empty"),
  ),
  "stride_of_zero": (
    "",
    {"completion.strides": (0,)},
    ("completion.strides=(0,):", "at least 1", "such as (1, 2)"),
  ),
  "strides_twice": (
    "",
    {"completion.strides": (1, 1)},
    ("completion.strides=(1, 1):", "different numbers"),
  ),
  "strides_and_steps": (
    "",
    {"completion.strides": (1, 2), "completion.steps": 3},
    ("completion.steps=3:", "completion.strides=(1, 2)", "Choose one"),
  ),
  "steps_negative": ("", {"completion.steps": -1}, ("completion.steps=-1:", "at least 0")),
  "history_of_branches": (
    "branch",
    {"completion.solver": "dpmpp_2m_history"},
    ("completion.solver='dpmpp_2m_history':", "sampler.rollout is 'branch'", "Use 'dpmpp_2m'"),
  ),
  # credit and advantages
  "members_on_trajectories": (
    "",
    {"credit.method": "branch"},
    (
      "credit.method='branch':",
      "sampler.rollout='trajectory'",
      "Use 'increments', or sampler.rollout='branch'",
    ),
  ),
  "increments_on_branches": (
    "branch",
    {"credit.method": "increments"},
    ("credit.method='increments':", "sampler.rollout='branch'", "Use 'branch' or 'branch_gain'"),
  ),
  "alignment_of_an_ode": (
    "nft",
    {"credit.method": "coca"},
    ("credit.method='coca':", "Use 'flow_grpo'"),
  ),
  "own_credit_of_an_ode": (
    "nft",
    {"credit.method": "my.own:credit"},
    ("credit.method='my.own:credit':", "Use 'flow_grpo'"),
  ),
  "gamma": ("", {"credit.gamma": 1.1}, ("credit.gamma=1.1:", "in [0, 1]")),
  "floor": ("", {"advantage.floor": -0.1}, ("advantage.floor=-0.1:", ">= 0", "0 is none")),
  "bonus": ("", {"advantage.bonus": NAN}, ("advantage.bonus=nan:", "finite and >= 0")),
  # objectives
  "nft_of_trajectories": (
    "",
    {"loss.objective": "nft", "loss.clip_range": 0.0},
    ("loss.objective='nft':", "sampler.rollout='trajectory'", "finished images ('ode')"),
  ),
  "policy_of_an_ode": (
    "nft",
    {"loss.objective": "policy", "loss.clip_range": 1e-5},
    ("loss.objective='policy':", "needs the stochastic steps of 'trajectory' or 'branch'"),
  ),
  "nft_by_steps": (
    "nft",
    {"train.updates_by": "steps"},
    ("train.updates_by='steps':", "loss.objective='nft' has none", "Use 'samples'"),
  ),
  "steps_that_do_not_divide": (
    "",
    {"train.updates_by": "steps", "train.updates_per_epoch": 6},
    ("train.updates_per_epoch=6:", "must divide the 9 steps", "Set it to 3"),
  ),
  "branched_steps_that_do_not_divide": (
    "branch",
    {"train.updates_by": "steps", "sampler.branch_steps": 4, "train.updates_per_epoch": 3},
    ("train.updates_per_epoch=3:", "must divide the 4 steps"),
  ),
  "chunks_by_steps": (
    "",
    {"train.updates_by": "steps", "train.updates_per_epoch": 3, "loss.chunks": (4, 5)},
    ("train.updates_by='steps':", "loss.chunks=(4, 5) needs all of them"),
  ),
  "weights_by_steps": (
    "",
    {"train.updates_by": "steps", "train.updates_per_epoch": 3, "loss.step_weight": "std"},
    ("train.updates_by='steps':", "loss.step_weight='std' needs all of them"),
  ),
  "clip_of_one": (
    "",
    {"loss.clip_range": 1.0},
    ("loss.clip_range=1.0:", "below 1 for 'clip'", "1e-5 (cps)"),
  ),
  "no_divergence_allowed": (
    "",
    {"loss.trust_region": "dppo", "loss.clip_range": 0.0},
    ("loss.clip_range=0.0:", "> 0"),
  ),
  "negative_weight": (
    "",
    {"loss.negative_weight": -1.0},
    ("loss.negative_weight=-1.0:", ">= 0", "1 is none"),
  ),
  "chunks_of_another_sum": (
    "",
    {"loss.chunks": (2, 3)},
    ("loss.chunks=(2, 3):", "sum to the 9 steps", "sum to 5", "Try (5, 4)"),
  ),
  "chunk_of_nothing": (
    "",
    {"loss.chunks": (9, 0)},
    ("loss.chunks=(9, 0):", "lengths of at least 1"),
  ),
  "chunks_of_drawn_branches": (
    "branch",
    {"sampler.branch_steps": 2, "loss.chunks": (4, 5)},
    ("loss.chunks=(4, 5):", "the 2 steps"),
  ),
  "chunks_too_many": (
    "",
    {"loss.chunks": (4, 5), "loss.chunks_per_sample": 3},
    ("loss.chunks_per_sample=3:", "0 (all) ... 2"),
  ),
  "chunks_of_none": (
    "",
    {"loss.chunks_per_sample": 1},
    ("loss.chunks_per_sample=1:", "0 (all) ... 0"),
  ),
  "levels_of_policy": (
    "",
    {"loss.levels": 3},
    ("loss.levels=3:", "only for loss.objective='nft' and 'awm'", "Leave it at 0"),
  ),
  "beta_of_policy": (
    "",
    {"loss.beta": 0.1},
    ("loss.beta=0.1:", "only for loss.objective='nft' and 'awm'", "Leave it at 1.0"),
  ),
  "old_policy_of_policy": (
    "",
    {"loss.old_decay": (0.0, 0.1, 0.9)},
    ("loss.old_decay=(0.0, 0.1, 0.9):", "only for"),
  ),
  "old_coef_of_policy": ("", {"loss.old_coef": 1.0}, ("loss.old_coef=1.0:", "only for")),
  "clip_of_nft": (
    "nft",
    {"loss.clip_range": 1e-4},
    ("loss.clip_range=0.0001:", "'nft' has no ratio", "Set it to 0"),
  ),
  "ratio_of_nft": (
    "nft",
    {"loss.ratio": "normalized"},
    ("loss.ratio='normalized':", "of loss.objective='policy'", "Leave it at 'log_prob'"),
  ),
  "trust_region_of_awm": (
    "awm",
    {"loss.trust_region": "dppo"},
    ("loss.trust_region='dppo':", "it is 'awm'"),
  ),
  "step_weight_of_nft": (
    "nft",
    {"loss.step_weight": "std"},
    ("loss.step_weight='std':", "Leave it at 'none'"),
  ),
  "negative_weight_of_nft": (
    "nft",
    {"loss.negative_weight": 0.5},
    ("loss.negative_weight=0.5:", "Leave it at 1.0"),
  ),
  "chunks_of_nft": ("nft", {"loss.chunks": (9,)}, ("loss.chunks=(9,):", "Leave it at ()")),
  "levels_beyond_the_window": (
    "nft",
    {"loss.levels": 10},
    ("loss.levels=10:", "0 (all) ... 9", "sampler.window=(0, 9)"),
  ),
  "levels_negative": ("awm", {"loss.levels": -1}, ("loss.levels=-1:", "0 (all) ... 9")),
  "beta_of_zero": ("nft", {"loss.beta": 0.0}, ("loss.beta=0.0:", "> 0", "1 and .1")),
  "beta_of_awm": (
    "awm",
    {"loss.beta": 0.1},
    ("loss.beta=0.1:", "of loss.objective='nft'", "Leave it at 1.0"),
  ),
  "old_coef": ("awm", {"loss.old_coef": -1.0}, ("loss.old_coef=-1.0:", ">= 0")),
  "old_policy_that_never_moves": (
    "nft",
    {"loss.old_decay": (0.0, 0.1, 1.0)},
    ("loss.old_decay=(0.0, 0.1, 1.0):", "0 <= most < 1", "such as"),
  ),
  "old_policy_of_nan": (
    "nft",
    {"loss.old_decay": (0.0, NAN, 0.5)},
    ("loss.old_decay=", "rate >= 0"),
  ),
  "awm_with_two_updates": (
    "awm",
    {"train.updates_per_epoch": 2},
    ("train.updates_per_epoch=2:", "one update an epoch", "Set it to 1"),
  ),
  "steps_of_no_completion": (
    "",
    {"credit.method": "flow_grpo", "completion.steps": 2},
    ("completion.steps=2:", "'flow_grpo' makes no completions", "Leave it at 0"),
  ),
  "strides_of_no_completion": (
    "nft",
    {"completion.strides": (1, 2)},
    ("completion.strides=(1, 2):", "makes no completions", "Leave it at ()"),
  ),
  "solver_of_no_completion": (
    "",
    {"credit.method": "coca", "completion.solver": "dpmpp_2m"},
    ("completion.solver='dpmpp_2m':", "'coca' makes no completions", "Leave it at 'euler'"),
  ),
  "gamma_without_values": (
    "",
    {"credit.gamma": 0.3},
    ("credit.gamma=0.3:", "of credit.method='vgpo'", "Leave it at 0.9"),
  ),
  "bonus_without_values": (
    "",
    {"advantage.bonus": 0.5},
    ("advantage.bonus=0.5:", "of advantage.normalization='value'", "Leave it at 0.1"),
  ),
  "rounds_without_calibration": (
    "",
    {"sampler.calibration_rounds": 5},
    ("sampler.calibration_rounds=5:", "sampler.calibration=0 makes none", "Leave it at 20"),
  ),
  "reward_of_other_latents": (
    "",
    {"rewards": {"mine": {"weight": 1.0, "make": "dina_lrm"}}},
    ("rewards.mine: 'dina_lrm' takes latents", "model.variant='sd3'", "'tiny'", "Use a reward"),
  ),
  "increments_of_states_by_pictures": (
    "",
    {"credit.method": "latent_increments"},
    ("credit.method='latent_increments':", "rewards.ocr can only look", "name the others in eval"),
  ),
  "latents_that_are_not_kept": (
    "nft",
    {"sampler.latents": "bfloat16"},
    ("sampler.latents='bfloat16':", "keeps no noisy states", "Leave it at 'float32'"),
  ),
  "noise_level_without_noise": (
    "awm",
    {"sampler.noise_level": 0.2},
    ("sampler.noise_level=0.2:", "keeps no noisy states", "Leave it at 0.7"),
  ),
}


def of(base, fields):
  return changed(BASES[base] | fields)


@pytest.mark.parametrize("base", BASES)
def test_base_of_the_cases_is_valid_and_meant(base):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    rules.validate(of(base, {}))


@pytest.mark.parametrize("name", BAD)
def test_choices_that_do_not_go_together_are_refused_in_one_line(name):
  base, fields, parts = BAD[name]
  assert_line(message_of(rules.validate, of(base, fields)), parts)


def test_every_rule_of_the_module_has_a_case():
  """A rule is a `yield`; each yields a line of its own in one case or another."""
  source = method_rules.__loader__.get_source(method_rules.__name__)
  lines = {
    i for i, line in enumerate(source.splitlines(), 1) if re.match(r" +yield (f?\"|\()", line)
  }
  met = set()
  for base, fields, _ in BAD.values():
    for group in vars(method_rules).values():
      rules_of = getattr(group, "__code__", None)
      if rules_of and group.__name__.startswith("_") and "config" in rules_of.co_varnames[:1]:
        met |= _yields(group, of(base, fields))
  assert not lines - met, f"no case for the rules in the lines {sorted(lines - met)}"


def _yields(group, config):
  """Line numbers at which a generator of rules stands when it yields."""
  running, found = group(config), set()
  for _ in running:
    found.add(running.gi_frame.f_lineno)
  return found


@pytest.mark.parametrize("branches", [3, 5, 7, 9, 12, 15])
@pytest.mark.parametrize("size", [16, 24, 30])
def test_branches_that_the_message_proposes_are_accepted(branches, size):
  fields = {"sampler.branches": branches, "train.group_size": size, "train.microbatch": size * 4}
  if size % branches == 0:
    rules.validate(of("branch", fields))
    return
  message = message_of(rules.validate, of("branch", fields))
  proposed = re.search(r"Set it to ([\d or]+)\.", message)[1].split(" or ")
  for number in map(int, proposed):
    rules.validate(of("branch", fields | {"sampler.branches": number}))


def test_microbatches_that_the_message_proposes_keep_the_members_together():
  message = message_of(rules.validate, of("branch", {"train.microbatch": 24}))
  proposed = re.search(r"Set microbatch to ([\d or]+),", message)[1].split(" or ")
  assert proposed == ["16", "32"]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    for number in map(int, proposed):
      rules.validate(of("branch", {"train.microbatch": number}))


@pytest.mark.parametrize(
  "fields, parts",
  [
    ({"sampler.window": (0, 9, 1)}, ("sampler.window=(0, 9, 1):", "2 elements")),
    ({"loss.clip_range": "1e-5"}, ("loss.clip_range='1e-5':", "must be float, is str")),
    ({"credit.method": len}, ("credit.method=", "must be str")),
    ({"train.epochs": True}, ("train.epochs=True:", "must be int, is bool")),
  ],
)
def test_types_of_a_config_made_in_python_are_checked(fields, parts):
  assert_line(message_of(rules.validate, of("", fields)), parts)


@pytest.mark.parametrize(
  "base, fields, parts",
  [
    (
      "nft",
      {"sampler.guidance_scale": 4.5},
      ("sampler.guidance_scale=4.5:", "without guidance", "goes on as you ask"),
    ),
    ("awm", {"sampler.guidance_scale": 4.5}, ("sampler.guidance_scale=4.5:", "AWM")),
    (
      "branch",
      {"train.microbatch": 4},
      ("train.microbatch=4:", "8 members 4 at a time", "Multiples of 8"),
    ),
    (
      "branch",
      {"train.update_microbatch": 4},
      ("train.update_microbatch=4:", "8 members 4 at a time", "Multiples of 8"),
    ),
    (
      "",
      {"advantage.normalization": "value"},
      ("advantage.normalization='value'", "made for each other"),
    ),
    (
      "",
      {"credit.method": "vgpo"},
      ("credit.method='vgpo'", "advantage.normalization='group'", "made for each other"),
    ),
  ],
)
def test_advice_is_a_warning(base, fields, parts):
  with pytest.warns(UserWarning) as caught:
    rules.validate(of(base, fields))
  assert_line(str(caught[0].message), parts)


@pytest.mark.parametrize(
  "base, fields",
  [
    ("branch", {"sampler.window": (9, 10), "sampler.dynamics": "sde"}),
    ("branch", {"sampler.branch_steps": 3, "sampler.antithetic": True}),
    ("branch", {"credit.method": "my.own:credit", "advantage.group": "prompt"}),
    ("branch", {"train.updates_by": "steps", "train.updates_per_epoch": 3}),
    ("nft", {"sampler.window": (0, 10), "loss.levels": 9}),
    ("nft", {"loss.old_decay": (75.0, 0.0075, 0.999), "loss.beta": 0.1}),
    ("awm", {"loss.level_draw": "stratified", "loss.levels": 6, "loss.old_coef": 1.0}),
    ("", PROGRESSIVE),
    ("", DRAWN | {"credit.method": "flow_grpo", "sampler.window_draw": "microbatch"}),
    ("", {"sampler.window": (0, 2), "sampler.noise_levels": (0.7, 1.0)}),
    ("", {"loss.ratio": "my.own:ratio", "loss.trust_region": "my.own:region"}),
    ("", {"loss.trust_region": "dppo", "loss.clip_range": 2.0}),
    ("", {"loss.chunks": (2, 3, 4), "loss.chunks_per_sample": 2}),
    ("", {"optimizer.schedule": "cosine", "optimizer.final_scale": 0.1}),
  ],
)
def test_choices_at_the_edge_are_accepted(base, fields):
  rules.validate(of(base, fields))


def test_apply_gives_a_callable_the_config_as_it_was():
  config = changed({})
  doubled = {"train.group_size": lambda task: 2 * task.train.group_size}
  asked = doubled | {"sampler.branches": lambda task: task.train.group_size}
  found = presets.apply(config, asked)
  assert (found.train.group_size, found.sampler.branches) == (32, 16)
