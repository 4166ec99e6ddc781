"""Writes what a run learned for diffusers: python -m tpgrpo_jax.export --run RUN_DIR --output FOLDER

Adapters become pytorch_lora_weights.safetensors, for pipe.load_lora_weights(FOLDER). With --merge, and
for a run that trained every weight, the whole transformer is written, for from_pretrained(FOLDER). Beside
them lies README.md, a page for the hub; --push owner/name uploads all of it, for everyone to see unless
--private. With --push the folder must hold nothing that an export does not write.
"""

import dataclasses
import re

from absl import app, flags

from tpgrpo_jax import command

_RUN = flags.DEFINE_string("run", None, "Run folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the files.", required=True)
_MERGE = flags.DEFINE_boolean("merge", False, "Add the adapters to the weights and write them all.")
_PUSH = flags.DEFINE_string("push", None, "Also upload the folder to the hub, as owner/name.")
_PRIVATE = flags.DEFINE_boolean(
  "private", False, "With --push: a new repository is private. One that exists stays as it is."
)
_WEIGHTS, _STRENGTH = command.define_weights()

# What exports write.
FILES = ("*.safetensors", "*.index.json", "config.json", "README.md", "run_config.json")
FILES += ("before.png", "after.png")


def main(argv: list[str]) -> None:
  """Parses, opens and writes."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}. Did you mean --run {argv[1]}?")
  if _PRIVATE.value and not _PUSH.value:
    raise ValueError("--private: is for --push, which is not given. Name the repository by --push.")
  if _PUSH.value and not re.fullmatch(r"[\w.-]+/[\w.-]+", _PUSH.value):
    raise ValueError(f"--push={_PUSH.value!r}: must be a repository of the hub, owner/name.")
  from tpgrpo_jax.models import hf, lora
  from tpgrpo_jax.training import restore

  config = restore.choose_config(_RUN.value, None)
  # All that lies in the folder would be uploaded.
  folder = command.open_output("--output", _OUTPUT.value, only=FILES if _PUSH.value else ())
  if (folder / "README.md").exists() and not (folder / "run_config.json").exists():
    raise ValueError(
      f"--output={_OUTPUT.value!r}: holds a README.md that no export wrote. Name a new folder."
    )
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantize=""))
  opened = restore.open_model(config, _RUN.value, weights=_WEIGHTS.value, strength=_STRENGTH.value)
  sizes, params, adapters = opened.model.config, opened.params, config.lora
  if adapters.rank and not _MERGE.value:
    path = hf.save_lora(
      _OUTPUT.value,
      params["trainable"],
      sizes,
      rank=adapters.rank,
      alpha=adapters.alpha,
      targets=adapters.targets,
    )
    how = f"pipe.load_lora_weights({(_PUSH.value or _OUTPUT.value)!r})"
    print(f"adapters of {opened.name} in {path}\npipe.load_lora_weights({_OUTPUT.value!r})")
    _finish(how)
    return
  if adapters.rank:
    weights = hf.merge_lora(params, rank=adapters.rank, alpha=adapters.alpha)
  else:
    weights = lora.merge_trees(params["frozen"], params["trainable"])
  hf.save_transformer(_OUTPUT.value, sizes, weights)
  name = hf.class_name(sizes)
  print(f"{opened.name} in {_OUTPUT.value}\n{name}.from_pretrained({_OUTPUT.value!r})")
  _finish(f"{name}.from_pretrained({(_PUSH.value or _OUTPUT.value)!r})")


def _finish(how):
  """Writes the page of the model, and uploads the folder where that is asked for."""
  from tpgrpo_jax.reporting import model_card
  from tpgrpo_jax.runs import metrics, processes

  if not processes.is_first():
    return
  if metrics.rows_of(_RUN.value):
    model_card.write_card(
      _RUN.value, _OUTPUT.value, weights=_WEIGHTS.value, how=how, strength=_STRENGTH.value
    )
  if _PUSH.value:
    address = model_card.push(_OUTPUT.value, _PUSH.value, private=_PRIVATE.value)
    print(f"uploaded to {address}")


if __name__ == "__main__":
  command.run(main)
