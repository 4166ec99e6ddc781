"""Where a server listens, and until when."""

import ipaddress
import pathlib
import socket
from typing import Any

from tpgrpo_jax import version


def check_packages() -> None:
  """Raises ImportError unless the extra is installed."""
  try:
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
  except ImportError as error:
    raise ImportError(
      f"serving needs packages that are not installed ({error}). Run: {version.install('serve')}"
    ) from error


def is_loopback(host: str) -> bool:
  """Whether the address can be reached from this machine alone."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def check_address(host: str, token_file: str, certificate: str, key: str) -> None:
  """Raises ValueError for an address that others reach without a token, and for half of a certificate."""
  if not is_loopback(host) and not token_file:
    raise ValueError(
      f"--host={host!r}: others can reach this address, so that --token_file is needed. Make one: "
      "python -c 'import secrets; print(secrets.token_hex(32))' > FILE; chmod 600 FILE"
    )
  if bool(certificate) != bool(key):
    raise ValueError("--tls_certificate and --tls_key: must be given together, or neither of them.")
  for flag, path in (("--tls_certificate", certificate), ("--tls_key", key)):
    if path and not pathlib.Path(path).is_file():
      raise ValueError(f"{flag}={path!r}: no such file. Give a PEM file.")


def serve(app: Any, *, host: str, port: int, tls: tuple[str, str], drain: int, ready: str) -> None:
  """Listens until SIGTERM or SIGINT; then takes nothing new, and ends when what waits is answered.

  Args:
    app: an ASGI application.
    host: address.
    port: 0 takes a free one.
    tls: files of certificate and key, or two empty strings.
    drain: seconds that what waits may take.
    ready: what is printed, with the address, when requests can come.

  Raises:
    ValueError: an address that cannot be had.
  """
  import uvicorn

  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except OSError as error:
    raise ValueError(
      f"--host={host} --port={port}: cannot listen there ({error.strerror}). Use another --port."
    ) from error
  listener.listen(1024)
  scheme = "https" if tls[0] else "http"
  shown = f"[{host}]" if ":" in host else host
  print(f"{scheme}://{shown}:{listener.getsockname()[1]} {ready}", flush=True)
  settings = uvicorn.Config(
    app,
    log_level="warning",
    access_log=False,
    server_header=False,
    ws="none",
    lifespan="on",
    timeout_keep_alive=75,
    timeout_graceful_shutdown=drain,
    limit_concurrency=4096,
    ssl_certfile=tls[0] or None,
    ssl_keyfile=tls[1] or None,
  )
  uvicorn.Server(settings).run(sockets=[listener])
