"""Flow-matching pretraining of the built-in models on pictures that are drawn as it goes."""

from collections.abc import Callable
import functools
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import tqdm

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, rewards, types
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.data import shapes, words
from tpgrpo_jax.models import hf, lora, tiny
from tpgrpo_jax.training import build, evaluation, pipeline
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import state as state_lib


class Lessons(NamedTuple):
  """What a built-in model is pretrained on.

  Attributes:
    prompts: name of the prompts whose test split evaluates it.
    draw: (rng, N) -> (texts [N], pixels uint8 [N, H, W, c]) of the train split.
  """

  prompts: str
  draw: Callable[[np.random.Generator, int], tuple[list[str], np.ndarray]]


def draw_words(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
  """Training words and their pictures, uint8 [N, H, W, 1]."""
  height, width, _ = tiny.BUILT_IN["tiny"].latent_shape
  drawn = words.sample_words(rng, count)
  return drawn, words.render(drawn, rng, height=height, width=width)[..., None]


def draw_shapes(rng: np.random.Generator, count: int) -> tuple[list[str], np.ndarray]:
  """Training prompts for shapes and scenes of them, uint8 [N, H, W, 3]."""
  drawn, scenes = shapes.draw_scenes(rng, count)
  return [row["prompt"] for row in drawn], shapes.render(scenes)


# model.variant -> its lessons.
LESSONS = {"tiny": Lessons("words", draw_words), "tiny_shapes": Lessons("shapes", draw_shapes)}


def flow_matching_loss(
  velocity_fn: types.VelocityFn,
  params: Any,
  key: jax.Array,
  data: jax.Array,
  condition: types.Condition,
  *,
  logit_mean: float = 0.0,
) -> jax.Array:
  """mean (v(x, sigma) - (noise - data))^2 at x = (1 - sigma) data + sigma noise.

  sigma is logit-normal(logit_mean, 1), as SD3 was trained (arXiv 2403.03206).

  Args:
    velocity_fn: the model.
    params: its weights.
    key: for sigma and noise.
    data: [B, h, w, c].
    condition: leading axis B.
    logit_mean: more than 0 trains high noise levels more.
  """
  sigma_key, noise_key = jax.random.split(key)
  sigma = jax.nn.sigmoid(logit_mean + jax.random.normal(sigma_key, data.shape[:1]))
  noise = jax.random.normal(noise_key, data.shape)
  s = sigma.reshape(-1, *(1,) * (data.ndim - 1))
  velocity = velocity_fn(params, (1 - s) * data + s * noise, sigma, condition)
  return jnp.mean(jnp.square(velocity - (noise - data)))


def pretrain(config: config_lib.PretrainConfig) -> pathlib.Path:
  """Trains the variant from scratch and writes it to config.output in diffusers' layout.

  Rows {"update", "loss"} go to metrics.jsonl in the run folder. Every `eval.every` updates the EMA
  weights are scored on held-out prompts and written, so that a run that is cut leaves a model.

  Returns:
    The folder with the EMA weights.
  """
  mesh = mesh_lib.make_mesh(config.mesh)
  mesh_lib.check_divides("train.batch", config.train.batch, mesh)
  run_dir, output = pathlib.Path(config.run.dir), pathlib.Path(config.output)
  run_dir.mkdir(parents=True, exist_ok=True)
  optimizer = state_lib.make_optimizer(config.optimizer, total_updates=config.train.updates)
  sizes = tiny.BUILT_IN[config.model.variant].config
  model = models.build_transformer(
    sizes, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat
  )(jax.random.key(config.seed))
  graphdef, params, buffers = lora.split_trainable(model, rank=0)
  with jax.set_mesh(mesh):
    state = state_lib.init_state(params, optimizer)
    state = jax.device_put(state, mesh_lib.param_shardings(mesh, state))
    update = functools.partial(_update, models.make_velocity_fn(graphdef), optimizer, config)
    update = jax.jit(update, donate_argnums=0)
    rng = np.random.default_rng(config.seed)
    evaluate = _make_evaluate(config, graphdef, buffers, mesh)
    sharding = mesh_lib.batch_sharding(mesh)
    with open(run_dir / "metrics.jsonl", "w") as metrics:
      for step in tqdm.trange(1, config.train.updates + 1, desc="pretrain", mininterval=2):
        pixels, condition = batch(config, rng)
        data = jax.device_put((pixels, condition), sharding)
        key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
        state, loss = update(state, buffers, key, *data)
        if step % config.train.log_every == 0:
          metrics.write(json.dumps({"update": step, "loss": float(loss)}) + "\n")
          metrics.flush()
        if step % config.eval.every == 0 or step == config.train.updates:
          _save(output, sizes, lora.merge_trees(state.ema, buffers), config.train.output_dtype)
          result = evaluate(state.ema)
          metrics.write(json.dumps({"update": step, "kind": "eval", **result.row}) + "\n")
          sheet = evaluation.grid(result.images[:32], [p.text for p in result.prompts[:32]])
          Image.fromarray(sheet).save(run_dir / f"eval_{step:05d}.png")
          tqdm.tqdm.write(f"update {step}: {result.row}")
  return output


def _make_evaluate(config, graphdef, buffers, mesh):
  """The evaluation of a training run, on the base model."""
  run = config_lib.Config(model=config.model, eval=config.eval)
  velocity_fn = models.make_velocity_fn(graphdef)
  variant = config.model.variant
  sizes = tiny.BUILT_IN[variant].config
  around = pipeline.tiny_pipeline(variant, sizes)
  model = build.Model(sizes, velocity_fn, velocity_fn, buffers, {}, around)
  prompts = prompts_lib.load_prompts(LESSONS[variant].prompts, "", "test")
  prompts = [prompts[i] for i in range(min(config.eval.prompts, len(prompts)))]
  specs = {name: 1.0 for name in config.eval.rewards}
  reward_fn = rewards.make_rewards(specs, placement=mesh_lib.make_placement(mesh))
  evaluate = evaluation.make_evaluate(run, model, mesh, reward_fn, prompts)
  return lambda trainable: evaluate(model.params(trainable))


def batch(
  config: config_lib.PretrainConfig, rng: np.random.Generator
) -> tuple[np.ndarray, types.Condition]:
  """Draws lessons: (pixels uint8 [B, H, W, c], condition), a share of the texts dropped."""
  texts, pixels = LESSONS[config.model.variant].draw(rng, config.train.batch)
  dropped = rng.random(len(texts)) < config.train.text_dropout
  texts = ["" if drop else text for text, drop in zip(texts, dropped)]
  built_in = tiny.BUILT_IN[config.model.variant]
  return pixels, built_in.encode(built_in.config, texts)


def _update(velocity_fn, optimizer, config, state, buffers, key, pixels, condition):
  data = tiny.pixels_to_latents(pixels)

  def loss_fn(params):
    split = {"trainable": params, "frozen": buffers}
    mean = config.train.logit_mean
    return flow_matching_loss(velocity_fn, split, key, data, condition, logit_mean=mean)

  loss, grads = jax.value_and_grad(loss_fn)(state.trainable)
  return state_lib.apply_gradients(state, grads, optimizer, config.ema), loss


def _save(output, config, params, dtype):
  """Writes beside the target and swaps, so that a cut never leaves half a model."""
  params = jax.tree.map(lambda a: a.astype(dtype), params)
  beside = output.with_name(output.name + ".new")
  hf.save_transformer(beside, config, jax.device_get(params))
  shutil.rmtree(output, ignore_errors=True)
  beside.rename(output)
