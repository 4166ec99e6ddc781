"""Credit that is learned: python benchmarks/learned_credit.py [--run RUN_DIR]

A small head reads what a trajectory's own evaluations have made: the one-step images x - sigma v of its
states, their noise levels, the prompt, and the reward of the finished image. It is trained on the completion
rewards (0..1) of the few states that an epoch completes (--share of them, drawn at random), over --epochs
epochs, with the consistency of neighbouring states (after arXiv 2506.09096) as regulariser. It then stands
for the completion rewards of new samples, beside those few that are known there too:

head          the head alone, the known states with their true rewards
corrected     head + (exact - head) / share on the known states: its expectation is the exact reward

with the figures of benchmarks/fidelity.py, and 2-step completions of the same samples to compare with.
"""

import argparse
import json

import fidelity
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH, UPDATES, CONSISTENCY = 256, 3000, 0.1


class Head(nnx.Module):
  """Expected completion reward of a state, in 0..1, as a logit."""

  def __init__(self, channels, flat, width, *, rngs):
    conv = lambda i, o: nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs)
    self.first, self.second = conv(channels, width), conv(width, 2 * width)
    self.hidden = nnx.Linear(flat, 8 * width, rngs=rngs)
    self.out = nnx.Linear(8 * width, 1, rngs=rngs)

  def __call__(self, image, rest):
    """[B, h, w, c], [B, F] -> [B]."""
    y = nnx.gelu(self.second(nnx.gelu(self.first(image))))
    y = jnp.concatenate([y.reshape(len(y), -1), rest], axis=-1)
    return self.out(nnx.gelu(self.hidden(y)))[:, 0]


def main() -> None:
  """Parses and measures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  fidelity.add_arguments(parser)
  parser.add_argument("--epochs", type=int, default=24, help="that the head learns from")
  parser.add_argument("--held-out", type=int, default=4, help="epochs that it is measured on")
  parser.add_argument("--share", type=float, default=0.25, help="of the states that are completed")
  parser.add_argument("--seed", type=int, default=0, help="of the draws and of the head")
  args = parser.parse_args()
  session, params = fidelity.open_session(args)
  total = args.epochs + args.held_out
  keeping = {"loss.ratio": "normalized"}  # the rollout keeps velocities where the loss reads them
  exactly = fidelity.make_roll(session, params, fidelity.EXACT | keeping)
  cheaply = fidelity.make_roll(session, params, fidelity.EXACT | {"completion.steps": 2})
  data = []
  for epoch in range(total):
    data.append(examples(exactly, cheaply if epoch >= args.epochs else exactly, epoch))
    print(
      json.dumps({"epoch": epoch, "of": total, "reward": float(data[-1][2].mean())}), flush=True
    )
  learn, held_out = data[: args.epochs], data[args.epochs :]
  rng = np.random.default_rng(args.seed)
  head = fit(*join(learn), rng, args)
  image, rest, exact, cheap = join(held_out)
  window, batch = exact.shape[0] - 1, exact.shape[1]
  known = rng.random((window, batch)) < args.share
  guess = predict(head, image, rest).reshape(window, batch)
  found = {
    "2-step completions": cheap[:-1],
    "head, no state completed": guess,
    "head": np.where(known, exact[:-1], guess),
    "corrected": guess + known * (exact[:-1] - guess) / args.share,
  }
  for name, reward in found.items():
    full = np.concatenate([reward, exact[-1:]])
    parts = [
      fidelity.compare(exact[:, part], full[:, part], args.group)
      for part in np.array_split(np.arange(batch), args.held_out)
    ]
    row = {k: [float(np.mean(v)), float(np.std(v))] for k, v in fidelity.stack(parts).items()}
    print(json.dumps({"way": name, "share": args.share} | row), flush=True)


def examples(exactly, cheaply, epoch):
  """(one-step images [W, B, h, w, c], the rest [W, B, F], R [W+1, B] exact and cheap) of an epoch."""
  rolled, _ = exactly(epoch)
  exact = rolled.completion_reward[0]
  cheap = exact if cheaply is exactly else cheaply(epoch)[0].completion_reward[0]
  parts = [one_step(found) for found in rolled.transitions]
  image = np.concatenate(parts, axis=1)
  prompt = [np.asarray(c.pooled if c.pooled.size else c.text) for c in rolled.conditions]
  prompt = np.concatenate([p.reshape(len(p), -1) for p in prompt])
  prompt = prompt.repeat(image.shape[1] // len(prompt), axis=0)  # neighbours share a row
  sigma = np.asarray(rolled.transitions[0].sigma)[:, None, None]
  batch = exact.shape[1]
  rest = [
    np.broadcast_to(each, (len(sigma), batch, each.shape[-1]))
    for each in (sigma, sigma**2, prompt[None], exact[-1][None, :, None])
  ]
  return image, np.concatenate(rest, axis=-1), exact, cheap


def one_step(found):
  """x - sigma v, [W, S, h, w, c]."""
  sigma = found.sigma[:, None, None, None, None]
  return np.asarray(found.x - sigma * found.velocity, np.float32)


def join(epochs):
  """The samples of all epochs side by side."""
  return tuple(np.concatenate(each, axis=1) for each in zip(*epochs))


def fit(image, rest, exact, cheap, rng, args):
  """A head that has learned from `share` of the states."""
  del cheap
  known = rng.random(exact[:-1].shape) < args.share
  head = Head(image.shape[-1], flat_size(image, rest), 32, rngs=nnx.Rngs(args.seed))
  optimizer = nnx.Optimizer(
    head, optax.adamw(optax.cosine_decay_schedule(1e-3, UPDATES), weight_decay=1e-2), wrt=nnx.Param
  )

  def loss(head, here, after, reward, is_known):
    logit, following = head(*here), head(*after)
    fit = optax.sigmoid_binary_cross_entropy(logit, reward)
    score, target = jax.nn.sigmoid(logit), jax.nn.sigmoid(following)
    stop = jax.lax.stop_gradient
    pull = -0.5 * (jax.nn.log_sigmoid(logit) * stop(target) + stop(score) * jnp.log(target + 1e-6))
    return ((fit * is_known) / args.share + CONSISTENCY * pull).mean()

  @nnx.jit
  def update(head, optimizer, *batch):
    value, grads = nnx.value_and_grad(loss)(head, *batch)
    optimizer.update(head, grads)
    return value

  steps, samples = exact[:-1].shape
  for _ in range(UPDATES):
    k, b = rng.integers(steps, size=BATCH), rng.integers(samples, size=BATCH)
    n = np.minimum(k + 1, steps - 1)
    pair = (image[k, b], rest[k, b]), (image[n, b], rest[n, b])
    update(head, optimizer, *pair, exact[k, b], known[k, b])
  return head


def flat_size(image, rest):
  """Numbers that the head's first dense layer reads."""
  h, w = (-(-n // 4) for n in image.shape[2:4])
  return h * w * 64 + rest.shape[-1]


def predict(head, image, rest):
  """[W, B, ...] -> [W B] expected rewards."""
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  call = nnx.jit(lambda head, *x: jax.nn.sigmoid(head(*x)))
  parts = zip(np.array_split(flat(image), 8), np.array_split(flat(rest), 8))
  return np.concatenate([np.asarray(call(head, *part)) for part in parts])


if __name__ == "__main__":
  main()
