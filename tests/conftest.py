"""Eight virtual CPU devices, jaxtyping's shapes checked at run time, repeatable examples."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

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
