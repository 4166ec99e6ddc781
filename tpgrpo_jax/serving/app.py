"""The server's paths, as an ASGI application: /compute, /health, /metrics, and Flow-GRPO's root."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
import contextlib
import functools
import json
import logging
import secrets
import time
from typing import Any, NamedTuple

from tpgrpo_jax.rewards import flow_grpo_wire, tokens, wire
from tpgrpo_jax.serving import scorer as scorer_lib
from tpgrpo_jax.serving import telemetry as telemetry_lib

log = logging.getLogger(__name__)

CANARY_EVERY = 60.0  # seconds between two canaries, asked when somebody looks at /health


class Rules(NamedTuple):
  """What a server takes.

  Attributes:
    limits: of a request.
    token: that requests must carry; "" for none.
    waiting: requests that are held at the same time, scored or not; more are told to come again.
    held: bytes of their bodies together.
    upload: seconds that a body may take to arrive.
  """

  limits: wire.Limits = wire.Limits()
  token: str = ""
  waiting: int = 128
  held: int = 2**30
  upload: float = 60.0


class _Load:
  """What is held now; touched by the event loop alone."""

  def __init__(self):
    self.requests = 0
    self.bytes = 0


class _Refusal(Exception):
  """A request that is answered with a status other than 200."""

  def __init__(self, status: int, message: str, **headers: str):
    super().__init__(message)
    self.status, self.headers = status, headers


def make_app(
  scorers: Mapping[str, scorer_lib.Scorer],
  rules: Rules = Rules(),
  versions: Mapping[str, Any] | None = None,
) -> Any:
  """Makes the application.

  Args:
    scorers: label -> its workers, which the application's end closes.
    rules: of the server.
    versions: label -> what /health says of the reward.

  Returns:
    A starlette application.
  """
  from starlette import applications, responses, routing

  logging.getLogger("python_multipart").setLevel(
    logging.ERROR
  )  # anyone can fill a log with bad forms
  instance = secrets.token_hex(8)  # another one after every start
  load, telemetry = _Load(), telemetry_lib.Telemetry(scorers, lambda: load.requests)

  async def compute(request):
    body, scorer = await _admit(request, scorers, rules, load)
    kind = request.headers.get("content-type", "")
    parse = functools.partial(wire.decode_request, body, kind, rules.limits)
    scored = await _wait(scorer, parse, telemetry)
    return responses.Response(wire.encode_answer(*scored), media_type=wire.JSON)

  async def flow_grpo(request):
    body, scorer = await _admit(request, scorers, rules, load)
    said: list[Any] = []

    def parse():
      batches, metadata = flow_grpo_wire.decode_request(body, rules.limits)
      said.append(metadata)
      return batches

    scored = await _wait(scorer, parse, telemetry)
    answer = flow_grpo_wire.encode_answer(scored.scores, scored.info, said[0])
    return responses.Response(answer, media_type="application/octet-stream")

  async def health(request):
    problems = {label: scorer.problem for label, scorer in scorers.items() if scorer.problem}
    status: dict[str, Any] = {"status": "failing" if problems else "ok"}
    status |= {"service": "tpgrpo_jax", "protocol": wire.PROTOCOL, "instance": instance}
    for scorer in scorers.values():
      if scorer.is_canary_due(CANARY_EVERY):
        asyncio.get_running_loop().run_in_executor(None, scorer.check_canary)
    if tokens.is_authorized(request.headers.get("authorization"), rules.token):
      status |= _about(scorers, rules, load, versions or {})
    return responses.JSONResponse(status, 503 if problems else 200)

  async def metrics(request):
    _authorize(request, rules)
    return responses.Response(*telemetry.page())

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    for scorer in scorers.values():
      await asyncio.to_thread(scorer.close)

  handle = functools.partial(
    _answered, load=load, telemetry=telemetry, rules=rules, instance=instance
  )
  return applications.Starlette(
    routes=[
      routing.Route("/compute", handle(compute), methods=["POST"]),
      routing.Route("/", handle(flow_grpo), methods=["POST"]),
      routing.Route("/health", health, methods=["GET"]),
      routing.Route("/metrics", handle(metrics), methods=["GET"]),
    ],
    lifespan=lifespan,
  )


def _answered(
  handler: Callable[[Any], Awaitable[Any]],
  *,
  load: _Load,
  telemetry: telemetry_lib.Telemetry,
  rules: Rules,
  instance: str,
) -> Callable[[Any], Awaitable[Any]]:
  """The handler with every failure turned into an answer {"error": ...}, counted, and logged if ours.

  Every answer says which server gave it.
  """
  from starlette import requests, responses

  async def answer(request):
    request.state.held, began = 0, time.perf_counter()
    headers: dict[str, str] = {}
    who = {wire.INSTANCE: instance}
    try:
      response = await handler(request)
      status = response.status_code
    except (_Refusal, wire.BadRequest) as error:
      status, message = error.status, str(error)
      headers = getattr(error, "headers", {})
    except requests.ClientDisconnect:
      status, message = 499, "the client left"
    except Exception as error:
      log.exception("%s: a request could not be scored", request.url.path)
      status, message = 500, f"{type(error).__name__}: {error}"
    finally:
      if request.state.held:
        load.requests -= 1
        load.bytes -= request.state.held
    label = request.query_params.get("reward", "")
    telemetry.count(label, status, time.perf_counter() - began)
    if status == 200:
      response.headers.update(who)
      return response
    await _drain(request, rules)
    content = json.dumps({"error": message}).encode()
    return responses.Response(
      content, status if status != 499 else 400, headers | who, media_type=wire.JSON
    )

  return answer


async def _admit(request, scorers, rules, load):
  """(the body, the scorer that the request asks for), when there is room for it."""
  _authorize(request, rules)
  label = request.query_params.get("reward", "")
  if not label and len(scorers) > 1:
    raise _Refusal(404, f"which reward? Add ?reward= with one of {', '.join(scorers)}.")
  label = label or next(iter(scorers))
  if label not in scorers:
    raise _Refusal(404, f"no reward {label[:80]!r} here, but {', '.join(scorers)}.")
  scorer = scorers[label]
  if scorer.problem:
    raise _Refusal(503, f"the reward {label!r} is not well: it {scorer.problem}.")
  size = _size(request, rules)
  if load.requests >= rules.waiting or load.bytes + size > rules.held:
    again = {"Retry-After": "1"}
    raise _Refusal(503, f"{load.requests} requests wait already. Come again in a second.", **again)
  load.requests += 1
  load.bytes += size
  request.state.held = size
  try:
    async with asyncio.timeout(rules.upload):
      return await _read(request, rules), scorer
  except TimeoutError as error:
    raise _Refusal(408, f"the body took more than {rules.upload:g} s to arrive.") from error


def _authorize(request, rules):
  if not tokens.is_authorized(request.headers.get("authorization"), rules.token):
    raise _Refusal(401, "the token is missing or wrong.", **{"WWW-Authenticate": "Bearer"})


def _size(request, rules):
  """Bytes to keep room for: those that the request says it has, else the most that it may have."""
  most = rules.limits.body
  said = request.headers.get("content-length", "")
  if not said.isdecimal():
    return most
  if len(said) > 18 or int(said) > most:
    raise _Refusal(
      413, f"a body of {said[:18]} bytes: at most {most}. Send fewer pictures at once."
    )
  return max(int(said), 1)


async def _read(request, rules):
  most = rules.limits.body
  parts: list[bytes] = []
  size = 0
  async for part in request.stream():
    size += len(part)
    if size > most:
      raise _Refusal(413, f"a body of more than {most} bytes. Send fewer pictures at once.")
    parts.append(part)
  return b"".join(parts)


async def _drain(request, rules):
  """Takes in what is still sent, unkept, so that the answer is heard; not more than a body may have."""
  left = rules.limits.body
  with contextlib.suppress(Exception):
    async with asyncio.timeout(rules.upload / 6):
      async for part in request.stream():
        left -= len(part)
        if left < 0:
          break


async def _wait(scorer, parse, telemetry) -> scorer_lib.Scored:
  def counted():
    batches = parse()
    telemetry.count_pictures(scorer.label, sum(len(batch.rows) for batch in batches))
    return batches

  return await asyncio.wrap_future(scorer.submit(counted))


def _about(scorers, rules, load, versions):
  return {
    "forms": ["json", "multipart"],
    "rewards": {
      label: {
        "canary": scorer.problem or ("ok" if scorer.canary is not None else "none"),
        **versions.get(label, {}),
      }
      for label, scorer in scorers.items()
    },
    "limits": rules.limits._asdict(),
    "requests": {"held": load.requests, "at_most": rules.waiting},
  }
