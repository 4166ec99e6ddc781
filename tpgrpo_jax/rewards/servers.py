"""The addresses of one reward's servers: asked in turn, left out while they are down, and tried again."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import logging
import os
import pathlib
import threading
import time
from typing import Any, NamedTuple

from tpgrpo_jax import version
from tpgrpo_jax.rewards import addresses, tokens
from tpgrpo_jax.rewards import connections as connections_lib
from tpgrpo_jax.rewards.combine import RewardError

log = logging.getLogger(__name__)

_MOST = 64 * 2**20  # bytes of an answer
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds that a server is left out
_HELLO = 10.0  # seconds within which a server says who it is, when a run starts
_ROUNDS = 8  # how often an answer of a process that nobody verified is thrown away


class ServerError(OSError):
  """A server did not answer, or not with an answer; another try may go well."""


class _Opens(Exception):
  """A request needs a new connection, at the end of which may be another server than before."""


class Answer(NamedTuple):
  """What a server said.

  Attributes:
    url: of the server.
    status: of HTTP.
    body: whole.
    instance: of the server's process, by its header X-Instance; "" where it has none.
  """

  url: str
  status: int
  body: bytes
  instance: str = ""


@dataclasses.dataclass
class _Server:
  """One address.

  Attributes:
    url: of it.
    retry_at: when it may be asked again, after it was down.
    pause: for how long it is left out the next time.
    verified: whether it said who it is, since it was down.
    verified_at: when the last such question was asked.
    instances: the processes that did; several behind a balancer, none where the server does not tell.
    failure: of the last such question, and when that was known.
    lock: held by the thread that asks who it is.
  """

  url: str
  retry_at: float = 0.0
  pause: float = 0.0
  verified: bool = False
  verified_at: float = 0.0
  instances: frozenset[str] = frozenset()
  failure: tuple[float, Exception | None] = (0.0, None)
  lock: Any = dataclasses.field(default_factory=threading.Lock)


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
    verify: Callable[["Servers", str], str | None] = lambda servers, url: None,
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
        one was down. It returns the instance that it found: an answer of another is thrown away, and the
        server verified again. Where it returns none, that is done for each new connection.

    Raises:
      ValueError: an option out of its range; a server that is another; or no server at all.
    """
    if isinstance(timeout, str | bool) or not 0 < timeout < float("inf"):
      raise ValueError(f"timeout={timeout!r}: must be a number of seconds above 0. 120 is usual.")
    if type(connections) is not int or connections < 1:
      raise ValueError(f"connections={connections!r}: must be an integer >= 1.")
    self.timeout, self.connections = timeout, connections
    self._verify, self._lock, self._turn = verify, threading.Lock(), 0
    self._servers = [_Server(each) for each in addresses.check_urls(url)]
    self.urls = [server.url for server in self._servers]
    token = tokens.read_token(token_file) if token_file else ""
    if token:
      addresses.warn_of_open_roads(self.urls)
    self._headers = tokens.bearer(token)
    self._clock, self._started = connections_lib.Clock(), False
    self._client = self._open(ca_file)
    self._start()
    self._started = True

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
        answer = self._ask_known(server, method, path, body, kind)
      except ServerError as error:
        problem = error
        self._left_out(server, error)
        continue
      self._is_back(server)
      return answer
    raise problem or ServerError("no server is left")

  def _ask_known(self, server, *request) -> Answer:
    """The answer of a process that was verified; what another says is thrown away."""
    fresh = False
    for _ in range(_ROUNDS):
      asked = time.monotonic()
      if not server.verified:
        self._introduce(server, asked)
        fresh = True
      known, stranger = server.instances, ""
      try:
        answer = self.ask(server.url, *request, opens=fresh or bool(known))
        if not known or answer.instance in known | server.instances:
          return answer
        stranger = answer.instance
      except _Opens:
        pass
      self._introduce(server, asked)
      for _ in range(_ROUNDS):  # a balancer may give the question to each of its processes in turn
        if not stranger or not server.instances or stranger in server.instances:
          break
        self._introduce(server, time.monotonic())
      fresh = True
    raise ServerError(
      f"{server.url} answers with ever new processes, which its /health does not name"
    )

  def _introduce(self, server, asked):
    """Asks a server who it is, unless another thread did so since `asked`: then that is how it went."""
    with server.lock:
      if server.verified and server.verified_at >= asked:
        return
      known_at, failure = server.failure
      if failure is not None and known_at >= asked:
        raise type(failure)(*failure.args)
      try:
        began = time.monotonic()
        found = self._verify(self, server.url)
      except (ServerError, RewardError) as error:
        server.failure = time.monotonic(), error
        raise
      server.instances = server.instances | {found} if found else frozenset()
      server.verified, server.verified_at = True, began

  def ask(
    self,
    url: str,
    method: str,
    path: str,
    body: bytes = b"",
    kind: str = "",
    *,
    statuses=(200,),
    opens: bool = True,
  ) -> Answer:
    """The answer of this one server, which is waited for while it says that it is busy.

    Args:
      url: of the server.
      method: of HTTP.
      path: behind the address.
      body: of the request.
      kind: of the body.
      statuses: of answers that are returned.
      opens: whether a new connection may be opened; where it may not and must be, _Opens is raised before
        anything is sent.

    Raises:
      ServerError: it did not answer, or with a status that may pass.
      RewardError: it answered with a status that stays what it is (4xx).
    """
    # A server that hangs is found out at the start, not after the first sampling's worth of waiting.
    patience = self.timeout if self._started or body else min(self.timeout, _HELLO)
    deadline, said = time.monotonic() + patience, ""
    while True:
      try:
        with self._clock.until(deadline):
          status, headers, content = self._exchange(method, url + path, body, kind, opens)
      except ServerError as error:
        if said:  # why it was asked again says more than that the time was over then
          raise ServerError(f"{said}; then {error}") from error
        raise
      except TimeoutError as error:
        said = f"{said}; then " if said else ""
        raise ServerError(f"{said}{url}{path}: no whole answer within {patience:g} s") from error
      if status in statuses:
        return Answer(url, status, content, headers.get("x-instance", ""))
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

  def _exchange(self, method, address, body, kind, opens):
    """(status, headers, content) of one request; TimeoutError at the deadline of this thread's clock."""
    import httpx2

    left = max(self._clock.deadline - time.monotonic(), 0.001)
    headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
    options: dict[str, Any] = {
      "timeout": httpx2.Timeout(left, connect=min(left, 10.0)), "headers": headers,
      "extensions": {} if opens else {"trace": _refuse_to_open},
    }  # fmt: skip
    try:
      with self._client.stream(method, address, content=body or None, **options) as response:
        parts: list[bytes] = []
        size = 0
        for part in response.iter_raw():
          parts.append(part)
          size += len(part)
          if size > _MOST:
            raise ServerError(f"{address} answers with more than {_MOST} bytes")
        return response.status_code, response.headers, b"".join(parts)
    except httpx2.ConnectTimeout as error:
      raise ServerError(f"{address}: no connection within {min(left, 10.0):.3g} s") from error
    except httpx2.TimeoutException as error:
      raise TimeoutError from error
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL) as error:
      raise ServerError(f"{address}: {type(error).__name__}: {error}") from error

  def _open(self, ca_file):
    import ssl

    secure: ssl.SSLContext | bool = True
    if ca_file:
      if not pathlib.Path(ca_file).is_file():
        raise ValueError(f"ca_file={ca_file!r}: no such file. Give a PEM file.")
      secure = ssl.create_default_context(cafile=os.fspath(ca_file))
    try:
      return connections_lib.open_client(
        verify=secure, connections=self.connections + 2, clock=self._clock
      )
    except ImportError as error:
      raise ImportError(
        f"rewards of other machines need a package that is not installed ({error}). "
        f"Run: {version.install('remote')}"
      ) from error

  def _start(self):
    """Asks every server who it is; one at least must be there."""
    problems = []
    for server in self._servers:
      try:
        self._introduce(server, time.monotonic())
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


def _refuse_to_open(event, _):
  if event == "connection.connect_tcp.started":
    raise _Opens


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
