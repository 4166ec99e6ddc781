"""Eight virtual CPU devices, programs kept between runs, shapes checked at run time, repeatable examples."""

import contextlib
import ctypes
import gc
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time, and level 0 half of it. CI runs the tests that are marked
# `exact` once more as programs are compiled for users: XLA_FLAGS=--xla_backend_optimization_level=3.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_LEVEL}=0".strip()
_PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # and not by XLA_FLAGS: other processes have one

# The same examples in every run: whether a commit passes must not depend on luck.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# types.py is left out: the hook wraps the pytrees' constructors, which breaks tree.map over them.
jaxtyping.install_import_hook(
  [f"tpgrpo_jax.{name}" for name in ("flow", "credit", "objective", "rewards", "data")],
  "beartype.beartype",
)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
  """Programs of a module are of no use to the next one, and take gigabytes together."""
  yield
  jax.clear_caches()
  gc.collect()
  with contextlib.suppress(AttributeError, OSError):  # glibc keeps what it has for itself, else
    ctypes.CDLL(None).malloc_trim(0)
