"""The page of a model on the hub: what it was made from, by what, and what it gained."""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

from etils import epath

from tpgrpo_jax import config as config_lib
from tpgrpo_jax import models, version
from tpgrpo_jax.config import bridge, presets
from tpgrpo_jax.models.hf import files
from tpgrpo_jax.reporting import history

CARD, RUN_CONFIG = "README.md", "run_config.json"


def write_card(
  run_dir: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  weights: str,
  how: str,
  strength: float = 1.0,
) -> epath.Path:
  """Writes README.md, the run's config and its grids of pictures into the folder of an export.

  Args:
    run_dir: of the run.
    output: the folder.
    weights: which were exported: "ema", "last" or "best".
    how: Python that opens them.
    strength: of what was learned.

  Raises:
    ValueError: as of `history.load_run`.
  """
  run, folder = history.load_run(run_dir), epath.Path(output)
  config = run.config
  (folder / RUN_CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
  grids = sorted((run.folder / "images").glob("eval_*.png"))
  pictures = {"before": grids[0], "after": grids[-1]} if len(grids) > 1 else {}
  for name, path in pictures.items():
    (folder / f"{name}.png").write_bytes(path.read_bytes())
  base = config.model.path or f"the built-in model {config.model.variant!r}"
  method, number = config.credit.method, presets.PAPERS.get(config.run.label, "")
  name = config.run.label or method
  paper = f" ([arXiv {number}](https://arxiv.org/abs/{number}))" if number else ""
  parts = [
    _front_matter(config),
    f"# {epath.Path(run_dir).name}\n\n{base}, fine-tuned by {name}{paper} with tpgrpo_jax "
    f"{version.installed()}.",
    f"```python\n{how}\n```",
    f"## What it gained\n\n{_measured(weights, strength)}{_gains(run, weights)}",
  ]
  if pictures:
    shown = "\n\n".join(
      f"The first and the last evaluation: {k}\n\n![{k}]({k}.png)" for k in pictures
    )
    parts.append(f"## Pictures\n\nHeld-out prompts under each, from the same noise.\n\n{shown}")
  parts += [
    f"## How it was made\n\n```sh\n{train_command(config)}\n```\n\nAll fields: `{RUN_CONFIG}`.",
    f"## Citation\n\n{_citation(config, name, number)}",
  ]
  path = folder / CARD
  path.write_text("\n\n".join(parts) + "\n")
  return path


def train_command(config: config_lib.Config) -> str:
  """The shortest command that makes this config: the nearest recipe, and the fields that differ from it."""
  wanted = bridge.flatten(json.loads(json.dumps(dataclasses.asdict(config))))
  best: tuple[str, dict[str, Any]] | None = None
  for task in presets.TASKS:
    for method in presets.METHODS:
      recipe = dataclasses.replace(presets.recipe(task, method), seed=config.seed)
      have = dataclasses.asdict(config_lib.name_run(recipe))
      found = bridge.flatten(json.loads(json.dumps(have)))
      changed = {k: v for k, v in wanted.items() if k not in found or found[k] != v}
      changed |= {k: None for k in found if k not in wanted}
      if best is None or len(changed) < len(best[1]):
        best = f"{task}:{method}", changed
  assert best is not None
  recipe, changed = best
  if any(name.startswith("rewards") for name in changed):  # labels are set all together
    changed = {k: v for k, v in changed.items() if not k.startswith("rewards")}
    changed["rewards"] = config.rewards
  if config.seed:
    changed = {"seed": config.seed} | changed
  lines = [f"tpgrpo train --config={recipe}"]
  for name, value in changed.items():
    value = tuple(value) if isinstance(value, list) else value
    text = f"--config.{name}={value}"
    lines.append(f'"{text}"' if not text.replace("=", "").replace(".", "").isalnum() else text)
  return " \\\n  ".join(lines)


def _front_matter(config):
  edits = models.MODELS[config.model.variant].task == "edit"
  tag = "image-to-image" if edits else "text-to-image"
  lines = ["library_name: diffusers", f"pipeline_tag: {tag}"]
  if files.is_hub_id(config.model.path):
    lines += [f"base_model: {config.model.path}"]
    if config.lora.rank:
      lines += ["base_model_relation: adapter"]
  tags = ["tpgrpo_jax", "reinforcement-learning", *(["lora"] if config.lora.rank else [])]
  return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _citation(config, name, number):
  """What to cite: entries of BibTeX for the method and the software, and the page of the base model."""
  entries = [
    "@software{tpgrpo_jax,\n  title = {tpgrpo_jax: RL fine-tuning of flow-matching image generators},\n"
    f"  author = {{The tpgrpo_jax authors}},\n  version = {{{version.installed()}}}\n}}"
  ]
  if number:
    entries.insert(
      0,
      f"@misc{{{name},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
      f"  url = {{https://arxiv.org/abs/{number}}}\n}}",
    )
  base = "The licence of the base model holds for this one."
  if files.is_hub_id(config.model.path):
    page = f"https://huggingface.co/{config.model.path}"
    base = f"The base model's [page]({page}) says how to cite it. Its licence holds for this one."
  text = "\n\n".join(entries)
  return f"```bibtex\n{text}\n```\n\n{base}"


def _measured(weights: str, strength: float) -> str:
  """Says of which weights the scores are, where these are others."""
  measured = "the best weights" if weights == "best" else "the average (EMA) of the run's weights"
  others = ["the weights after the last update, without average"] if weights == "last" else []
  others += [f"base + {strength:g} (learned - base)"] if strength != 1.0 else []
  if not others:
    return ""
  what = ", and of it ".join(others)
  return f"Exported: {what}. Measured, and drawn below: {measured} at full strength.\n\n"


def _gains(run: history.Run, weights: str) -> str:
  """A table of each reward before and after; with 95 % intervals where there were prompts to judge by."""
  row: Mapping[str, Any] = run.judged
  chosen = "best" if weights == "best" else "last"
  labels = [
    k.split("/")[2] for k in row if k.startswith(f"{chosen}/reward/") and k.endswith("/mean")
  ]
  if labels:
    cell = lambda key: (
      f"{row[f'{key}/mean']:.3f} ± {1.96 * float(row[f'{key}/standard_error']):.3f}"
    )
    rows = [
      f"| {n} | {cell(f'base/reward/{n}')} | {cell(f'{chosen}/reward/{n}')} | {cell(f'{chosen}/gain/{n}')} |"
      for n in labels
    ]
    head = f"On {row['prompts']} held-out prompts that no evaluation of the run saw, mean and 95 % interval:"
    return "\n".join(
      [head, "", "| reward | before | after | gain |", "| --- | --- | --- | --- |", *rows]
    )
  if len(run.evals) < 2:
    return "The run has not been judged yet."
  first, last = run.evals[0], run.evals[-1]
  labels = [
    k.split("/")[1]
    for k in last
    if k.startswith("reward/") and k.endswith("/mean") and k != "reward/mean"
  ]
  rows = [
    f"| {n} | {first.get(f'reward/{n}/mean', float('nan')):.3f} | {last[f'reward/{n}/mean']:.3f} |"
    for n in labels
  ]
  head = "On the held-out prompts of its own evaluations, which chose nothing but when to stop:"
  return "\n".join([head, "", "| reward | before | after |", "| --- | --- | --- |", *rows])


def push(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
  """Uploads a folder to the hub as a model; returns its address.

  Args:
    folder: of an export.
    repository: "owner/name"; made where it does not exist. $HF_ENDPOINT is another hub than the public one.
    private: one that is made is not for everyone to see.

  Raises:
    ValueError: it cannot be uploaded; the files stay where they are.
  """
  import huggingface_hub

  api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
  try:
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(
      repo_id=repository, folder_path=os.fspath(folder), commit_message="tpgrpo export"
    )
  except Exception as error:  # of the network, of the hub: other classes each version
    raise ValueError(
      f"--push={repository!r}: could not be uploaded ({type(error).__name__}: {error}). The files are in "
      f"{os.fspath(folder)!r}. Check the name, and log in with `hf auth login`."
    ) from error
  return str(address)
