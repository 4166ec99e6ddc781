"""The count of an ONNX model's operations equals closed forms."""

import numpy as np
import pytest

from tpgrpo_jax.cost import onnx_flops

pytest.importorskip("onnxruntime")


def varint(number):
  """A protobuf number: seven bits a byte, the lowest first."""
  low, more = number % 128, number // 128
  return bytes([low | 128]) + varint(more) if more else bytes([low])


def field(number, *values):
  """A field of a protobuf message: texts, bytes or numbers."""
  encoded = b""
  for value in values:
    if isinstance(value, int):
      encoded += varint(number << 3) + varint(value)
    else:
      content = value.encode() if isinstance(value, str) else value
      encoded += varint(number << 3 | 2) + varint(len(content)) + content
  return encoded


def weight(name, *shape):
  """A TensorProto of float32 zeros."""
  return field(1, *shape) + field(2, 1) + field(8, name) + field(9, bytes(4 * int(np.prod(shape))))


def value(name, *shape):
  """A ValueInfoProto of float32."""
  sizes = b"".join(field(1, field(1, size)) for size in shape)
  return field(1, name) + field(2, field(1, field(1, 1) + field(2, sizes)))


def node(op, inputs, output, *attributes):
  """A NodeProto; attributes are (name, integers)."""
  given = (field(1, name) + field(8, *ints) + field(20, 7) for name, ints in attributes)
  return field(1, *inputs) + field(2, output) + field(4, op) + b"".join(field(5, a) for a in given)


@pytest.fixture
def write_model(tmp_path):
  """Writes a model of these nodes and weights; returns its path."""

  def write(shape, nodes, weights, out):
    graph = field(1, *nodes) + field(2, "g") + field(5, *weights)
    graph += field(11, value("x", *shape)) + field(12, value("y", *out))
    path = tmp_path / "model.onnx"
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(2, 13)))
    return path

  return write


def test_a_convolution_is_its_outputs_times_its_kernel(write_model):
  pads = ("pads", (1, 1, 1, 1))
  nodes = [node("Conv", ["x", "w"], "h", pads), node("Relu", ["h"], "y")]
  path = write_model((2, 3, 8, 10), nodes, [weight("w", 4, 3, 3, 3)], (2, 4, 8, 10))
  found = onnx_flops.count(path, np.zeros((2, 3, 8, 10), np.float32))
  assert found == 2 * (2 * 4 * 8 * 10) * (3 * 3 * 3)


def test_a_convolution_of_groups_has_the_channels_of_one(write_model):
  group = field(1, "group") + field(3, 4) + field(20, 2)
  nodes = [node("Conv", ["x", "w"], "y") + field(5, group)]
  path = write_model((1, 4, 6, 6), nodes, [weight("w", 4, 1, 3, 3)], (1, 4, 4, 4))
  found = onnx_flops.count(path, np.zeros((1, 4, 6, 6), np.float32))
  assert found == 2 * (4 * 4 * 4) * (3 * 3)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_is_two_operations_a_term(write_model, op):
  path = write_model((5, 6), [node(op, ["x", "w"], "y")], [weight("w", 6, 7)], (5, 7))
  assert onnx_flops.count(path, np.zeros((5, 6), np.float32)) == 2 * 5 * 6 * 7


def test_a_transposed_convolution_is_its_inputs_times_its_kernel(write_model):
  nodes = [node("ConvTranspose", ["x", "w"], "y", ("strides", (2, 2)))]
  path = write_model((1, 3, 4, 5), nodes, [weight("w", 3, 2, 2, 2)], (1, 2, 8, 10))
  found = onnx_flops.count(path, np.zeros((1, 3, 4, 5), np.float32))
  assert found == 2 * (3 * 4 * 5) * (2 * 2 * 2)
