"""Floating-point operations of a program, counted in its jaxpr: bodies of loops as often as they run.

XLA's own cost analysis counts the body of a loop once, so a model with scanned blocks looks as cheap as
one block.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Primitives that hide their work from the jaxpr, by parts of their names.
_OPAQUE = ("ffi_call", "custom_call", "callback", "dot_product_attention", "triton")


@dataclasses.dataclass(frozen=True)
class Flops:
  """What `count` found.

  Attributes:
    matmul: operations of all matrix products, a multiply and an add being two.
    conv: operations of all convolutions.
    kernels: how often each Pallas kernel runs; its products are counted, with those of padded blocks.
    uncounted: how often each thing runs whose work is not known: custom calls, and loops that end by
      a condition, whose bodies are counted once.
  """

  matmul: float
  conv: float
  kernels: dict[str, int]
  uncounted: dict[str, int]

  @property
  def total(self) -> float:
    return self.matmul + self.conv


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Flops:
  """Counts the matrix products and convolutions of function(*args, **kwargs), and nothing else.

  All devices together; nothing is computed. What no output depends on is left out, as XLA does, but what
  is computed twice counts twice: a rematerialised block is three forward passes and one more for its
  gradient. Of the branches of a cond the dearest counts.

  Args:
    function: jitted or not.
    *args: arrays, or anything with shape and dtype.
    **kwargs: likewise.
  """
  closed = jax.make_jaxpr(_within_jit(function))(*args, **kwargs)
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  tally = collections.Counter()
  _walk(jaxpr, 1, tally)
  named = lambda kind: {name: n for (k, name), n in sorted(tally.items()) if k == kind}
  work = named("work")
  return Flops(work.get("matmul", 0), work.get("conv", 0), named("kernel"), named("uncounted"))


def _within_jit(function):
  """What a jitted function was made of: one with compiler options cannot be traced within another trace."""
  if isinstance(function, functools.partial):
    return functools.partial(_within_jit(function.func), *function.args, **function.keywords)
  return function.__wrapped__ if hasattr(function, "lower") else function


def _walk(jaxpr, times, tally):
  """Adds `times` runs of the jaxpr to the tally."""
  for eqn in jaxpr.eqns:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
      tally["work", "matmul"] += times * _dot_general(eqn)
    elif name == "conv_general_dilated":
      tally["work", "conv"] += times * _convolution(eqn)
    elif name == "cond":
      tally.update(max((_branch(b, times) for b in params["branches"]), key=_work))
    elif any(part in name for part in _OPAQUE):
      tally["uncounted", name] += times
    else:
      runs = times * _runs(eqn)
      if name == "while":
        tally["uncounted", name] += times
      if name == "pallas_call":
        tally["kernel", params["name"] or name] += times
      for inner in core.jaxprs_in_params(params):
        _walk(inner, runs, tally)


def _runs(eqn):
  """How often an equation runs the jaxprs in it, on all devices."""
  if eqn.primitive.name == "scan":
    return eqn.params["length"]
  if eqn.primitive.name == "shard_map":
    # One within another divides only the axes that are left. (Versions of JAX name them differently.)
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params[name])
  if eqn.primitive.name == "pallas_call":
    return math.prod(eqn.params["grid_mapping"].grid)
  return 1


def _branch(closed, times):
  tally = collections.Counter()
  _walk(closed.jaxpr, times, tally)
  return tally


def _work(tally):
  return tally["work", "matmul"] + tally["work", "conv"]


def _dot_general(eqn):
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _convolution(eqn):
  """Padding counts as work; zeros that lhs_dilation puts between the inputs do not."""
  kernel = eqn.invars[1].aval.shape
  out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
  taps = math.prod(kernel) // out_features
  return 2 * math.prod(eqn.outvars[0].aval.shape) * taps / math.prod(eqn.params["lhs_dilation"])
