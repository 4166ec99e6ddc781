"""Eight virtual CPU devices, programs kept between runs, shapes checked at run time, repeatable examples."""

import contextlib
import ctypes
import gc
import importlib.util
import mmap
import os
import pathlib
import platform


def _xla_knows(flags):
  """Whether they stand in XLA's library: a flag that it does not know ends the process."""
  (library,) = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob(
    "libjax_common.*"
  )
  with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return all(content.find(flag.encode()) != -1 for flag in flags)


os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time. Level 0 halves it, and the older way to emit loops takes a third
# of the rest; there it needs instructions without fused multiply-add, else two programs round one formula in
# two ways. CI runs the tests that are marked `exact` once more as programs are compiled for users:
# XLA_FLAGS=--xla_backend_optimization_level=3.
_LEVEL = "xla_backend_optimization_level"
_LOOPS = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_max_isa": "AVX"}
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
  _fast = {_LEVEL: 0} | (_LOOPS if platform.machine() == "x86_64" and _xla_knows(_LOOPS) else {})
  _words = [
    os.environ.get("XLA_FLAGS", ""),
    *(f"--{name}={value}" for name, value in _fast.items()),
  ]
  os.environ["XLA_FLAGS"] = " ".join(_words).strip()
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
