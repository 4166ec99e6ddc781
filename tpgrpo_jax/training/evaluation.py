"""Evaluation on held-out prompts: sampling from fixed noise, scored by any rewards."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, rewards, types
from tpgrpo_jax.flow import sampler
from tpgrpo_jax.rewards import combine
from tpgrpo_jax.runs import metrics, preemption, processes
from tpgrpo_jax.training import build, progress
from tpgrpo_jax.training import mesh as mesh_lib
from tpgrpo_jax.training import method as method_lib

_LINE = 14  # pixels of a line of a caption
NOISE_SEED = 20260206  # of the fixed noise: the same images to compare in every run


class Evaluation(NamedTuple):
  """Scores and images of one evaluation.

  Attributes:
    row: metric name -> number.
    scores: label -> [N].
    images: uint8 [N, H, W, 3].
    prompts: [N].
    readings: label -> [N] texts that a reward has read in the images; empty where none reads, or several
      processes share the images.
  """

  row: dict[str, float]
  scores: dict[str, np.ndarray]
  images: np.ndarray
  prompts: list[types.Prompt]
  readings: Mapping[str, Sequence[str]] = {}


def make_sample_fn(
  config: config_lib.Config,
  model: build.Model,
  mesh: jax.sharding.Mesh,
  *,
  num_steps: int,
  kind: str = "ode",
) -> Callable[..., np.ndarray]:
  """Returns (params, prompts, seed, on_chunk, look) -> images uint8 [N, H, W, 3], by sampling in batches.

  Image i depends on the weights, prompt i, i and the seed alone. `look` is shown every batch before it is
  thrown away, as (latents [n, h, w, c], condition); the last one is filled up.

  Args:
    config: sampler.noise_level is that of every step, also of a run that has calibrated its own.
    model: to sample from.
    mesh: of the weights.
    num_steps: solver steps.
    kind: a name of SAMPLERS.
  """
  velocity_fn = method_lib.guide(config, model.velocity_fn)
  sigmas = method_lib.make_sigmas(config.sampler, model, num_steps)
  denoise = SAMPLERS[kind](config.sampler, sigmas)

  @jax.jit
  def sample(params, key, group, condition):
    x_init = sampler.initial_noise(key, model.pipeline.latent_shape, group, same_latent=False)
    x_init = jax.lax.with_sharding_constraint(x_init, jax.sharding.PartitionSpec(mesh_lib.BATCH))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.split(key)[1]))(group[:, 0])
    latents = denoise(keys, velocity_fn, params, x_init, condition)
    is_finite = jnp.isfinite(latents).all(axis=tuple(range(1, latents.ndim)))
    images = models.images_uint8(model.pipeline.decode(params["decoder"], latents))
    return images, latents, is_finite

  def run(
    params: Any,
    prompts: Sequence[types.Prompt],
    seed: int = NOISE_SEED,
    on_chunk: preemption.OnChunk = preemption.go_on,
    look: Callable[[jax.Array, types.Condition], Any] = lambda latents, condition: None,
  ) -> np.ndarray:
    shards = mesh_lib.batch_shards(mesh)
    size = -(-min(config.eval.batch, len(prompts)) // shards) * shards
    images = []
    with progress.Bar("pictures", len(prompts), "pictures") as bar:
      for first in range(0, len(prompts), size):
        on_chunk(None)
        index = np.arange(first, first + size, dtype=np.int32)
        # The last batch is filled up with its own last prompt, so that one program serves all.
        asked = [prompts[min(int(i), len(prompts) - 1)] for i in index]
        group = np.stack([index, np.zeros_like(index)], axis=1)
        placed = (group, method_lib.build_condition(config, model, asked))
        placed = processes.put_batch(mesh, placed)
        with progress.first("the evaluation", sample):
          painted, latents, is_finite = sample(params, jax.random.key(seed), *placed)
        _check_finite(processes.fetch(is_finite), types.texts_of(asked))
        look(latents, method_lib.positive(placed[1]))
        images.append(processes.fetch(painted))
        bar.advance(min(size, len(prompts) - first))
    return np.concatenate(images)[: len(prompts)]

  return run


def _check_finite(is_finite, texts):
  if not is_finite.all():
    raise ValueError(
      f"the prompt {texts[int(np.argmin(is_finite))]!r}: its latents are not finite, so there is no "
      "picture. Look at the weights, sampler.guidance_scale and model.dtype."
    )


def _ode(settings, sigmas):
  del settings
  return lambda keys, *inputs: sampler.sample_ode(*inputs, sigmas=sigmas)


def _stochastic(settings, sigmas):
  step_fn, _ = method_lib.bind_dynamics(settings, sigmas)
  return lambda keys, velocity_fn, *inputs: sampler.sample_stochastic(
    velocity_fn, step_fn, keys, *inputs, sigmas=sigmas
  )


SAMPLERS = {"ode": _ode, "stochastic": _stochastic}
"""Name -> (sampler settings, sigmas) -> (keys [B], velocity_fn, params, x_init, condition) -> latents."""


def make_evaluate(
  config: config_lib.Config,
  model: build.Model,
  mesh: jax.sharding.Mesh,
  reward_fn: rewards.CombinedRewardFn,
  prompts: Sequence[types.Prompt],
  seed: int = NOISE_SEED,
) -> Callable[..., Evaluation]:
  """Returns (params, on_chunk) -> Evaluation on these prompts, by the ODE from the noise of `seed`."""
  sample = make_sample_fn(config, model, mesh, num_steps=config.eval.num_steps)
  sample = functools.partial(sample, seed=seed)
  weights = combine.weights_of(config.rewards)
  return functools.partial(
    _evaluate, sample, reward_fn, weights, list(prompts), model.pipeline.show
  )


def _evaluate(sample, reward_fn, weights, prompts, show, params, on_chunk=preemption.go_on):
  watched = Watched(reward_fn)
  images = sample(params, prompts, on_chunk=on_chunk, look=watched.look)
  scores, infos = score(reward_fn, images, show(prompts), on_chunk, watched.scores(len(images)))
  # A reward that is only evaluated counts as it is.
  total = sum(weights.get(label, 1.0) * float(each.mean()) for label, each in scores.items())
  each = sum(weights.get(label, 1.0) * values for label, values in scores.items())
  row = {"reward/mean": total, "reward/std": float(np.std(each))}
  for label, values in scores.items():
    row |= {
      f"reward/{label}/mean": float(values.mean()),
      f"reward/{label}/std": float(values.std()),
    }
    if len(values) > 1:
      row[f"reward/{label}/standard_error"] = float(values.std(ddof=1) / np.sqrt(len(values)))
    exact = infos[label].get("exact")
    if exact is not None:
      row[f"reward/{label}/exact"] = float(np.mean(exact))
  row |= metrics.image_statistics(metrics.statistics_of_each(images))
  texts = {label: [*map(str, info["text"])] for label, info in infos.items() if "text" in info}
  readings = {label: each for label, each in texts.items() if len(each) == len(images)}
  return Evaluation(row, scores, images, prompts, readings)


class Watched:
  """What rewards of latents say of finished latents, batch after batch."""

  def __init__(self, reward_fn: rewards.CombinedRewardFn):
    """Of the rewards that `reward_fn` is made of; those of pictures are left out."""
    self._look: Any = getattr(reward_fn, "look", lambda samples, condition: {})
    self._found: list[dict[str, np.ndarray]] = []

  def look(self, latents: jax.Array, condition: types.Condition) -> None:
    """Scores a batch [n, h, w, c] of them."""
    scores = self._look(types.Samples(latents[:, None], jnp.zeros(1)), condition)
    self._found.append({label: processes.fetch(each) for label, each in scores.items()})

  def scores(self, count: int) -> dict[str, np.ndarray]:
    """label -> scores [count] of the first ones; {} where no reward takes latents."""
    labels = self._found[0] if self._found else {}
    return {k: np.concatenate([each[k] for each in self._found])[:count] for k in labels}


def check_model(
  reward_fn: rewards.CombinedRewardFn, model: build.Model, prompt: types.Prompt
) -> None:
  """Raises ValueError where a reward of latents cannot judge the model's.

  Args:
    reward_fn: the rewards.
    model: with its pipeline.
    prompt: any that the pipeline knows.
  """
  shape, condition = model.pipeline.latent_shape, model.pipeline.condition([prompt])
  reward_fn.check_model(shape, condition)  # pyright: ignore[reportFunctionMemberAccess]


def score(
  reward_fn: rewards.CombinedRewardFn,
  images: np.ndarray,
  prompts: Sequence[types.Prompt],
  on_chunk: preemption.OnChunk = preemption.go_on,
  looked: Mapping[str, np.ndarray] = {},
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """(label -> scores [N], label -> info) of images uint8 [N, H, W, 3] that every process holds.

  Of several processes each scores its share; an info then holds what is a number for every image. `looked`
  are the scores [N] of rewards of latents, as of Watched.
  """
  count, process = jax.process_count(), jax.process_index()
  rows = np.arange(len(images)) % count == process
  texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
  scorer = futures.ThreadPoolExecutor(1)
  try:
    given = {"looked": looked} if looked else {}
    job = scorer.submit(reward_fn(images, texts, metadata, rows=rows, **given))
    on_chunk(job)
    _, scores, infos = job.result()
  finally:  # without waiting: whoever ends the work does not wait for a reward that hangs
    scorer.shutdown(wait=False)
  if count == 1:
    return scores, infos
  numbers = {label: _numbers(info, rows.sum()) for label, info in infos.items()}
  # The first process always has a row; another may have none, and so no info.
  names = processes.from_first({label: sorted(found) for label, found in numbers.items()})
  spread = {
    label: {name: np.zeros(len(rows), np.float32) for name in names[label]} for label in names
  }
  for label, found in numbers.items():
    for name in found.keys() & spread[label].keys():
      spread[label][name][rows] = found[name]
  return processes.sum_over((scores, spread))


def _numbers(info, count):
  """The entries of an info that are one number for each image."""
  arrays = {}
  for name, values in info.items():
    with contextlib.suppress(ValueError, TypeError, RuntimeError):  # what cannot be stacked is none
      arrays[name] = np.asarray(values)
  return {n: a for n, a in arrays.items() if a.shape == (count,) and a.dtype.kind in "biuf"}


def named(scores: Mapping[str, float]) -> str:
  """Scores with their names: "ocr=.212 jpeg=.557"."""
  each = (f"{label}={score:.3f}" for label, score in scores.items())
  return " ".join(re.sub(r"=(-?)0\.", r"=\1.", line) for line in each)


def captions(found: Evaluation) -> list[tuple[str, str, str]]:
  """[N] (prompt, reading, scores with their names); the reading is the first reward's, "" if none reads."""
  readings = next(iter(found.readings.values()), [""] * len(found.prompts))
  each = [{label: float(s[i]) for label, s in found.scores.items()} for i in range(len(readings))]
  return [(p.text, r, named(s)) for p, r, s in zip(found.prompts, readings, each)]


def _cut(caption, width, draw, font):
  """As much of a caption as one line of `width` pixels holds."""
  line = " ".join(caption[: 16 * width].split())[:width]  # no letter is narrower than a pixel
  length = lambda count: draw.textlength(line[:count], font=font)
  return line[: bisect.bisect_right(range(len(line) + 1), width, key=length) - 1]


def grid(
  images: np.ndarray,
  captions: Sequence[str | Sequence[str]],
  *,
  columns: int = 8,
  scale: int = 0,
) -> np.ndarray:
  """Lays images uint8 [N, H, W, 3] out with a caption under each; uint8 [H', W', 3].

  Args:
    images: to show.
    captions: N texts, or N tuples of such, one a line; each is cut to the image's width.
    columns: in a row.
    scale: enlargement; 0 chooses one that makes small images about 96 pixels wide.
  """
  texts = [(each,) if isinstance(each, str) else tuple(filter(None, each)) for each in captions]
  size, boxes = _lay_out(images, texts, columns, scale)
  sheet = Image.new("RGB", size, "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
  for image, lines, (left, top, right, bottom) in zip(images, texts, boxes):
    shown = Image.fromarray(image).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    sheet.paste(shown, (left, top))
    for i, text in enumerate(lines):
      place = (left, bottom + _LINE * i)
      draw.text(place, _cut(text, right - left, draw, font), fill="black", font=font)
  return np.asarray(sheet)


def _lay_out(images, texts, columns=8, scale=0):
  """((width, height) of a grid's sheet, [N] boxes (left, top, right, bottom) of its pictures)."""
  count, height, width, _ = images.shape
  scale = scale or max(1, round(96 / width))
  height, width, margin = height * scale, width * scale, 4
  across, down = width + margin, height + _LINE * max(map(len, texts), default=1) + margin
  corners = [(margin + i % columns * across, margin + i // columns * down) for i in range(count)]
  size = (columns * across + margin, -(-count // columns) * down + margin)
  return size, [(left, top, left + width, top + height) for left, top in corners]


def describe(result: Evaluation, count: int) -> dict[str, Any]:
  """What belongs to the first `count` pictures of a `grid` with `captions`, for JSON.

  Returns:
    {"boxes": [N] of (left, top, right, bottom) in the sheet, "prompts": [N], "scores": label -> [N],
    "readings": label -> [N]}.
  """
  return {
    "boxes": _lay_out(
      result.images[:count], [[*filter(None, c)] for c in captions(result)[:count]]
    )[1],
    "prompts": [p.text for p in result.prompts[:count]],
    "scores": {label: [*map(float, each[:count])] for label, each in result.scores.items()},
    "readings": {label: [*each[:count]] for label, each in result.readings.items()},
  }
