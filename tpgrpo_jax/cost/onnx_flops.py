"""Floating-point operations of a model in ONNX, counted from the shapes that one run of it has."""

import json
import math
import os
import tempfile

import numpy as np

# op -> (shape of the second input, shape of the output, shape of the first input) -> multiplications
_PRODUCTS = {
  "Conv": lambda kernel, out, _: math.prod(out) * math.prod(kernel[1:]),
  "ConvTranspose": lambda kernel, _, x: math.prod(x) * math.prod(kernel[1:]),
  "MatMul": lambda _, out, x: math.prod(out) * x[-1],
  "Gemm": lambda b, out, x: math.isqrt(
    math.prod(x) * math.prod(b) * math.prod(out)
  ),  # either may be transposed
}


def count(path: str | os.PathLike, inputs: np.ndarray) -> float:
  """Counts the matrix products and convolutions of one run, a multiply and an add being two.

  Args:
    path: of the model, which has one input.
    inputs: what it is run on.

  Raises:
    ImportError: onnxruntime is not installed.
  """
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 4
  options.intra_op_num_threads = options.inter_op_num_threads = 1
  options.enable_profiling = True
  # As the file has it: what is fused has other names and layouts.
  options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
  options.add_session_config_entry(
    "session.disable_prepacking", "1"
  )  # else weights have no shape there
  with tempfile.TemporaryDirectory() as folder:
    options.profile_file_prefix = os.path.join(folder, "profile")
    session = onnxruntime.InferenceSession(
      str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {session.get_inputs()[0].name: inputs})
    with open(session.end_profiling()) as file:
      events = json.load(file)
  return float(sum(2 * _products(event.get("args", {})) for event in events))


def _products(node):
  """Multiplications of one event of the profile; 0 of other ops, and of events that are no op's run."""
  if node.get("op_name") not in _PRODUCTS or "output_type_shape" not in node:
    return 0
  x, other, *_ = (_shape(given) for given in node["input_type_shape"])
  return _PRODUCTS[node["op_name"]](other, _shape(node["output_type_shape"][0]), x)


def _shape(typed):
  """[2, 3] of {"float": [2, 3]}."""
  return next(iter(typed.values()))
