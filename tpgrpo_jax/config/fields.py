"""Frozen dataclasses of primitives, with every default.

A recipe (configs/x.py) returns `to_config_dict(Config())` with its differences; the command line
changes single fields; `from_config_dict` gives frozen dataclasses back. Imports no jax.
"""

import dataclasses
from typing import Any

from tpgrpo_jax.config.machine_fields import Checkpoint, Distributed, Log, Mesh
from tpgrpo_jax.config.model_fields import Lora, Model, Text, Vae


@dataclasses.dataclass(frozen=True)
class Run:
  """Where a run lives; training resumes when the folder holds a checkpoint.

  Attributes:
    dir: the folder, or gs://bucket/folder. "{seed}" in it stands for "_seed1" with seed=1, so that seeds do
      not collide, and for nothing with seed=0.
    label: what reports call it; empty for its credit.method.
    programs: folder of compiled programs that runs share, so that a resumed run compiles nothing; empty
      for $JAX_COMPILATION_CACHE_DIR, else ~/.cache/tpgrpo_jax/programs; "off" for none.
  """

  dir: str = "runs/tpgrpo{seed}"
  label: str = ""
  programs: str = ""


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What is asked for.

  Attributes:
    name: "words" and "shapes" are the built-in tasks; "folder" reads path/train.* and path/test.* (.txt or
      .jsonl), "geneval" GenEval's metadata at path. Models that edit need .jsonl with an "image" in each
      line.
    path: of "folder" and "geneval".
    cache: folder of prepared prompts that runs share; empty for $TFDS_DATA_DIR, else ~/.cache/tpgrpo_jax.
  """

  name: str = "words"
  path: str = ""
  cache: str = ""


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How states come about.

  Attributes:
    rollout: "trajectory", whose window is stochastic; "branch", an ODE anchor that `branches` members
      leave by one stochastic step at each step of the window; "ode", finished images alone, for the
      objectives of the forward process.
    num_steps: T.
    window: (start, end), the half-open range of stochastic steps. With rollout="ode": of the noise levels
      that are trained.
    window_range: () keeps the window; (lo, hi) shifts it to a start drawn from lo ... hi - length.
    window_draw: how often it is drawn: each "epoch" or each "microbatch".
    window_every: 0 keeps the window; n moves it by one step every n epochs, and from the end back to its
      first place (MixGRPO).
    branches: M, members of an anchor; divides train.group_size.
    branch_steps: steps of the window that are branched, drawn anew every epoch; 0 is all of them.
    antithetic: members come in pairs that take opposite noise.
    dynamics: of a stochastic step: "cps" (Flow-CPS), "sde" (Flow-GRPO), "dance" (DanceGRPO).
    noise_level: of every stochastic step, the papers' a or eta.
    noise_levels: one for each step of the window in place of noise_level; () for none.
    calibration: microbatches of trajectories in each round of finding noise_levels, before the first epoch
      (DenseGRPO); 0 does not. noise_level is where they start.
    calibration_rounds: how many.
    latents: dtype that latents are kept in; they are rounded to it before they are scored.
    schedule: noise levels: linear; sd3 (diffusers' FlowMatchEulerDiscreteScheduler with a fixed shift, as
      SD3's pipeline uses it); shifted (the same as Z-Image's does); flux, flux2 and sd3_dynamic (with a shift
      that grows with the image, as FLUX.1-dev; falls with the steps too, as FLUX.2; and as SD3's pipeline
      with use_dynamic_shifting). The line of the growing shift and its last level are the pipeline's own.
    shift: of the schedules sd3 and shifted; the others do not use it.
    guidance_scale: 0 ... 1 is no guidance, as in diffusers. A larger one costs two model evaluations a step
      instead of one, but FLUX.1-dev is told it (any value), and FLUX.1-schnell knows none. Z-Image's pipeline
      counts it from 0: its guidance_scale=4 is 5 here.
    same_latent: the samples of one prompt start from the same noise.
    height: of an image in pixels; 0 is the model's own.
    width: likewise.
  """

  rollout: str = "trajectory"
  num_steps: int = 10
  window: tuple[int, int] = (0, 9)
  window_range: tuple[int, ...] = ()
  window_draw: str = "epoch"
  window_every: int = 0
  branches: int = 1
  branch_steps: int = 0
  antithetic: bool = False
  schedule: str = "linear"
  shift: float = 3.0
  dynamics: str = "cps"
  noise_level: float = 0.7
  noise_levels: tuple[float, ...] = ()
  calibration: int = 0
  calibration_rounds: int = 20
  guidance_scale: float = 1.0
  same_latent: bool = False
  latents: str = "float32"
  height: int = 0
  width: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """ODE completions of the intermediate states.

  Attributes:
    steps: at most so many solver steps each; 0 is exact (the sampler's own remaining grid).
    strides: each state is completed once for each of them, on every so many-th level of the remaining
      grid (G2RPO); the advantages add up. () is the grid itself.
    solver: euler, dpmpp_2m (DPM-Solver++(2M)), or dpmpp_2m_history, whose first step remembers the
      trajectory's evaluation before.
    lanes_per_chunk: at most so many packed lanes are computed at once; 0 is all of them.
    decoder: folder or hub id of an AutoencoderTiny (TAESD3, TAEF1) that paints the completions; empty for the
      pipeline's own autoencoder, which paints everything else anyway.
  """

  steps: int = 0
  strides: tuple[int, ...] = ()
  solver: str = "euler"
  lanes_per_chunk: int = 0
  decoder: str = ""


@dataclasses.dataclass(frozen=True)
class Credit:
  """Which credit method.

  Attributes:
    method: a name of tpgrpo_jax.credit.CREDIT, or "package.module:function".
    balance: whether positive and negative replacements at turning points are balanced (App. D).
    gamma: discount of vgpo.
  """

  method: str = "tp_grpo"
  balance: bool = True
  gamma: float = 0.9


@dataclasses.dataclass(frozen=True)
class Advantage:
  """How step rewards become advantages.

  Attributes:
    normalization: what centres and divides them: a name of tpgrpo_jax.credit.advantages.ADVANTAGES.
    group: whom a member is compared with: all samples of its "prompt" at that step, or the members of its
      "state" (rollout="branch").
    floor: the spread that divides is at least this; 0 is none.
    per_reward: each reward is normalised for itself, and the advantages are added with the rewards'
      weights (MixGRPO, GDPO), instead of the rewards.
    bonus: of "value", vgpo's c.
    clip: final bound of their size.
  """

  normalization: str = "group"
  group: str = "prompt"
  floor: float = 0.0
  bonus: float = 0.1
  per_reward: bool = False
  clip: float = 5.0


@dataclasses.dataclass(frozen=True)
class Scoring:
  """When a reward of the host fails: the call is made again, and at last the run saves and stops.

  Attributes:
    timeout: seconds that one call may take.
    retries: how often a call is made again that took longer, or that raised OSError or RuntimeError (a
      server that is away).
    backoff: seconds before the first of these; then twice as many, four times ...
  """

  timeout: float = 600.0
  retries: int = 3
  backoff: float = 1.0


@dataclasses.dataclass(frozen=True)
class Loss:
  """What is minimised.

  Attributes:
    objective: "policy", a surrogate of the stochastic steps' ratios; "nft" or "awm", losses of the forward
      process on finished images (rollout="ode").
    ratio: "log_prob", "normalized" (RatioNorm), or "package.module:function".
    trust_region: "clip" (PPO), "dppo", or "package.module:function".
    clip_range: c of clip; the divergence that dppo allows; 0 for objectives without a ratio.
    old_log_prob: of the "rollout", of the "update" (its own program, before an epoch's first optimizer step),
      or "auto": the rollout's until an epoch's first log-ratio is above a tenth of clip_range.
    step_weight: factor of a step's policy loss: none, std (mean 1 over the trained steps), inverse_dt,
      inverse_sensitivity.
    negative_weight: factor where the advantage is negative.
    chunks: lengths of runs of steps that share one ratio, the mean of theirs (GCPO); () is every step's own.
    chunks_per_sample: of these, drawn anew for each sample; 0 is all.
    kl_coef: of the KL to the adapter-free model; of mean (v - v_ref)^2 for nft and awm.
    levels: noise levels of the window that a sample is trained at (nft, awm); 0 is all.
    level_draw: "permuted", each sample's own (nft), or "stratified", the same for a microbatch (awm).
    beta: of nft: how far the two implicit policies lie from the old one.
    old_decay: (flat, rate, most): after an epoch the old policy becomes d old + (1 - d) new,
      d = min(rate (updates - flat), most), and 0 up to `flat` updates.
    old_coef: of mean (v - v_old)^2 (awm).
  """

  objective: str = "policy"
  ratio: str = "log_prob"
  trust_region: str = "clip"
  clip_range: float = 1e-5
  old_log_prob: str = "auto"
  step_weight: str = "none"
  negative_weight: float = 1.0
  chunks: tuple[int, ...] = ()
  chunks_per_sample: int = 0
  kl_coef: float = 0.0
  levels: int = 0
  level_draw: str = "permuted"
  beta: float = 1.0
  old_decay: tuple[float, float, float] = (0.0, 0.001, 0.5)
  old_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with a learning rate that warms up linearly, and global-norm clipping.

  Attributes:
    learning_rate: after the warm-up.
    warmup_updates: updates in which it grows from 0.
    schedule: of the rate after the warm-up: constant; linear or cosine, down to final_scale of it at the
      run's last update.
    final_scale: share of learning_rate that is left at the end.
    b1: of AdamW, decay of the gradient's mean.
    b2: of AdamW, decay of its square's mean.
    eps: of AdamW, added to the root of the latter.
    weight_decay: of AdamW, times the rate.
    decay_to: what it pulls the weights to: "zero", or the "start" of the run.
    max_grad_norm: the gradient is scaled down to this norm.
  """

  learning_rate: float = 3e-4
  warmup_updates: int = 0
  schedule: str = "constant"
  final_scale: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 1e-4
  decay_to: str = "zero"
  max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Train:
  """Sizes of an epoch.

  Attributes:
    epochs: of the run.
    prompts_per_epoch: P, prompts in an epoch.
    group_size: K, samples of each prompt, which are compared.
    microbatch: samples in one device call, of all devices together.
    update_microbatch: samples that an update evaluates at once, where they are fewer than the rollout's: what
      its backward pass keeps is then less, so that model.remat may be "dots" or "none". 0 is microbatch.
    updates_per_epoch: optimizer updates, each on an equal share of the epoch's samples.
    updates_by: what they share out: "samples", or the "steps" of the window, in order (G2RPO).
    shuffle: samples go into the updates in random order, and not prompt by prompt.
    steps_per_call: pairs of microbatch and step that an update evaluates side by side. With mesh.fsdp each
      block's weights are gathered once for all of them, at the price of memory: docs/scaling.md.
  """

  epochs: int = 100
  prompts_per_epoch: int = 8
  group_size: int = 16
  microbatch: int = 64
  update_microbatch: int = 0
  updates_per_epoch: int = 2
  updates_by: str = "samples"
  shuffle: bool = False
  steps_per_call: int = 1


@dataclasses.dataclass(frozen=True)
class Ema:
  """Exponential moving average of the trainable weights, which evaluations use.

  Attributes:
    decay: share of the average that stays when it moves.
    every: updates between its moves.
  """

  decay: float = 0.9
  every: int = 8


@dataclasses.dataclass(frozen=True)
class Eval:
  """Evaluation on held-out prompts: ODE sampling with EMA weights from fixed noise.

  Attributes:
    every: epochs between evaluations; 0 evaluates only before the first and after the last.
    num_steps: solver steps.
    rewards: names of rewards to report; () is those of training.
    prompts: how many held-out prompts.
    batch: images in one device call.
    patience: the run ends when so many evaluations in a row bring no better checkpoint.best; 0 goes on.
    judge_prompts: further held-out prompts, after those of evaluations. When the run has ended, they judge
      the base model, the last weights and the best ones. One that is evaluated too has other noise. 0 does
      not.
  """

  every: int = 10
  num_steps: int = 10
  rewards: tuple[str, ...] = ()
  prompts: int = 128
  batch: int = 128
  patience: int = 0
  judge_prompts: int = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """One RL fine-tuning run.

  Attributes:
    seed: of weights, prompts and noise.
    rewards: label -> weight, or label -> {"weight": w, "make": name or "package.module:make",
      ...options of that reward}; the label is the reward's name unless "make" says otherwise.
  """

  seed: int = 0
  run: Run = Run()
  model: Model = Model()
  text: Text = Text()
  vae: Vae = Vae()
  lora: Lora = Lora()
  prompts: Prompts = Prompts()
  sampler: Sampler = Sampler()
  completion: Completion = Completion()
  credit: Credit = Credit()
  advantage: Advantage = Advantage()
  rewards: dict[str, Any] = dataclasses.field(default_factory=lambda: {"ocr": 1.0})
  scoring: Scoring = Scoring()
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  ema: Ema = Ema()
  eval: Eval = Eval()
  mesh: Mesh = Mesh()
  distributed: Distributed = Distributed()
  checkpoint: Checkpoint = Checkpoint()
  log: Log = Log()


@dataclasses.dataclass(frozen=True)
class PretrainTrain:
  """Flow-matching pretraining: updates of `batch` rendered pictures each.

  Attributes:
    text_dropout: share of samples whose text is dropped, so that guidance works afterwards.
    logit_mean: of the noise levels, sigma = 1 / (1 + exp(-(logit_mean + z))) with z ~ N(0, 1). More than 0
      trains the high ones more, where large plain pictures are laid out (SD3's shift by resolution).
    output_dtype: of the weights as they are written: float32, or bfloat16 in half of the bytes.
  """

  updates: int = 2150
  batch: int = 128
  text_dropout: float = 0.1
  logit_mean: float = 0.0
  output_dtype: str = "float32"
  log_every: int = 50


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """One pretraining run; `output` is the folder that receives the model in diffusers' layout."""

  seed: int = 0
  run: Run = Run("runs/tiny_text_pretrain")
  output: str = "runs/tiny_text_pretrain/model"
  model: Model = Model()
  train: PretrainTrain = PretrainTrain()
  optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_updates=200, weight_decay=0.01)
  ema: Ema = Ema(decay=0.998, every=1)
  eval: Eval = Eval(every=250, prompts=512, rewards=("ocr",))
  mesh: Mesh = Mesh()
