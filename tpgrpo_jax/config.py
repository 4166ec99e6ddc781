"""Frozen dataclasses of primitives with every default, their validation, and the bridge to ml_collections.

A recipe (configs/x.py) returns `to_config_dict(Config())` with its differences; the command line
changes single fields; `from_config_dict` gives frozen dataclasses back and checks every rule.
Imports no jax.
"""

import dataclasses
import types
import typing
from typing import Any, TypeVar

import ml_collections

from tpgrpo_jax import registry

C = TypeVar("C")

REFERENCE_LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip

MODEL_VARIANTS = ("tiny",)
SCHEDULES = ("linear", "sd3")
DYNAMICS = ("sde", "cps", "dance")
SOLVERS = ("euler", "dpmpp_2m")
CREDIT_METHODS = ("flow_grpo", "increments", "aggregation", "tp_grpo", "tp_grpo_consistent")
NORMALIZATIONS = ("group", "group_joint", "global_std")
REWARD_NAMES = (
    "ocr", "jpeg_compressibility", "jpeg_incompressibility",
    "clipscore", "pickscore", "hpsv2", "aesthetic",
)  # fmt: skip
PROMPT_SOURCES = ("words", "folder")
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots")
LORA_INITS = ("gaussian", "kaiming")


@dataclasses.dataclass(frozen=True)
class Run:
  """Where a run lives; training resumes when the folder holds a checkpoint."""

  dir: str = "runs/tpgrpo"


@dataclasses.dataclass(frozen=True)
class Model:
  """Which transformer.

  Attributes:
    variant: a name of tpgrpo_jax.models.MODELS; "tiny" ships with its weights.
    path: a transformer or a pipeline in diffusers' layout: a folder (config.json + safetensors) or a
      hub id "owner/name"; empty for the variant's own.
    dtype: compute dtype; trainable weights are float32 always.
    remat: what the backward pass recomputes: none, full (every block), dots (all but matmuls).
  """

  variant: str = "tiny"
  path: str = ""
  dtype: str = "float32"
  remat: str = "none"


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters, as peft defines them; rank 0 trains every weight instead.

  Attributes:
    targets: module names as in diffusers; a module matches when its name ends with one of them.
    path: adapters to start from, a .safetensors file or its folder; rank, alpha and targets must be
      the file's own. Empty for fresh ones.
  """

  rank: int = 0
  alpha: float = 64.0
  init: str = "gaussian"
  targets: tuple[str, ...] = REFERENCE_LORA_TARGETS
  path: str = ""


@dataclasses.dataclass(frozen=True)
class Prompts:
  """name "words" is the built-in task; "folder" reads path/train.* and path/test.* (.txt or .jsonl)."""

  name: str = "words"
  path: str = ""


@dataclasses.dataclass(frozen=True)
class Sampler:
  """The denoising trajectory.

  Attributes:
    num_steps: T.
    window: (start, end), the half-open range of stochastic steps.
    window_range: () keeps the window; (lo, hi) shifts it every epoch to a start drawn from
      lo ... hi - length.
    shift: of the sd3 schedule; unused by linear.
    guidance_scale: 1 is no guidance, and costs one model evaluation a step instead of two.
    same_latent: the samples of one prompt start from the same noise.
  """

  num_steps: int = 10
  window: tuple[int, int] = (0, 9)
  window_range: tuple[int, ...] = ()
  schedule: str = "linear"
  shift: float = 3.0
  dynamics: str = "cps"
  noise_level: float = 0.7
  guidance_scale: float = 1.0
  same_latent: bool = False


@dataclasses.dataclass(frozen=True)
class Completion:
  """ODE completions of the intermediate states.

  Attributes:
    steps: at most so many solver steps each; 0 is exact (the sampler's own remaining grid).
    solver: euler, or dpmpp_2m (DPM-Solver++(2M)).
    lanes_per_chunk: packed lanes computed at once; 0 is all of them.
  """

  steps: int = 0
  solver: str = "euler"
  lanes_per_chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Credit:
  """Which credit method, and whether positive and negative replacements are balanced (App. D)."""

  method: str = "tp_grpo"
  balance: bool = True


@dataclasses.dataclass(frozen=True)
class Advantage:
  """How step rewards become advantages: the spread that divides them, and the final clip."""

  normalization: str = "group"
  clip: float = 5.0


@dataclasses.dataclass(frozen=True)
class Loss:
  """The clipped surrogate and the KL term to the adapter-free model."""

  clip_range: float = 1e-5
  kl_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with a constant learning rate after a linear warm-up, and global-norm clipping."""

  learning_rate: float = 3e-4
  warmup_updates: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 1e-4
  max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Train:
  """Sizes of an epoch.

  Attributes:
    microbatch: samples in one device call, of all devices together; rollout and update use the same.
    updates_per_epoch: optimizer updates, each on an equal share of the epoch's samples.
  """

  epochs: int = 100
  prompts_per_epoch: int = 8
  group_size: int = 16
  microbatch: int = 64
  updates_per_epoch: int = 2


@dataclasses.dataclass(frozen=True)
class Ema:
  """Exponential moving average of the trainable weights, updated every `every` updates."""

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
  """

  every: int = 10
  num_steps: int = 10
  rewards: tuple[str, ...] = ()
  prompts: int = 128
  batch: int = 128


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device mesh; data=-1 takes the devices that fsdp x tensor leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Epochs between checkpoints, and how many of the newest are kept."""

  every: int = 10
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class Log:
  """TensorBoard and Weights & Biases beside metrics.jsonl; images_every epochs a sample grid."""

  tensorboard: bool = True
  wandb: bool = False
  images_every: int = 10


@dataclasses.dataclass(frozen=True)
class Config:
  """One RL fine-tuning run.

  Attributes:
    rewards: label -> weight, or label -> {"weight": w, "make": name or "package.module:make",
      ...options of that reward}; the label is the reward's name unless "make" says otherwise.
  """

  seed: int = 0
  run: Run = Run()
  model: Model = Model()
  lora: Lora = Lora()
  prompts: Prompts = Prompts()
  sampler: Sampler = Sampler()
  completion: Completion = Completion()
  credit: Credit = Credit()
  advantage: Advantage = Advantage()
  rewards: dict[str, Any] = dataclasses.field(default_factory=lambda: {"ocr": 1.0})
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  ema: Ema = Ema()
  eval: Eval = Eval()
  mesh: Mesh = Mesh()
  checkpoint: Checkpoint = Checkpoint()
  log: Log = Log()


def tiny_text() -> Config:
  """The settings that the recipes of the built-in task share; found on two CPU cores."""
  return Config(
    sampler=Sampler(num_steps=4, window=(0, 3)),
    optimizer=Optimizer(learning_rate=1.5e-4),
    train=Train(epochs=120, microbatch=32, updates_per_epoch=4),
    ema=Ema(decay=0.95, every=1),
    eval=Eval(num_steps=4, prompts=256),
    log=Log(images_every=20),
  )


@dataclasses.dataclass(frozen=True)
class PretrainTrain:
  """Flow-matching pretraining: updates of `batch` rendered words each.

  Attributes:
    text_dropout: share of samples whose text is dropped, so that guidance works afterwards.
  """

  updates: int = 2150
  batch: int = 128
  text_dropout: float = 0.1
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


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """A ConfigDict with the fields of a config dataclass, for a recipe to change."""
  tree = dataclasses.asdict(config)
  rewards = tree.pop("rewards", None)
  result = ml_collections.ConfigDict(tree)
  if rewards is not None:
    # Labels of rewards are data, not fields: a recipe or the command line may add and remove them.
    result.rewards = ml_collections.ConfigDict(rewards, allow_dotted_keys=True)
  return result


def from_config_dict(cls: type[C], tree: Any) -> C:
  """Builds the frozen dataclass `cls` from a ConfigDict (or nested dict), checking names and types.

  Raises:
    ValueError: an unknown key (with the nearest one) or a value of the wrong type.
  """
  if isinstance(tree, ml_collections.ConfigDict):
    tree = tree.to_dict()
  if not isinstance(tree, dict):
    raise ValueError(
      "--config: no recipe. Give a Python file whose get_config() returns one, such as "
      "--config configs/tiny_text_tpgrpo.py."
    )
  return _build(cls, tree, prefix="")


def check_key(cls: type, key: str) -> None:
  """Checks that a dotted key of the command line names a field of the dataclass `cls`.

  Raises:
    ValueError: no such field (with the nearest one), or a label below `rewards`: these are set all
      together.
  """
  hints, prefix = typing.get_type_hints(cls), ""
  for part in key.split("."):
    if prefix == "rewards.":
      raise ValueError(
        f"{key}: labels of rewards are set together on the command line, such as "
        """--config.rewards="{'ocr': 1.0, 'jpeg_compressibility': 0.1}"."""
      )
    if part not in hints:
      raise ValueError(f"{prefix}{part}: unknown config key.{registry.nearest(part, hints)}")
    prefix += f"{part}."
    hints = typing.get_type_hints(hints[part]) if dataclasses.is_dataclass(hints[part]) else {}


def _build(cls, tree, prefix):
  hints = typing.get_type_hints(cls)
  if not isinstance(tree, dict):
    raise ValueError(
      f"{prefix[:-1]}={tree!r}: must be a group of fields.{registry.nearest('', hints)}"
    )
  for key in tree:
    if key not in hints:
      raise ValueError(f"{prefix}{key}: unknown config key.{registry.nearest(key, hints)}")
  values = {key: _convert(hints[key], value, prefix + key) for key, value in tree.items()}
  return cls(**values)


def _convert(hint, value, field):
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, field + ".")
  origin = typing.get_origin(hint)
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      example = f"({value!r},)" if isinstance(value, str) else "(0, 9)"
      raise ValueError(f"{field}={value!r}: must be a tuple, such as {field}={example}.")
    args = [a for a in typing.get_args(hint) if a is not Ellipsis]
    kinds = args * len(value) if Ellipsis in typing.get_args(hint) else args
    if len(kinds) != len(value):
      raise ValueError(f"{field}={value!r}: must have {len(kinds)} elements, has {len(value)}.")
    return tuple(_convert(kind, v, field) for kind, v in zip(kinds, value))
  if origin is dict or isinstance(hint, types.GenericAlias):
    if not isinstance(value, dict):
      raise ValueError(f"{field}={value!r}: must be a mapping, such as {{'ocr': 1.0}}.")
    return dict(value)
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is not hint:
    raise ValueError(f"{field}={value!r}: must be {hint.__name__}, is {type(value).__name__}.")
  return value
