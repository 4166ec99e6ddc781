"""Every array pytree and function type that crosses a module boundary.

Axes: P prompts, K samples a prompt, B = P K, T steps, W window, L text tokens, h w c latent,
H W 3 image. Time first: [T, B, ...].
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal, NamedTuple, dataclass_transform

import jax
import numpy as np

Params = Any  # a pytree of arrays


@dataclass_transform(frozen_default=True)
def _pytree(cls):
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Condition:
  """What the model is conditioned on.

  Attributes:
    text: [B, L, E] sequence embedding.
    pooled: [B, F] pooled embedding; None for models that read none.
    length: [B] int32, how many of the L tokens are the prompt's; None for models that read all of them.
    image: [B, h', w', c] latents of the picture that is edited; None for models that paint from text alone.
  """

  text: jax.Array
  pooled: jax.Array | None = None
  length: jax.Array | None = None
  image: jax.Array | None = None


@_pytree
class GuidedCondition:
  """A condition and the one that guidance moves away from, of leading axis B, or 1 for all the same."""

  positive: Condition
  negative: Condition


@_pytree
class Gaussian:
  """N(mean, std^2 I), the law of x_next given x.

  Attributes:
    mean: [B, ...].
    std: the full standard deviation, broadcastable against mean; 0 for a deterministic step.
  """

  mean: jax.Array
  std: jax.Array


@_pytree
class Transitions:
  """What an update learns from: S states of each of W steps, and the M members that left each of them.

  On trajectories M = 1 and S = B samples; on branches S anchors have M members each, S M = B.

  Attributes:
    states: [W, S, h, w, c] those before each step; of trajectories [W + 1, S, h, w, c], each of which
      leads to the next.
    members: [W, S, M, h, w, c] those after each step, on branches; None of trajectories.
    velocity: [W, S, h, w, c] the model's output at x, of the weights that sampled; None where no update
      reads it.
    log_prob: [W, S, M] mean over latent dims of the log-density of x_next.
    sigma: [W] noise level of x.
    sigma_next: [W] noise level of x_next.
    final: [S, h, w, c] the finished latent of the trajectory (of the anchor, on branches).
  """

  states: jax.Array
  members: jax.Array | None
  velocity: jax.Array | None
  log_prob: jax.Array
  sigma: jax.Array
  sigma_next: jax.Array
  final: jax.Array

  @property
  def x(self) -> jax.Array:
    """[W, S, h, w, c] states before each step."""
    return self.states[: len(self.sigma)]

  @property
  def x_next(self) -> jax.Array:
    """[W, S, M, h, w, c] states after it."""
    return self.states[1:, :, None] if self.members is None else self.members


@_pytree
class StepCredit:
  """The reward that each stochastic step is given.

  Attributes:
    reward: [W, B].
    is_turning_point: [W, B] bool, the steps whose reward was replaced by an aggregated one.
    share: [W, B] factor of the step's advantage, or None for 1 everywhere.
  """

  reward: jax.Array
  is_turning_point: jax.Array
  share: jax.Array | None = None


@_pytree
class Samples:
  """What the rewards of a microbatch are given, where one of them takes latents.

  Attributes:
    x: [S, n, h, w, c] n latents of each of S samples (or anchors): their completions or noisy states, then
      the finished one.
    sigma: [n] their noise levels, 0 of finished ones.
    images: uint8 [S, n, H, W, 3] the same decoded, where a reward looks at pictures too; else None.
  """

  x: jax.Array
  sigma: jax.Array
  images: jax.Array | None = None


class Plan(NamedTuple):
  """Which lane does what in each step of the packed completions (flow.completion); plain NumPy.

  Attributes:
    state: [segments] the state that each completion begins from.
    load: [L, lanes] segment that a lane loads before the step, or -1 to go on with its own.
    store: [L, lanes] segment whose completion ends with the step, or their number for none.
    sigma: [L, lanes]; sigma_next: [L, lanes] the step's levels (equal where a lane is idle).
    extrapolation: [L, lanes] m of DPM-Solver++(2M): the data prediction D is replaced by
      D + m (D - D_previous); 0 is the Euler step.
    first: [2, segments] sigma and sigma_next of the step that a trajectory's states take with the
      velocity that is known; unused for members of branches.
    first_extrapolation: [segments] m of that step.
    busy: [L, lanes] bool, where the plan was padded: what is idle in all lanes is not evaluated. () evaluates
      all.
  """

  state: np.ndarray
  load: np.ndarray
  store: np.ndarray
  sigma: np.ndarray
  sigma_next: np.ndarray
  extrapolation: np.ndarray
  first: np.ndarray | tuple = ()
  first_extrapolation: np.ndarray | tuple = ()
  busy: np.ndarray | tuple = ()


VelocityFn = Callable[[Params, jax.Array, jax.Array, Any], jax.Array]
"""(params, x [B, h, w, c], sigma [B], condition) -> velocity [B, h, w, c] = noise - data.

The condition's leading axis is B or a divisor of it: neighbours of the batch share its rows."""

StepFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Gaussian]
"""(x, velocity, sigma, sigma_next) -> the Gaussian of x_next."""

LogProbFn = Callable[[jax.Array, Gaussian], jax.Array]
"""(x_next, gaussian) -> [B], mean over latent dims."""

CreditFn = Callable[..., StepCredit]
"""(completion_reward [W+1, B], **extras) -> StepCredit."""


class CreditMethod(NamedTuple):
  """A credit function, what R[k] of a state is the reward of, and what else it needs.

  Attributes:
    function: of the completion rewards, and of its extras by keyword.
    completions: "all": R[k] is that of the state's completion; "states": that of the noisy state itself, for
      rewards that take latents; "none": there is none but R[W].
    extras: "key" (a PRNG key of the epoch), "alignment" ([W+1, B] cosine of the latent after k steps and
      the finished one).
  """

  function: CreditFn
  completions: Literal["all", "states", "none"]
  extras: tuple[str, ...] = ()


RewardFn = Callable[
  [np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], tuple[np.ndarray, dict[str, Any]]
]
"""(images uint8 [N, H, W, 3], prompts, metadata) -> (scores float32 [N], info). Where it has an attribute
`flops`, (height, width) -> the operations that one picture takes, they are in a run's total."""


DeviceRewardFn = Callable[[jax.Array, Sequence[str], Sequence[Mapping[str, Any]]], jax.Array]
"""(images uint8 [N, H, W, 3] on the devices, prompts, metadata) -> scores float32 [N], dispatched and
not waited for. `flops` as of RewardFn."""


LatentRewardFn = Callable[[Samples, Any], jax.Array]
"""(samples, condition of leading axis S) -> scores [S, n], dispatched and not waited for. Its attribute
`check_model`, (latent_shape, condition) -> None, raises ValueError for a model that it cannot judge."""


class Placement(NamedTuple):
  """How arrays of the host come onto a mesh.

  Attributes:
    params: tree of shapes -> the same tree of shardings, for weights.
    batch: tree of arrays with leading axis B, of the host or laid out otherwise -> the same on the
      devices, divided along B.
  """

  params: Callable[[Any], Any]
  batch: Callable[[Any], Any]


class Prompt(NamedTuple):
  """One prompt and what its dataset says of it (passed on to the rewards untouched)."""

  text: str
  metadata: Mapping[str, Any]


def texts_of(prompts: Sequence[Prompt | str]) -> list[str]:
  """The texts of prompts, of which those without metadata may be bare texts."""
  return [prompt.text if isinstance(prompt, Prompt) else prompt for prompt in prompts]
