"""The layers that the flow transformers are made of.

On CPU every operation here is an island: its output and its cotangent stand behind an
`optimization_barrier`, and its backward pass starts from its inputs alone. XLA otherwise fuses the
elementwise chains of whole blocks into the transposing copies before weight-gradient dots (half of
the backward pass of a plain JAX block on CPU), and computes a forward pass inside value_and_grad with
other roundings than alone. With islands the two are equal bit for bit, so the on-policy log-ratio is
exactly 0, and forward plus backward of the tiny model takes about two thirds of the time
(benchmarks/update.py --plain). On
accelerators the barriers vanish and XLA fuses as it likes.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tpgrpo_jax.models import splash

TIMESTEP_DIM = 256
EPS = 1e-6


class Latents(NamedTuple):
  """The latents that a transformer takes.

  Attributes:
    channels: of each.
    patch: of them along each side of a token.
    side: of the model's own size.
    largest: side that it has positions for; None for any.
  """

  channels: int
  patch: int
  side: int
  largest: int | None = None


def platform() -> str:
  """What is compiled for: the devices of the mesh that jax.set_mesh has set, else JAX's default.

  The mesh may consist of devices that are described only (jax.experimental.topologies): a program
  that is compiled for a TPU ahead of time, on a machine without one, is the TPU's own.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def fence(tree):
  """On CPU keeps XLA from fusing across this point; elsewhere the identity."""
  return jax.lax.optimization_barrier(tree) if platform() == "cpu" else tree


def lay_out(x: jax.Array, *, tensor: int | None = None) -> jax.Array:
  """On a mesh divides x [B, ...], and its cotangent, along B over all axes but "tensor".

  Every activation of a model is given its layout. Left to choose, the partitioner orders the mesh
  axes of some batch dimensions otherwise than of others, and on meshes with data, fsdp and tensor
  axes XLA then adds rows of different samples (tests/training/test_mesh.py guards it).

  Args:
    x: leading axis B.
    tensor: the dimension that the "tensor" axis divides, where it can: heads, hidden units.
  """
  spec = _layout(x, tensor)
  return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def _layout(x, tensor):
  """The layout of `lay_out`; None without a mesh, or where x is what a single device has.

  Within a shard_map x is one part of the batch already, and only the other axes divide it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = {name: n for name, n in mesh.shape.items() if name not in mesh.manual_axes}
  if math.prod(axes.values()) <= 1:
    return None
  spec: list[Any] = [tuple(name for name in axes if name != "tensor")]
  spec += [None] * (x.ndim - 1)
  if tensor is not None and "tensor" in axes and x.shape[tensor] % axes["tensor"] == 0:
    spec[tensor] = "tensor"
  return P(*spec)


def per_sample(rows: jax.Array, x: jax.Array) -> jax.Array:
  """What neighbours share, [R, ...], for each of the samples x [B, ...]; R divides B."""
  count = len(x) // len(rows)
  return rows if count == 1 else jnp.repeat(rows, count, axis=0)


def island(forward, backward):
  """A function with a hand-written backward pass that keeps its inputs and nothing else.

  Args:
    forward: arrays -> array.
    backward: (inputs, cotangent) -> cotangents of the inputs.
  """
  wrapped = jax.custom_vjp(lambda *inputs: fence(forward(*inputs)))
  wrapped.defvjp(lambda *inputs: (wrapped(*inputs), inputs), lambda r, d: backward(r, fence(d)))
  return wrapped


def _linear(x, kernel, bias):
  return (x.reshape(-1, x.shape[-1]) @ kernel + bias).reshape(*x.shape[:-1], -1)


def _linear_backward(inputs, dy):
  x, kernel, bias = inputs
  x2, dy2 = x.reshape(-1, x.shape[-1]), fence(dy.reshape(-1, dy.shape[-1]))
  dbias = jnp.sum(dy2, axis=0, dtype=jnp.float32).astype(bias.dtype)
  return (dy2 @ kernel.T).reshape(x.shape), x2.T @ dy2, dbias


linear = island(_linear, _linear_backward)
"""x [..., D] @ kernel [D, F] + bias [F]."""


def _product(x, kernel):
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def _product_backward(inputs, dy):
  x, kernel = inputs
  x2, dy2 = x.reshape(-1, x.shape[-1]), fence(dy.reshape(-1, dy.shape[-1]))
  return (dy2 @ kernel.T).reshape(x.shape), x2.T @ dy2


product = island(_product, _product_backward)
"""x [..., D] @ kernel [D, F]."""


def _standardize(x):
  """((x - mean) / std, 1 / std) over the last axis, in float32."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPS)
  return y * inverse, inverse


def _modulate(x, shift, scale):
  y = _standardize(x)[0] * (1 + scale[:, None].astype(jnp.float32)) + shift[:, None]
  return y.astype(x.dtype)


def _modulate_backward(inputs, dy):
  x, shift, scale = inputs
  y, inverse = _standardize(x)
  dy = dy.astype(jnp.float32)
  g = dy * (1 + scale[:, None].astype(jnp.float32))
  mean = lambda a: jnp.mean(a, axis=-1, keepdims=True)
  dx = inverse * (g - mean(g) - y * mean(g * y))
  dshift, dscale = jnp.sum(dy, axis=1), jnp.sum(dy * y, axis=1)
  return dx.astype(x.dtype), dshift.astype(shift.dtype), dscale.astype(scale.dtype)


modulate = island(_modulate, _modulate_backward)
"""layer_norm(x) (1 + scale) + shift; x [B, N, D], shift and scale [B, D]; the norm is in float32."""


@functools.cache
def make_rms_norm(eps: float):
  """Returns (x [..., D], scale [D] float32) -> x / rms(x) * scale over the last axis, in float32."""
  inverse_rms = lambda y: jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)

  def forward(x, scale):
    y = x.astype(jnp.float32)
    return (y * inverse_rms(y) * scale).astype(x.dtype)

  def backward(inputs, dy):
    x, scale = inputs
    y, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    inverse = inverse_rms(y)
    y, g = y * inverse, dy * scale
    dx = inverse * (g - y * jnp.mean(g * y, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * y, axis=tuple(range(x.ndim - 1)))

  return island(forward, backward)


_GELU_A, _GELU_B = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(x):
  return 0.5 * x * (1 + jnp.tanh(_GELU_A * (x + _GELU_B * x * x * x)))


def _gelu_tanh_backward(inputs, dy):
  (x,) = inputs
  t = jnp.tanh(_GELU_A * (x + _GELU_B * x * x * x))
  slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_GELU_A * (1 + 3 * _GELU_B * x * x))
  return (dy * slope,)


gelu_tanh = island(_gelu_tanh, _gelu_tanh_backward)
"""GELU with the tanh approximation, as diffusers' "gelu-approximate"."""


def _silu_backward(inputs, dy):
  (x,) = inputs
  s = jax.nn.sigmoid(x)
  return (dy * (s * (1 + x * (1 - s))),)


silu = island(lambda x: x * jax.nn.sigmoid(x), _silu_backward)
"""x sigmoid(x)."""


def _swiglu_backward(inputs, dy):
  gate, value = inputs
  s = jax.nn.sigmoid(gate)
  return dy * value * (s * (1 + gate * (1 - s))), dy * (gate * s)


swiglu = island(lambda gate, value: gate * jax.nn.sigmoid(gate) * value, _swiglu_backward)
"""silu(gate) value (arXiv 2002.05202)."""


def _gated_backward(inputs, dy):
  x, gate, y = inputs
  dgate = jnp.sum(dy * y, axis=1, dtype=jnp.float32).astype(gate.dtype)
  return dy.astype(x.dtype), dgate, dy * gate[:, None]


gated_residual = island(lambda x, gate, y: x + gate[:, None] * y, _gated_backward)
"""x + gate y; x and y [B, N, D], gate [B, D]."""


def _scaled_backward(inputs, dy):
  x, scale = inputs
  dscale = jnp.sum(dy * x, axis=1, dtype=jnp.float32).astype(scale.dtype)
  return dy * (1 + scale[:, None]), dscale


scaled = island(lambda x, scale: x * (1 + scale[:, None]), _scaled_backward)
"""x (1 + scale); x [B, N, D], scale [B, D]."""

tanh = island(jnp.tanh, lambda inputs, dy: (dy * (1 - jnp.tanh(inputs[0]) ** 2),))


PRODUCT = "product"
"""Name of what matrix products give, for rematerialisation that keeps them."""


def kept(x: jax.Array) -> jax.Array:
  """x under the name PRODUCT. jax.checkpoint sees no product in an island, but names outside it."""
  return ad_checkpoint.checkpoint_name(x, PRODUCT)


def attention(
  q: jax.Array, k: jax.Array, v: jax.Array, *, length: jax.Array | None = None
) -> jax.Array:
  """Softmax attention over all tokens, or the first `length` [B] of each sample's.

  | platform | dtype    | implementation                    |
  | -------- | -------- | --------------------------------- |
  | cpu      | any      | an island                         |
  | gpu      | bfloat16 | cuDNN's flash attention           |
  | tpu      | any      | Pallas' splash attention          |
  | else     |          | XLA's own, with a table of logits |

  The same in rollout and update, as it depends on platform and dtype alone. q, k, v and the result are
  [B, N, heads, head_dim].
  """
  return kept(_attend(q, k, v, length))


def _attend(q, k, v, length):
  device = platform()
  if device == "cpu":
    return _cpu_attention(q, k, v, length)
  if device == "tpu":
    return splash.attention(q, k, v, spec=_layout(q, 2), length=length)
  cudnn = device == "gpu" and q.dtype == jnp.bfloat16
  kernel = "cudnn" if cudnn else "xla"
  return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation=kernel)


@jax.custom_vjp
def _cpu_attention(q, k, v, length):
  return _attention_forward(q, k, v, length)[0]


def _attention_forward(q, k, v, length):
  q, k, v = fence([a.swapaxes(1, 2) for a in (q, k, v)])
  logits = jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
  if length is not None:
    is_seen = jnp.arange(k.shape[2]) < length[:, None]
    logits = jnp.where(is_seen[:, None, None], logits, -jnp.inf)
  p = fence(jax.nn.softmax(logits.astype(jnp.float32)).astype(q.dtype))
  return fence(jnp.einsum("bhqk,bhkd->bhqd", p, v).swapaxes(1, 2)), (q, k, v, p)


def _attention_backward(residuals, dy):
  q, k, v, p = residuals
  dy = fence(dy.swapaxes(1, 2))
  dv = jnp.einsum("bhqk,bhqd->bhkd", p, dy)
  dp = jnp.einsum("bhqd,bhkd->bhqk", dy, v)
  ds = fence(p * (dp - jnp.sum(dp * p, axis=-1, keepdims=True)) * q.shape[-1] ** -0.5)
  dq, dk = jnp.einsum("bhqk,bhkd->bhqd", ds, k), jnp.einsum("bhqk,bhqd->bhkd", ds, q)
  return *(a.swapaxes(1, 2) for a in (dq, dk, dv)), None


_cpu_attention.defvjp(_attention_forward, _attention_backward)


def timestep_embedding(sigma: jax.Array, dim: int = TIMESTEP_DIM) -> jax.Array:
  """[cos | sin] of 1000 sigma at geometric frequencies, as diffusers' Timesteps; [B] -> [B, dim]."""
  half = dim // 2
  frequency = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
  angle = 1000.0 * sigma.astype(jnp.float32)[:, None] * frequency
  return fence(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1))


class Buffer(nnx.Variable):
  """A tensor that belongs to the model and is never trained (the position table)."""


class Linear(nnx.Module):
  """y = x kernel + bias, on the last axis; `bias` is None where there is none."""

  def __init__(
    self,
    d_in,
    d_out,
    *,
    dtype,
    rngs,
    use_bias=True,
    kernel_init=nnx.initializers.xavier_uniform(),
  ):
    self.dtype = dtype
    self.kernel = nnx.Param(kernel_init(rngs.params(), (d_in, d_out), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32)) if use_bias else None

  def __call__(self, x):
    return kept(self._apply(x))

  def _apply(self, x):
    cast = lambda a: a.astype(self.dtype)
    if self.bias is None:
      return product(cast(x), cast(self.kernel[...]))
    return linear(cast(x), cast(self.kernel[...]), cast(self.bias[...]))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis."""

  def __init__(self, dim, *, rngs, eps=EPS):
    del rngs
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

  def __call__(self, x):
    return make_rms_norm(self.eps)(x, self.scale[...])


class MLP(nnx.Module):
  """Two Linears with an activation between them."""

  def __init__(self, d_in, d_hidden, d_out, *, activation, dtype, rngs, use_bias=True):
    self.activation = activation
    self.linear_1 = Linear(d_in, d_hidden, dtype=dtype, rngs=rngs, use_bias=use_bias)
    self.linear_2 = Linear(d_hidden, d_out, dtype=dtype, rngs=rngs, use_bias=use_bias)

  def __call__(self, x):
    hidden = lay_out(self.activation(self.linear_1(x)), tensor=x.ndim - 1)
    return lay_out(self.linear_2(hidden))
