"""The small models of rewards.npz as folders, as the hub stores them."""

import json
import pathlib

import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
SIZES = ("48x48", "37x61", "71x40", "20x25")


def load():
  return np.load(GOLDEN / "rewards.npz")


def prompts(golden):
  return json.loads(str(golden["prompts"]))


def weights(golden, case):
  """{name: float32 array} of a stored model."""
  prefix = f"{case}/weights/"
  keys = [key for key in golden.files if key.startswith(prefix)]
  return {key.removeprefix(prefix): golden[key].astype(np.float32) for key in keys}


def write_folder(golden, case, folder, file="model.safetensors"):
  """Config, tokenizer and weights of a stored model; returns the folder."""
  folder = pathlib.Path(folder)
  folder.mkdir(exist_ok=True)
  prefix = f"{case}/files/"
  for key in (key for key in golden.files if key.startswith(prefix)):
    (folder / key.removeprefix(prefix)).write_bytes(golden[key].tobytes())
  safetensors.numpy.save_file(weights(golden, case), folder / file)
  return folder


def write_head(golden, folder):
  """The aesthetic head's file."""
  path = pathlib.Path(folder) / "aesthetic_head.safetensors"
  safetensors.numpy.save_file(weights(golden, "head"), path)
  return path
