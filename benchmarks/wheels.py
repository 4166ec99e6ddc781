"""Which packages this host lacks, and how to fetch them on another: python benchmarks/wheels.py

Needs nothing but Python. Exits with an error where a package is missing that every figure needs; those
that one figure needs are named only. --names prints the missing ones alone, for pip.
"""

import argparse
import importlib.util
import platform
import sys

# Module -> (package, what it is for); "" is for all figures.
NEEDED = {
  "jax": ("jax", ""),
  "flax": ("flax", ""),
  "optax": ("optax", ""),
  "orbax.checkpoint": ("orbax-checkpoint", ""),
  "absl": ("absl-py", ""),
  "etils": ("etils", ""),
  "jaxtyping": ("jaxtyping", ""),
  "wadler_lindig": ("wadler-lindig", ""),
  "jinja2": ("jinja2", ""),
  "matplotlib": ("matplotlib", ""),
  "ml_collections": ("ml-collections", ""),
  "numpy": ("numpy", ""),
  "PIL": ("pillow", ""),
  "safetensors": ("safetensors", ""),
  "tensorboardX": ("tensorboardX", ""),
  "tqdm": ("tqdm", ""),
  "transformers": ("transformers", ""),
  "torch": ("torch", "torch"),
  "diffusers": ("diffusers", "torch"),
  "peft": ("peft", "torch"),
  "accelerate": ("accelerate", "torch"),
  "rapidocr": ("rapidocr", "tiny_text"),
  "onnxruntime": ("onnxruntime", "tiny_text"),
  "rapidfuzz": ("rapidfuzz", "tiny_text"),
  "tensorflow_datasets": ("tensorflow-datasets", "the tiny model's figures"),
  "array_record": ("array-record", "the tiny model's figures"),
}


def is_missing(module: str) -> bool:
  """Whether the module cannot be imported; nothing of it is run but its parents."""
  try:
    return importlib.util.find_spec(module) is None
  except ModuleNotFoundError:
    return True


def find_missing() -> dict[str, str]:
  """Package -> the figure that it is for, "" for all, of what is not here."""
  return dict(NEEDED[module] for module in NEEDED if is_missing(module))


def download_line(packages) -> str:
  """The command for a host with a network, whose result goes into the folder that WHEELS names."""
  version = "".join(platform.python_version_tuple()[:2])
  target = f"--python-version {version} --platform manylinux_2_28_x86_64 --only-binary=:all:"
  return f"pip download --no-deps {target} -d wheels {' '.join(sorted(packages))}"


def main() -> None:
  """Prints what is missing."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--names", action="store_true", help="the missing packages alone")
  missing = find_missing()
  if parser.parse_args().names:
    print(" ".join(sorted(missing)))
    return
  for package, figure in sorted(missing.items()):
    print(f"missing: {package}, for {figure or 'everything'}", flush=True)
  if missing:
    print(f"On a host with a network: {download_line(missing)}", flush=True)
    print("Then here: WHEELS=wheels bash benchmarks/gpu.sh", flush=True)
  if "" in missing.values():
    sys.exit("without these there is no figure at all")


if __name__ == "__main__":
  main()
