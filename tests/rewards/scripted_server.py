"""A reward server of Flow-Factory's public form, written from its protocol, that fails when it is told to."""

import base64
import contextlib
import http.server
import io
import json
import socket
import ssl
import threading
import time

import numpy as np
from PIL import Image


def brightness(picture):
  """What it scores: the mean of a PNG, in steps of 1 / 1000."""
  return round(float(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).mean()) / 255, 3)


class Server:
  """A server on a port of its own; `script` are the faults of the next requests to /compute."""

  instance = ""  # sent as X-Instance where there is one
  instances = ()  # behind a balancer
  hello = ""  # "hang" or "drip": what becomes of requests to /health

  def __init__(self, port=0, *, health=None, certificate=None, score=brightness):
    self.health, self.certificate, self.score = health or {"status": "ok"}, certificate, score
    self.port, self.script, self.requests, self.bodies, self.hellos = port, [], 0, [], 0
    self.start()

  def start(self):
    server = self

    class Handler(_Handler):
      owner = server

    self.http = _Listener(("127.0.0.1", self.port), Handler)
    self.port = self.http.server_address[1]
    if self.certificate:
      context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
      self.certificate.configure_cert(context)
      self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
    threading.Thread(
      target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()

  def stop(self):
    """Closes the port and every connection, as a process that is killed does."""
    self.http.shutdown()
    self.http.server_close()
    for each in self.http.open:
      with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)

  def die_for(self, seconds):
    """Stops as if it was killed, and starts again on the same port later."""

    def pause():
      self.stop()
      time.sleep(seconds)
      self.start()

    threading.Thread(target=pause, daemon=True).start()

  def take_turns(self):
    """Called at each request; where there are several instances, each has a turn."""
    if self.instances:
      self.instance = self.instances[0]
      self.instances = [*self.instances[1:], self.instance]
      self.health = self.health | {"instance": self.instance}

  @property
  def url(self):
    return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

  @contextlib.contextmanager
  def running(self):
    try:
      yield self
    finally:
      with contextlib.suppress(OSError):
        self.stop()


class _Listener(http.server.ThreadingHTTPServer):
  daemon_threads, block_on_close = True, False
  request_queue_size = 64

  def __init__(self, *args):
    self.open = []
    super().__init__(*args)

  def get_request(self):
    found = super().get_request()
    self.open.append(found[0])
    return found

  def handle_error(self, request, client_address):
    pass  # whoever asked has gone


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  owner: Server

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.owner.hellos += 1
    self.owner.take_turns()
    if self.owner.hello == "hang":
      time.sleep(20)
    elif self.owner.hello:
      self.drip_before(self.owner.hello)
    else:
      self.answer(200, self.owner.health)

  def do_POST(self):
    owner = self.owner
    body = self.rfile.read(int(self.headers["Content-Length"]))
    owner.requests += 1
    owner.take_turns()
    owner.bodies.append(body)
    fault = owner.script.pop(0) if owner.script else ""
    asked = json.loads(body)
    rewards = [owner.score(base64.b64decode(picture)) for picture in asked["image"]]
    answers = {
      "": lambda: self.answer(200, {"rewards": rewards}),
      "reordered": lambda: self.answer(
        200, {"zebra": [1, 2], "info": {}, "rewards": rewards, "a": None}
      ),
      "short": lambda: self.answer(200, {"rewards": rewards[:-1]}),
      "long": lambda: self.answer(200, {"rewards": [*rewards, 0.5]}),
      "nan": lambda: self.answer(200, {"rewards": [float("nan"), *rewards[1:]]}),
      "infinite": lambda: self.answer(200, {"rewards": [1e999, *rewards[1:]]}),
      "null": lambda: self.answer(200, {"rewards": [None, *rewards[1:]]}),
      "text": lambda: self.answer(200, {"rewards": ["0.5", *rewards[1:]]}),
      "true": lambda: self.answer(200, {"rewards": [True, *rewards[1:]]}),
      "outside": lambda: self.answer(200, {"rewards": [7.5, *rewards[1:]]}),
      "none": lambda: self.answer(200, {"scores": rewards}),
      "nested": lambda: self.answer(200, {"rewards": [rewards]}),
      "error": lambda: self.answer(200, {"error": "CUDA out of memory"}),
      "html": lambda: self.send(200, b"<html><h1>Welcome</h1></html>", "text/html"),
      "deep": lambda: self.send(200, b"[" * 100_000),
      "huge": lambda: self.send(200, b'{"rewards": [' + b"0," * 40_000_000 + b"0]}"),
      "truncated": lambda: self.send(200, json.dumps({"rewards": rewards}).encode(), lost=5),
      "closed": lambda: self.close(),
      "killed": lambda: (owner.die_for(0.3), time.sleep(0.2)),
      "slow": lambda: (time.sleep(0.3), self.answer(200, {"rewards": rewards})),
      "hang": lambda: time.sleep(3),
      "drip": lambda: self.drip(),
      "headers": lambda: self.drip_before("headers"),
      "hints": lambda: self.drip_before("hints"),
      "busy": lambda: self.answer(503, {"error": "come again"}, {"Retry-After": "0.05"}),
      "away": lambda: self.answer(503, {"error": "no upstream"}),
      **{
        str(status): lambda status=status: self.answer(status, {"detail": f"status {status}"})
        for status in (301, 401, 404, 413, 422, 429, 500, 502)
      },
    }
    answers[fault]()

  def answer(self, status, said, headers=None):
    self.send(status, json.dumps(said).encode(), headers=headers)

  def send(self, status, content, kind="application/json", headers=None, lost=0):
    self.send_response(status)
    headers = {"Content-Type": kind, **(headers or {})}
    if self.owner.instance:
      headers["X-Instance"] = self.owner.instance
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    with contextlib.suppress(OSError):  # who asked may have gone
      self.wfile.write(content[: len(content) - lost])
    if lost:
      self.close()

  def close(self):
    self.close_connection = True
    self.wfile.flush()

  def drip(self):
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    with contextlib.suppress(OSError):
      for _ in range(60):
        self.wfile.write(b" ")
        self.wfile.flush()
        time.sleep(0.05)

  def drip_before(self, what):
    """Lines of headers, or whole answers 103, and never the answer."""
    lines = {"headers": b"X-Line: a\r\n", "hints": b"HTTP/1.1 103 Early Hints\r\n\r\n"}
    with contextlib.suppress(OSError):
      self.wfile.write(b"HTTP/1.1 200 OK\r\n" if what == "headers" else b"")
      for _ in range(300):
        self.wfile.write(lines[what])
        self.wfile.flush()
        time.sleep(0.05)
