"""What an update costs beyond its gradients, and how fast the gradients are: python benchmarks/update.py

Prints one JSON line for each figure. Times that are compared were taken in turn in one run (A B A B).

step_over_bare      The jitted train step (C microbatches x W steps: gradients, their accumulation,
                    clipping, AdamW, EMA, metrics) over C W calls of the bare jitted
                    value_and_grad of a simple loss of the velocity, at the same microbatch.
branches            With --branches M, and nothing else then: the train step on B samples, M members of
                    each of B / M anchors, over that on B samples of trajectories; and what scoring
                    all members costs alone (log-probs and their gradients, no model), over the same.
forward_*, forward_backward_*
                    The model here over diffusers' SD3Transformer2DModel on torch, with the same
                    weights, inputs, loss and number of threads; gradients of all weights. *_plain
                    is the same model with plain jax.numpy layers that JAX differentiates itself, in
                    place of the islands of tpgrpo_jax/models/layers.py; island_over_plain compares
                    the two directly. Needs torch and diffusers (pip install -e '.[parity]');
                    without them only island_over_plain is measured.

The threads of torch's OpenMP spin when idle and would take the cores from XLA's, so OMP_WAIT_POLICY
is set to passive before torch is imported, unless the environment has set it.
"""

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from unittest import mock

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import timing

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models
from tpgrpo_jax.config import presets
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.models import hf, layers, lora, mmdit
from tpgrpo_jax.training import batches as batches_lib
from tpgrpo_jax.training import build, rollout, step
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib
from tpgrpo_jax.training import state as state_lib

# 64 image tokens (16 x 16 in patches of 2), 16 text tokens, width 256: SD3's shape, made small.
SD3_SMALL = mmdit.MMDiTConfig(
  sample_size=16,
  patch_size=2,
  in_channels=16,
  num_layers=4,
  attention_head_dim=64,
  num_attention_heads=4,
  joint_attention_dim=256,
  caption_projection_dim=256,
  pooled_projection_dim=256,
  out_channels=16,
  pos_embed_max_size=8,
  qk_norm="rms_norm",
)


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=15, help="rounds of A B A B")
  parser.add_argument("--batch", type=int, default=64, help="microbatch of the tiny model")
  parser.add_argument("--sd3-batch", type=int, default=16, help="batch of the SD3-shaped model")
  parser.add_argument("--sd3-layers", type=int, default=4, help="blocks of the SD3-shaped model")
  parser.add_argument("--threads", type=int, default=2, help="CPU cores; 0 is all")
  parser.add_argument("--plain", action="store_true", help="also time plain jax.numpy layers")
  parser.add_argument("--branches", type=int, default=0, help="measure branches of M members alone")
  parser.add_argument("--no-torch", action="store_true", help="leave torch and diffusers out")
  args = parser.parse_args()
  threads = timing.limit_threads(args.threads)
  if args.branches:
    measure_branches(args.branches, args.batch, args.repeats, threads)
    return
  measure_step(args.batch, args.repeats, threads)

  torch = None if args.no_torch else import_torch(threads)
  small = dataclasses.replace(SD3_SMALL, num_layers=args.sd3_layers)
  for name, config, latent, tokens, batch in (
    ("tiny", hf.load_config(models.tiny.TEXT.folder), models.tiny.TEXT.latent_shape, 6, args.batch),
    ("sd3_shaped", small, (16, 16, 16), 16, args.sd3_batch),
  ):
    contest = Contest(name, config, latent, tokens, batch)
    measure_model(contest, torch, args.plain or torch is None, args.repeats, threads)


def measure_step(batch: int, repeats: int, threads: int) -> None:
  """Reports step_over_bare for the built-in model with T = 6, W = 5, two microbatches an update."""
  base, chunks = config_lib.Config(), 2
  config = dataclasses.replace(
    base,
    sampler=dataclasses.replace(base.sampler, num_steps=6, window=(0, 5)),
    train=dataclasses.replace(base.train, microbatch=batch, group_size=2, prompts_per_epoch=batch),
  )
  mesh = mesh_lib.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    model = build.build_model(config, mesh, ())
    method = method_lib.build_method(config, model)
    pieces = make_batch(config, model, method, mesh, chunks)
    window = method.window
    update = _update_thunk(config, model, method, pieces)
    weights = np.random.default_rng(0).normal(size=(batch, *model.pipeline.latent_shape))
    weights = jnp.asarray(weights, jnp.float32)

    @jax.jit
    def value_and_grad(trainable, x, sigma, condition):
      def loss(trainable):
        params = {"frozen": model.frozen, "trainable": trainable}
        return jnp.mean(weights * method.velocity_fn(params, x, sigma, condition))

      return jax.value_and_grad(loss)(trainable)

    first, condition = jax.tree.map(lambda a: a[0], (pieces.transitions, pieces.conditions))
    x = first.x[0]
    sigma = jnp.full(batch, 0.5)

    def bare():
      for _ in range(chunks * window):
        jax.block_until_ready(value_and_grad(model.trainable, x, sigma, condition))

    seconds = timing.interleave({"step": update, "bare": bare}, repeats=repeats)
  timing.report_ratio(
    "step_over_bare",
    seconds,
    of="step",
    over="bare",
    threads=threads,
    model="tiny",
    microbatch=batch,
    microbatches=chunks,
    window=window,
    parameters=count_parameters(model.trainable),
  )


def measure_branches(branches: int, batch: int, repeats: int, threads: int) -> None:
  """Reports branches_over_trajectories and scoring_over_trajectories: T = 6, W = 5, M x batch samples.

  Trajectories come in microbatches of `batch`, branches in one of `branches` x batch samples, which is
  `batch` anchors: the model sees batches of one size in both.
  """
  base, samples = config_lib.Config(), branches * batch
  plain = dataclasses.replace(
    base,
    sampler=dataclasses.replace(base.sampler, num_steps=6, window=(0, 5)),
    train=dataclasses.replace(
      base.train, microbatch=batch, group_size=branches, prompts_per_epoch=batch
    ),
    credit=dataclasses.replace(base.credit, method="flow_grpo"),
  )
  branched = presets.apply(
    plain,
    {
      "sampler.rollout": "branch",
      "sampler.branches": branches,
      "credit.method": "branch",
      "train.microbatch": samples,
    },
  )
  mesh = mesh_lib.make_mesh(base.mesh)
  thunks = {}
  with jax.set_mesh(mesh):
    model = build.build_model(plain, mesh, ())
    for name, config, chunks in (("trajectories", plain, branches), ("branches", branched, 1)):
      method = method_lib.build_method(config, model)
      pieces = make_batch(config, model, method, mesh, chunks)
      thunks[name] = _update_thunk(config, model, method, pieces)
    thunks["scoring"] = _scoring_thunk(method, jax.tree.map(lambda a: a[0], pieces.transitions))
    seconds = timing.interleave(thunks, repeats=repeats)
  for name in ("branches", "scoring"):
    timing.report_ratio(
      f"{name}_over_trajectories",
      seconds,
      of=name,
      over="trajectories",
      threads=threads,
      model="tiny",
      members=branches,
      anchors=batch,
      samples=samples,
      window=method.window,
    )


def _update_thunk(config, model, method, pieces):
  """One train step after the other."""
  train_step = step.make_train_step(config, method)
  create = functools.partial(state_lib.init_state, optimizer=method.optimizer)
  state = [jax.jit(create)(model.trainable)]  # donated to each call, so each call replaces it

  def update():
    state[0], metrics = train_step(state[0], model.frozen, {}, pieces)
    return state[0], metrics

  return update


def _scoring_thunk(method, transitions):
  """Log-probs of all members at all steps, and the gradients of their sum."""

  @jax.jit
  def scored(x, x_next, velocity, sigma, sigma_next):
    at = lambda v: sampler.score_all(
      method.step_fn, method.log_prob_fn, x, x_next, v, sigma, sigma_next
    ).sum()
    return jax.value_and_grad(at)(velocity)

  names = ("x", "x_next", "velocity", "sigma", "sigma_next")
  return functools.partial(scored, *(getattr(transitions, name) for name in names))


def make_batch(config, model, method, mesh, chunks: int) -> batches_lib.Batch:
  """What one update learns from: real samples with random advantages."""
  batch = config.train.microbatch
  states = batch // method.members
  sample = rollout.make_rollout_fn(config, model, method)
  params = model.params(model.trainable)
  condition = method_lib.build_condition(config, model, [f"W{i % 1000:03d}" for i in range(states)])
  condition = jax.device_put(condition, mesh_lib.batch_sharding(mesh))
  group = np.stack([np.arange(states), np.zeros(states)], axis=1).astype(np.int32)
  group = jax.device_put(group, mesh_lib.batch_sharding(mesh))
  key, place = rollout.epoch_key(0, 0), np.arange(*config.sampler.window, dtype=np.int32)
  plan = method_lib.build_plan(config, method, place)
  pieces = [sample(params, key, i, group, condition, place, plan)[0] for i in range(chunks)]
  advantage = np.random.default_rng(0).normal(size=(chunks, method.window, batch))
  whole = batches_lib.Batch(
    pieces,
    [condition] * chunks,
    advantage.astype(np.float32),
    np.ones((chunks, method.window, batch), np.float32),
  )
  return batches_lib.stacked(config, whole)


@dataclasses.dataclass(frozen=True)
class Contest:
  """One model and the inputs that all of its implementations get.

  Attributes:
    name: in the figures.
    config: sizes.
    latent: (h, w, c).
    tokens: of text.
    batch: samples.
  """

  name: str
  config: mmdit.MMDiTConfig
  latent: tuple[int, int, int]
  tokens: int
  batch: int

  def weights(self):
    """All weights and buffers, random where the initialisation has zeros too."""
    create = models.build_transformer(self.config)
    _, trainable, buffers = lora.split_trainable(create(jax.random.key(0)), rank=0)
    rng = np.random.default_rng(0)
    noisy = lambda p: np.asarray(p) + 0.02 * rng.normal(size=p.shape).astype(np.float32)
    return jax.tree.map(noisy, trainable), jax.device_get(buffers)

  def inputs(self):
    """(x, sigma, text, pooled, and what the velocity is multiplied with in the loss)."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, readout = normal(self.batch, *self.latent), normal(self.batch, *self.latent)
    text = normal(self.batch, self.tokens, self.config.joint_attention_dim)
    pooled = normal(self.batch, self.config.pooled_projection_dim)
    sigma = rng.uniform(0.1, 0.9, self.batch).astype(np.float32)
    return x, sigma, text, pooled, readout


def measure_model(contest: Contest, torch, plain: bool, repeats: int, threads: int) -> None:
  """Reports forward, and forward and backward, of all implementations of one model."""
  trainable, buffers = contest.weights()
  inputs = contest.inputs()
  pairs = {"island": jax_functions(contest, trainable, buffers, inputs)}
  if plain:
    with plain_layers():
      pairs["plain"] = jax_functions(contest, trainable, buffers, inputs)
  if torch is not None:
    pairs["torch"] = torch_functions(torch, contest, (buffers, trainable), inputs)
  outputs = {name: np.asarray(pair[0]()) for name, pair in pairs.items()}
  norms = {name: gradient_norm(pair[1]()[1]) for name, pair in pairs.items()}
  details = dict(
    gradient_norms=norms,
    model=contest.name,
    batch=contest.batch,
    parameters=count_parameters(trainable),
    threads=threads,
  )
  if torch is not None:
    details |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
  for index, phase in enumerate(("forward", "forward_backward")):
    functions = {name: pair[index] for name, pair in pairs.items()}
    seconds = timing.interleave(functions, repeats=repeats)
    for of, over in (("island", "torch"), ("plain", "torch"), ("island", "plain")):
      if of in seconds and over in seconds:
        difference = np.abs(outputs[of] - outputs[over]).max() / np.abs(outputs[over]).max()
        figure = f"{phase}_{of}_over_{over}"
        timing.report_ratio(
          figure, seconds, of=of, over=over, relative_difference=float(difference), **details
        )


def jax_functions(contest: Contest, trainable, buffers, inputs):
  """(forward, forward and backward), compiled here and now."""
  x, sigma, text, pooled, readout = map(jnp.asarray, inputs)
  create = models.build_transformer(contest.config)
  graphdef = nnx.split(nnx.eval_shape(lambda: create(jax.random.key(0))))[0]

  def velocity(trainable, buffers):
    return nnx.merge(graphdef, lora.merge_trees(buffers, trainable))(x, sigma, text, pooled)

  def loss(trainable, buffers):
    return jnp.mean(readout * velocity(trainable, buffers))

  arguments = jax.device_put((trainable, buffers))
  compile_ = lambda f: functools.partial(jax.jit(f).lower(*arguments).compile(), *arguments)
  return compile_(velocity), compile_(jax.value_and_grad(loss))


@contextlib.contextmanager
def plain_layers():
  """Puts plain jax.numpy formulas, which JAX differentiates itself, in place of the islands."""

  def norm(x):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + layers.EPS)

  def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + layers.EPS) * scale

  def attention(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)

  with mock.patch.multiple(
    layers,
    fence=lambda tree: tree,
    linear=lambda x, kernel, bias: x @ kernel + bias,
    modulate=lambda x, shift, scale: norm(x) * (1 + scale[:, None]) + shift[:, None],
    make_rms_norm=lambda eps: rms_norm,
    gelu_tanh=lambda x: jax.nn.gelu(x, approximate=True),
    silu=jax.nn.silu,
    gated_residual=lambda x, gate, y: x + gate[:, None] * y,
    attention=attention,
  ):
    yield


def import_torch(threads: int):
  """Torch with as many threads, or None with a message when it or diffusers is not installed."""
  try:
    import diffusers  # noqa: F401
    import torch
  except ImportError as error:
    print(f"torch is left out: {error}. pip install -e '.[parity]'", flush=True)
    return None
  torch.set_num_threads(threads)
  return torch


def torch_functions(torch, contest: Contest, weights, inputs):
  """(forward, forward and backward) of diffusers' model with these weights."""
  import diffusers

  with tempfile.TemporaryDirectory() as folder:
    hf.save_transformer(folder, contest.config, lora.merge_trees(*weights))
    model = diffusers.SD3Transformer2DModel.from_pretrained(folder)
  x, sigma, text, pooled, readout = (torch.from_numpy(a) for a in inputs)
  x, readout = (a.permute(0, 3, 1, 2).contiguous() for a in (x, readout))

  def velocity():
    return model(x, text, pooled, 1000 * sigma, return_dict=False)[0]

  def forward():
    with torch.no_grad():
      return velocity().permute(0, 2, 3, 1)

  def forward_backward():
    model.zero_grad(set_to_none=True)
    loss = (readout * velocity()).mean()
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]

  return forward, forward_backward


def gradient_norm(gradients) -> float:
  """The norm over all gradients: that it agrees says that the same work was done."""
  squares = [np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradients)]
  return round(float(np.sqrt(sum(squares))), 8)


def count_parameters(tree) -> int:
  """How many numbers a tree of weights holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
  main()
