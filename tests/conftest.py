"""Eight virtual CPU devices, programs kept between runs, shapes checked at run time, repeatable examples."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time. Level 0 halves it; CI runs the tests that are marked `exact`
# once more as users' programs are compiled: XLA_FLAGS=--xla_backend_optimization_level=3.
_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_backend_optimization_level": 0}
_GIVEN = os.environ.get("XLA_FLAGS", "")
_ADDED = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _GIVEN]
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *_ADDED]).strip()
_PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402

# The same examples in every run: whether a commit passes must not depend on luck.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# types.py is left out: the hook wraps the pytrees' constructors, which breaks tree.map over them.
jaxtyping.install_import_hook(
  [f"tpgrpo_jax.{name}" for name in ("flow", "credit", "objective", "rewards", "data")],
  "beartype.beartype",
)
