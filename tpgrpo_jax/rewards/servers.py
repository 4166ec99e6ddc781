"""The addresses of one reward's servers: asked in turn, left out while they are down, and tried again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import ipaddress
import logging
import os
import pathlib
import threading
import time
from typing import Any, NamedTuple
from urllib import parse
import warnings

from tpgrpo_jax.rewards import tokens
from tpgrpo_jax.rewards.combine import RewardError

log = logging.getLogger(__name__)

_MOST = 64 * 2**20  # bytes of an answer
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds that a server is left out


class ServerError(OSError):
  """A server did not answer, or not with an answer; another try may go well."""


class Answer(NamedTuple):
  """What a server said.

  Attributes:
    url: of the server.
    status: of HTTP.
    body: whole.
  """

  url: str
  status: int
  body: bytes


@dataclasses.dataclass
class _Server:
  """One address; `retry_at` is when it may be asked again, after it was down."""

  url: str
  retry_at: float = 0.0
  pause: float = 0.0
  verified: bool = False


class Servers:
  """A pool of connections to servers that are alike."""

  def __init__(
    self,
    url: str | Sequence[str],
    *,
    token_file: str = "",
    ca_file: str = "",
    timeout: float = 120.0,
    connections: int = 4,
    verify: Callable[["Servers", str], None] = lambda servers, url: None,
  ):
    """Checks the addresses, and asks each server who it is.

    Args:
      url: one or several.
      token_file: file of the token that every request carries; "" for none.
      ca_file: PEM file of the authority that signed the servers' certificates; "" for the usual ones.
      timeout: seconds that an answer may take, all of it.
      connections: requests on their way at the same time.
      verify: of the pool and an address, which raises ServerError where nobody is, and RewardError where
        somebody else is; it is called before a server is asked anything else, at the start and whenever
        one was down.

    Raises:
      ValueError: an option out of its range; a server that is another; or no server at all.
    """
    if isinstance(timeout, str | bool) or not 0 < timeout < float("inf"):
      raise ValueError(f"timeout={timeout!r}: must be a number of seconds above 0. 120 is usual.")
    if type(connections) is not int or connections < 1:
      raise ValueError(f"connections={connections!r}: must be an integer >= 1.")
    self.timeout, self.connections = timeout, connections
    self._verify, self._lock, self._turn = verify, threading.Lock(), 0
    self._servers = [_Server(each) for each in check_urls(url)]
    self.urls = [server.url for server in self._servers]
    token = tokens.read_token(token_file) if token_file else ""
    if token:
      _warn_of_open_roads(self._servers)
    self._headers = tokens.bearer(token)
    self._client = self._open(ca_file)
    self._start()

  def send(self, method: str, path: str, body: bytes = b"", kind: str = "") -> Answer:
    """The answer of the server whose turn it is, or of the next one that lives.

    Raises:
      ServerError: none of them answered.
      RewardError: one answered that it will never score this, or is another reward's server.
    """
    tried: set[str] = set()
    problem = None
    while (server := self._next(tried)) is not None:
      tried.add(server.url)
      try:
        if not server.verified:
          self._verify(self, server.url)
          server.verified = True
        answer = self.ask(server.url, method, path, body, kind)
      except ServerError as error:
        problem = error
        self._left_out(server, error)
        continue
      self._is_back(server)
      return answer
    raise problem or ServerError("no server is left")

  def ask(
    self, url: str, method: str, path: str, body: bytes = b"", kind: str = "", *, statuses=(200,)
  ) -> Answer:
    """The answer of this one server, which is waited for while it says that it is busy.

    Raises:
      ServerError: it did not answer, or with a status that may pass.
      RewardError: it answered with a status that stays what it is (4xx).
    """
    deadline, said = time.monotonic() + self.timeout, ""
    while True:
      try:
        status, headers, content = self._exchange(url, method, path, body, kind, deadline)
      except ServerError as error:
        if said:  # why it was asked again says more than that the time was over then
          raise ServerError(f"{said}; then {error}") from error
        raise
      if status in statuses:
        return Answer(url, status, content)
      said = f"{url}{path} answered {status}: {_message(content)}"
      if status in (429, 503) and "retry-after" in headers:
        wait = _seconds(headers["retry-after"])
        if time.monotonic() + wait < deadline:
          time.sleep(wait)
          continue
      if status >= 500 or status in (408, 425, 429):
        raise ServerError(said)
      hint = _HINTS.get(status, "It does not take this request.")
      raise RewardError(f"{said} {hint} Then start the same command again.")

  def _exchange(self, url, method, path, body, kind, deadline):
    """(status, headers, content) of one request."""
    import httpx2

    left = max(deadline - time.monotonic(), 0.001)
    headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
    options: dict[str, Any] = {
      "timeout": httpx2.Timeout(left, connect=min(left, 10.0)), "headers": headers,
    }  # fmt: skip
    try:
      with self._client.stream(method, url + path, content=body or None, **options) as response:
        parts: list[bytes] = []
        size = 0
        for part in response.iter_raw():
          parts.append(part)
          size += len(part)
          if size > _MOST:
            raise ServerError(f"{url}{path} answers with more than {_MOST} bytes")
          if time.monotonic() > deadline:
            raise ServerError(f"{url}{path}: no whole answer within {self.timeout:g} s")
        return response.status_code, response.headers, b"".join(parts)
    except httpx2.TimeoutException as error:
      raise ServerError(f"{url}{path}: no answer within {self.timeout:g} s") from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
      raise ServerError(f"{url}{path}: {type(error).__name__}: {error}") from error

  def _open(self, ca_file):
    try:
      import httpx2
    except ImportError as error:
      raise ImportError(
        f"rewards of other machines need a package that is not installed ({error}). "
        "Run: pip install 'tpgrpo_jax[remote]'"
      ) from error
    import ssl

    secure: Any = True
    if ca_file:
      if not pathlib.Path(ca_file).is_file():
        raise ValueError(f"ca_file={ca_file!r}: no such file. Give a PEM file.")
      secure = ssl.create_default_context(cafile=os.fspath(ca_file))
    limits = httpx2.Limits(
      max_connections=self.connections + 2, max_keepalive_connections=self.connections + 2
    )
    # No proxy of the environment: a token must not go where nobody said that it should.
    return httpx2.Client(
      verify=secure, limits=limits, trust_env=False, headers={"Accept-Encoding": "identity"}
    )

  def _start(self):
    """Asks every server who it is; one at least must be there."""
    problems = []
    for server in self._servers:
      try:
        self._verify(self, server.url)
        server.verified = True
      except ServerError as error:
        problems.append(str(error))
        self._left_out(server, error)
      except RewardError as error:
        raise ValueError(f"url: {error}") from error
    if len(problems) == len(self._servers):
      raise ValueError(
        f"url: no reward server answers ({'; '.join(problems)}). Start one, see docs/"
        "rewards_over_the_network.md, then start the same command again."
      )

  def _next(self, tried):
    """The server whose turn it is; of those left out the one that waits for the shortest time."""
    with self._lock:
      order = self._servers[self._turn :] + self._servers[: self._turn]
      self._turn = (self._turn + 1) % len(self._servers)
    order = [server for server in order if server.url not in tried]
    now = time.monotonic()
    up = [server for server in order if server.retry_at <= now]
    if up:
      return up[0]
    return min(order, key=lambda server: server.retry_at, default=None)

  def _left_out(self, server, error):
    with self._lock:
      first = not server.pause
      server.verified = False
      server.pause = min(max(2 * server.pause, _FIRST_PAUSE), _LONGEST_PAUSE)
      server.retry_at = time.monotonic() + server.pause
    if first and len(self._servers) > 1:  # of a single one the caller says it
      log.warning("reward server left out until it answers again: %s", error)

  def _is_back(self, server):
    with self._lock:
      was, server.pause, server.retry_at = server.pause, 0.0, 0.0
    if was and len(self._servers) > 1:
      log.warning("reward server is back: %s", server.url)


_HINTS = {
  401: "Set token_file to the token that the server was started with.",
  403: "Set token_file to the token that the server was started with.",
  404: "Start the server with the reward that is asked for.",
  413: "Set batch to fewer pictures.",
}


def in_parallel(
  function: Callable[..., Any], calls: Iterable[tuple], connections: int
) -> list[Any]:
  """function(*call) of each call, in order, so many of them at the same time; a failure ends the rest."""
  with futures.ThreadPoolExecutor(connections, thread_name_prefix="reward request") as threads:
    sent = [threads.submit(function, *call) for call in calls]
    try:
      return [each.result() for each in sent]
    finally:
      for each in sent:
        each.cancel()


def check_urls(url: str | Sequence[str], field: str = "url") -> list[str]:
  """The addresses without a slash at their end.

  Raises:
    ValueError: none, one twice, or one that is no http:// or https:// address.
  """
  urls = [url] if isinstance(url, str) else list(url)
  if not urls:
    raise ValueError(f"{field}={url!r}: names no server. Use 'http://localhost:8090'.")
  for each in urls:
    if not isinstance(each, str) or "://" not in each:
      raise ValueError(
        f"{field}={each!r}: must begin with http:// or https://. Use {f'http://{each}'!r}."
      )
    try:
      parts = parse.urlsplit(each)
      parts.port  # noqa: B018  (raises)
    except ValueError as error:
      raise ValueError(f"{field}={each!r}: is no address ({error}).") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
      raise ValueError(
        f"{field}={each!r}: must be http:// or https://, a host and a port. Use 'http://localhost:8090'."
      )
    if parts.username or parts.password:
      raise ValueError(f"{field}: has a password in it. Put a token in a file, and set token_file.")
  urls = [each.rstrip("/") for each in urls]
  if len(set(urls)) < len(urls):
    raise ValueError(f"{field}={urls}: has a server twice. Name each once.")
  return urls


def _warn_of_open_roads(servers):
  for server in servers:
    parts = parse.urlsplit(server.url)
    try:
      near = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
      near = parts.hostname == "localhost"
    if parts.scheme == "http" and not near:
      warnings.warn(
        f"url={server.url!r}: the token travels unencrypted. Use https, or a tunnel (ssh -L).",
        stacklevel=4,
      )


def _seconds(retry_after):
  try:
    return min(max(float(retry_after), 0.05), 30.0)
  except ValueError:
    return 1.0


def _message(content: bytes) -> str:
  """What an answer that is an error says, in one line."""
  import json

  try:
    said: Mapping[str, Any] = json.loads(content)
    return str(said.get("error") or said.get("detail") or said)[:300]
  except (ValueError, AttributeError, RecursionError):
    return " ".join(content[:200].decode("utf-8", "replace").split())
