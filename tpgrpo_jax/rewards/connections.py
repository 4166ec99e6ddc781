"""Connections that end when their time is over, however slowly something comes in on them.

An HTTP client's timeouts are those of each read: a byte now and then keeps within them for ever.
"""

import contextlib
import math
import ssl
import threading
import time
from typing import Any


class Clock(threading.local):
  """When what this thread sends and receives must be over, by time.monotonic()."""

  deadline = math.inf

  @contextlib.contextmanager
  def until(self, deadline: float):
    """Sets the deadline of this thread within the block."""
    before, self.deadline = self.deadline, deadline
    try:
      yield
    finally:
      self.deadline = before

  def left(self, timeout: float | None, late: type[Exception]) -> float | None:
    """Seconds that the next step may take, at most `timeout`; raises `late` where none are left."""
    if self.deadline == math.inf:
      return timeout
    left = self.deadline - time.monotonic()
    if left <= 0:
      raise late("the time is over")
    return left if timeout is None else min(timeout, left)


def open_client(*, verify: ssl.SSLContext | bool, connections: int, clock: Clock) -> Any:
  """An HTTP client that goes by the clock; it follows no proxy of the environment.

  Args:
    verify: what certificates are checked with; True for the usual authorities.
    connections: that are open at the same time.
    clock: which it goes by.

  Raises:
    ImportError: a package is not installed.
  """
  import httpcore2
  import httpx2

  # A token must not go where nobody said that it should.
  context = httpx2.create_ssl_context(verify=verify, trust_env=False)
  transport = httpx2.HTTPTransport(verify=context, trust_env=False)
  transport._pool.close()
  # httpx2 has no public way to give its transport a pool. This one differs in its backend alone.
  transport._pool = httpcore2.ConnectionPool(
    ssl_context=context,
    max_connections=connections,
    max_keepalive_connections=connections,
    keepalive_expiry=5.0,
    network_backend=_Backend(clock),  # pyright: ignore[reportArgumentType]
  )
  return httpx2.Client(
    transport=transport, trust_env=False, headers={"Accept-Encoding": "identity"}
  )


class _Backend:
  """httpcore2's own, with streams that go by the clock."""

  def __init__(self, clock):
    import httpcore2

    self._clock, self._backend, self._late = (
      clock,
      httpcore2.SyncBackend(),
      httpcore2.ConnectTimeout,
    )

  def connect_tcp(self, host, port, timeout=None, **options):
    timeout = self._clock.left(timeout, self._late)
    return _Stream(self._backend.connect_tcp(host, port, timeout=timeout, **options), self._clock)

  def sleep(self, seconds):
    self._backend.sleep(seconds)


class _Stream:
  """One connection of httpcore2."""

  def __init__(self, stream, clock):
    import httpcore2

    self._stream, self._clock = stream, clock
    self._read_late, self._write_late = httpcore2.ReadTimeout, httpcore2.WriteTimeout
    self._connect_late = httpcore2.ConnectTimeout

  def read(self, max_bytes, timeout=None):
    return self._stream.read(max_bytes, self._clock.left(timeout, self._read_late))

  def write(self, buffer, timeout=None):
    view = memoryview(buffer)
    for first in range(0, len(view), 2**18):  # each piece has the time that is left then
      left = self._clock.left(timeout, self._write_late)
      self._stream.write(view[first : first + 2**18], left)

  def close(self):
    self._stream.close()

  def start_tls(self, ssl_context, server_hostname=None, timeout=None):
    left = self._clock.left(timeout, self._connect_late)
    return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._clock)

  def get_extra_info(self, info):
    return self._stream.get_extra_info(info)
