"""SD3.5-Medium by diffusers and peft on torch, for gpu.py: evaluation and update, eager and compiled."""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import time
from typing import Any

import accelerator
import numpy as np
import true_models

from tpgrpo_jax.config import model_fields


def measure(args: argparse.Namespace, left: Callable[[argparse.Namespace], float]) -> None:
  """Reports seconds of both, eager first.

  Args:
    args: of gpu.py.
    left: seconds that remain for everything.
  """
  import diffusers
  import peft
  import torch

  model = true_models.TRUE_MODELS["sd35_medium"]
  if args.small:
    model = dataclasses.replace(true_models.shrink(model, 2), num_steps=3)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu" and not args.small:
    raise RuntimeError("torch has no CUDA here")
  batch = args.sizes[0]
  torch.manual_seed(0)
  torch.set_default_dtype(torch.bfloat16)
  with torch.device(device):
    theirs = diffusers.SD3Transformer2DModel(**dataclasses.asdict(model.config))
    passes = batch * (1 if model.guidance_scale == 1.0 else 2)
    inputs = accelerator.torch_inputs(torch, model, passes, False)
  torch.set_default_dtype(torch.float32)
  theirs.requires_grad_(False)
  targets = [*model_fields.REFERENCE_LORA_TARGETS]
  theirs.add_adapter(peft.LoraConfig(r=32, lora_alpha=64, target_modules=targets))
  forms = {"eager": theirs, "compiled": torch.compile(theirs)}
  shared = dict(batch=batch, small=args.small, device=device_name(torch, device))
  for mode, module in forms.items():
    call = functools.partial(evaluate, torch, module, inputs)
    report(torch, "torch_evaluation", time_of(torch, call, args.repeats), mode=mode, **shared)
  for remat in ("full", "none"):
    (
      theirs.enable_gradient_checkpointing
      if remat == "full"
      else theirs.disable_gradient_checkpointing
    )()
    theirs.train()
    for mode, module in forms.items():
      weights = [p for p in theirs.parameters() if p.requires_grad]
      optimizer = torch.optim.AdamW(weights, lr=3e-4)
      steps = model.num_steps - 1
      call = functools.partial(update, torch, module, inputs, optimizer, steps)
      details = dict(mode=mode, remat=remat, steps=steps, **shared)
      if left(args) < 20 and not args.small:
        return
      try:
        report(torch, "torch_update", time_of(torch, call, args.repeats), **details)
      except torch.OutOfMemoryError as error:
        line = {"figure": "torch_update", "refused": str(error)[:200], **details}
        print(json.dumps(line), flush=True)


def device_name(torch: Any, device: str) -> str:
  """Of the card, or "cpu"."""
  return torch.cuda.get_device_name() if device == "cuda" else device


def evaluate(torch: Any, module: Any, inputs: dict[str, Any]) -> None:
  """One forward pass."""
  with torch.inference_mode():
    module(**inputs, return_dict=False)


def update(torch: Any, module: Any, inputs: dict[str, Any], optimizer: Any, steps: int) -> None:
  """`steps` forward and backward passes of a simple loss, and one step of the optimizer."""
  del torch
  for _ in range(steps):
    module(**inputs, return_dict=False)[0].float().square().mean().div(steps).backward()
  optimizer.step()
  optimizer.zero_grad()


def time_of(torch: Any, call: Callable[[], None], repeats: int) -> list[float]:
  """Seconds of each round after one that compiles."""
  seconds = []
  for _ in range(1 + repeats):
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - began)
  return seconds[1:]


def report(torch: Any, figure: str, seconds: list[float], **details: Any) -> None:
  """One JSON line."""
  peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
  line = {
    "figure": figure,
    "seconds": round(float(np.median(seconds)), 4),
    "seconds_min": round(min(seconds), 4),
    "seconds_max": round(max(seconds), 4),
    "peak_gib": peak and round(peak / accelerator.GIB, 2),
    **details,
    "versions": {"torch": torch.__version__},
  }
  print(json.dumps(line), flush=True)
