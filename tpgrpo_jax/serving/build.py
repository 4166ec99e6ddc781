"""From the names of rewards to their workers."""

from collections.abc import Mapping, Sequence
from importlib import metadata
import json
from typing import Any

import jax

from tpgrpo_jax import registry, rewards, types
from tpgrpo_jax.rewards import canary as canary_lib
from tpgrpo_jax.serving import scorer as scorer_lib

TOGETHER = 64  # pictures of several requests that the devices score as one batch
_PACKAGES = ("jax", "numpy", "rapidocr", "onnxruntime", "torch", "transformers")


def read_specs(labels: Sequence[str], options: str) -> dict[str, dict[str, Any]]:
  """label -> what `config.rewards` would say of it.

  Args:
    labels: names of rewards, or "package.module:make".
    options: JSON, label -> the options of that reward; "make" among them names its maker.

  Raises:
    ValueError: no labels, one label or option twice, or options of none of them.
  """
  if not labels:
    raise ValueError(f"--rewards: names none. Choices: {', '.join(rewards.REWARDS)}.")
  twice = sorted({label for label in labels if labels.count(label) > 1})
  if twice:
    raise ValueError(
      f"--rewards={','.join(labels)}: has {twice[0]!r} twice. Name each once; give one of them another "
      """label: --rewards=ocr,scenes --options='{"scenes": {"make": "ocr", "detect": true}}'."""
    )
  try:
    asked = json.loads(options or "{}", object_pairs_hook=_once)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"--options={options!r}: must be JSON ({error}).") from error
  if not isinstance(asked, dict) or not all(isinstance(each, dict) for each in asked.values()):
    raise ValueError(f"--options={options!r}: must be label -> options, as {{'ocr': {{...}}}}.")
  for label in asked:
    if label not in labels:
      raise ValueError(
        f"--options: {label!r} is not in --rewards.{registry.nearest(label, labels)}"
      )
  specs = {label: {"weight": 1.0, **asked.get(label, {})} for label in labels}
  for label, spec in specs.items():
    if spec.get("make", label) in rewards.LATENT_REWARDS:
      raise ValueError(
        f"--rewards: {label!r} takes latents, and a request holds pictures. It runs in the training itself."
      )
  return specs


def _once(pairs):
  """The dict of a JSON object's pairs; ValueError where a name stands twice: JSON keeps the last."""
  names = [name for name, _ in pairs]
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{name!r} stands twice in an object: name each once")
  return dict(pairs)


def uses_devices(specs: Mapping[str, Mapping[str, Any]]) -> bool:
  """Whether one of the rewards runs on JAX's devices."""
  return any(spec.get("make", label) in rewards.DEVICE_REWARDS for label, spec in specs.items())


def stay_on_cpu() -> None:
  """Keeps JAX off the accelerators, whose memory it would take from rewards in torch."""
  jax.config.update("jax_platforms", "cpu")


def open_scorers(
  specs: Mapping[str, Mapping[str, Any]],
  *,
  workers: int,
  timeout: float,
  placement: types.Placement | None = None,
) -> dict[str, scorer_lib.Scorer]:
  """Makes the rewards, starts their workers, and asks every canary.

  Args:
    specs: of `read_specs`.
    workers: of each reward, or 0 for two.
    timeout: seconds that a reward of the host may take for a request.
    placement: of rewards of the devices.

  Raises:
    ValueError: whatever is wrong with a name or an option, or a reward whose canary scores wrongly.
  """
  scorers = {}
  for label, spec in specs.items():
    reward_fn = rewards.make_rewards({label: spec}, placement=placement, timeout=timeout)
    name = spec.get("make", label)
    own = reward_fn.canaries[label]  # pyright: ignore[reportFunctionMemberAccess]
    known = canary_lib.CANARIES.get(name)
    scorers[label] = scorer_lib.Scorer(
      label,
      reward_fn,
      workers=workers or 2,
      together=TOGETHER if name in rewards.DEVICE_REWARDS else 0,
      canary=own or (known() if known else None),
    )
  for label, scorer in scorers.items():
    if problem := scorer.check_canary():
      raise ValueError(
        f"--rewards: {label!r} {problem}. It is not what it should be, and is not served. Look at its "
        "weights and options."
      )
  return scorers


def versions(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """label -> what /health says of it: its maker and options, and the packages that it may use."""
  found = {}
  for package in ("tpgrpo_jax", *_PACKAGES):
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      continue
  return {
    label: {
      "make": spec.get("make", label),
      "options": {n: v for n, v in spec.items() if n not in ("make", "weight")},
      "versions": found,
    }
    for label, spec in specs.items()
  }
