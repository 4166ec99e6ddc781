"""What `evaluate` and `sample` do with an opened model: images, scores, and the files they leave."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from PIL import Image

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, rewards, types
from tpgrpo_jax.data import pictures
from tpgrpo_jax.data import prompts as prompts_lib
from tpgrpo_jax.runs import metrics
from tpgrpo_jax.training import evaluation, judging, restore

GRID_IMAGES = 64


def load_split(
  config: config_lib.Config, split: str, *, count: int | None = None
) -> list[types.Prompt]:
  """The first prompts of "train", of "test", or of "judge": held out, after those of evaluations.

  Args:
    config: of a run or recipe; prompts and eval.
    split: which.
    count: how many; None is eval.prompts, or eval.judge_prompts.

  Raises:
    ValueError: there are none.
  """
  asked, source = config.prompts, "test" if split == "judge" else split
  prompts = prompts_lib.load_prompts(asked.name, asked.path, source, data_dir=asked.cache or None)
  if split != "judge":
    return [prompts[i] for i in range(min(count or config.eval.prompts, len(prompts)))]
  settings = dataclasses.replace(config.eval, judge_prompts=count or config.eval.judge_prompts)
  if chosen := judging.choose_prompts(prompts, settings):
    return chosen
  raise ValueError(
    f"--split=judge: of the {len(prompts)} held-out prompts the evaluations of training look at "
    f"eval.prompts={config.eval.prompts}, which leaves {max(len(prompts) - config.eval.prompts, 0)}, and "
    f"eval.judge_prompts={config.eval.judge_prompts} are asked for. Use --split=test."
  )


def noise_seed(config: config_lib.Config, split: str, prompts: Sequence[types.Prompt]) -> int:
  """What training itself takes for the prompts of a split, as `load_split` gives them."""
  if split != "judge":
    return evaluation.NOISE_SEED
  return judging.noise_seed(prompts, load_split(config, "test"))


def sample_images(
  opened: restore.Opened,
  prompts: Sequence[types.Prompt],
  *,
  num_steps: int,
  seed: int,
  kind: str = "ode",
  look: Any = lambda latents, condition: None,
) -> np.ndarray:
  """Samples uint8 [N, H, W, 3]; image i is a function of weights, prompt i, i and seed alone.

  `kind` is a name of evaluation.SAMPLERS, `look` as of evaluation.make_sample_fn.
  """
  sample = evaluation.make_sample_fn(
    opened.config, opened.model, opened.mesh, num_steps=num_steps, kind=kind
  )
  with jax.set_mesh(opened.mesh):
    return sample(opened.params, prompts, seed, look=look)


def evaluate_images(
  images: np.ndarray,
  prompts: Sequence[types.Prompt],
  reward_fn: rewards.CombinedRewardFn,
  looked: Mapping[str, np.ndarray] = {},
) -> dict[str, Any]:
  """Scores images by every reward on its own.

  Args:
    images: uint8 [N, H, W, 3].
    prompts: [N].
    reward_fn: as of `rewards.make_rewards`.
    looked: scores [N] of its rewards of latents, as of evaluation.Watched.

  Returns:
    What JSON can hold: {"rewards": label -> mean, std, standard_error and, where the reward says it,
    exact; "image": statistics; "samples": one dict for each image}. The standard error is that of
    the mean over prompts. Where every prompt has a tag, as GenEval's do, a reward also has tags, tag ->
    mean (of exact, where there is one), and mean_of_tags, GenEval's overall score.
  """
  texts = [p.text for p in prompts]
  scores, infos = evaluation.score(reward_fn, images, prompts, looked=looked)
  summary, samples = {}, [{"prompt": text, "scores": {}} for text in texts]
  for label, score in scores.items():
    spread = float(score.std())
    error = score.std(ddof=1) / np.sqrt(len(score)) if len(score) > 1 else 0.0
    summary[label] = {"mean": float(score.mean()), "std": spread, "standard_error": float(error)}
    if "exact" in infos[label]:
      summary[label]["exact"] = float(np.mean(infos[label]["exact"]))
    if tags := _mean_of_each_tag(infos[label].get("exact", score), prompts):
      summary[label] |= {"tags": tags, "mean_of_tags": float(np.mean([*tags.values()]))}
    for i, sample in enumerate(samples):
      sample["scores"][label] = float(score[i])
      if "text" in infos[label]:
        sample.setdefault("read", {})[label] = str(infos[label]["text"][i])
  return {
    "rewards": summary,
    "image": metrics.image_statistics(metrics.statistics_of_each(images)),
    "samples": samples,
  }


def _mean_of_each_tag(values, prompts) -> dict[str, float]:
  """Tag -> the mean of its prompts' values; empty where a prompt has no tag."""
  tags = [prompt.metadata.get("tag") for prompt in prompts]
  if not all(isinstance(tag, str) for tag in tags):
    return {}
  found = {tag: [v for v, own in zip(values, tags, strict=True) if own == tag] for tag in tags}
  return {tag: float(np.mean(each)) for tag, each in sorted(found.items())}


def render_table(result: dict[str, Any]) -> str:
  """The scores of `evaluate_images` as text."""
  columns = ("mean", "std", "standard_error", "exact")
  width = max(len("reward"), *map(len, result["rewards"]))
  lines = [f"{'reward':<{width}}  " + "  ".join(f"{c.replace('_', ' '):>14}" for c in columns)]
  for label, row in result["rewards"].items():
    cells = (f"{row[c]:>14.4f}" if c in row else f"{'-':>14}" for c in columns)
    lines.append(f"{label:<{width}}  " + "  ".join(cells))
  for label, row in result["rewards"].items():
    if "tags" in row:
      each = ", ".join(f"{tag} {mean:.4f}" for tag, mean in row["tags"].items())
      lines.append(f"{label} by tag: {each}; mean of tags {row['mean_of_tags']:.4f}")
  return "\n".join(lines)


def save_evaluation(
  result: dict[str, Any], images: np.ndarray, output: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes evaluation.json, then grid.png (captions: first reward's score, prompt); returns the former."""
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "evaluation.json"
  path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
  captions = [
    f"{next(iter(s['scores'].values())):.2f} {s['prompt']}" for s in result["samples"][:GRID_IMAGES]
  ]
  _save_grid(folder, images, captions)
  return path


def save_samples(
  images: np.ndarray, texts: Sequence[str], output: str | os.PathLike[str], *, samples: int = 1
) -> list[pathlib.Path]:
  """Writes one PNG for each image, named by number and prompt, and grid.png; returns the former.

  Args:
    images: uint8 [N, H, W, 3], `samples` of each prompt side by side.
    texts: [N] prompts.
    output: folder, made when it does not exist.
    samples: of each prompt; a row of the grid holds as many (or a multiple, up to 8).
  """
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for i, (image, text) in enumerate(zip(images, texts)):
    slug = re.sub(r"[^\w-]+", "_", text).strip("_")[:40]
    paths.append(folder / f"{i:04d}_{slug}.png")
    Image.fromarray(image).save(paths[-1])
  columns = samples * max(1, 8 // samples)
  _save_grid(folder, images, texts, columns=min(columns, len(images)))
  return paths


def _save_grid(folder, images, captions, columns=8):
  sheet = evaluation.grid(images[:GRID_IMAGES], captions[:GRID_IMAGES], columns=columns)
  Image.fromarray(sheet).save(folder / "grid.png")


def make_prompts(
  config: config_lib.Config, texts: Sequence[str], image: str | None
) -> list[types.Prompt]:
  """The prompts of `sample`: texts, and the picture that they edit where the model edits.

  Raises:
    ValueError: a model that edits without a picture, or one that paints from text alone with one.
  """
  variant, edits = config.model.variant, models.MODELS[config.model.variant].task == "edit"
  if edits and not image:
    raise ValueError(
      f"--image: model.variant={variant!r} edits a picture. Name one, --image cat.png."
    )
  if image and not edits:
    raise ValueError(
      f"--image={image!r}: model.variant={variant!r} paints from text alone. Leave it out."
    )
  metadata = {pictures.MEMBER: os.path.abspath(os.path.expanduser(image))} if image else {}
  return [types.Prompt(text, metadata) for text in texts]


def load_prompt_lines(path: str | os.PathLike[str]) -> list[str]:
  """Reads the texts of prompts from a file of lines, or of objects with a "prompt" (.jsonl).

  Raises:
    ValueError: no such file, one in another form, or nothing in it.
  """
  return types.texts_of(prompts_lib.read_file(pathlib.Path(path), f"--prompts_file={str(path)!r}"))
