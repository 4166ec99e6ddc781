"""Metadata is in pyproject.toml; here is what it cannot say: configs/ ships as tpgrpo_jax/recipes."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["tpgrpo_jax*"]), "tpgrpo_jax.recipes"],
  package_dir={"tpgrpo_jax.recipes": "configs"},
)
