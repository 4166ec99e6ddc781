"""Which version this is."""

import importlib.metadata


def installed() -> str:
  """Of the installed package, as its metadata says."""
  try:
    return importlib.metadata.version("tpgrpo_jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    return "not installed"
