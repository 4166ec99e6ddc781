"""Serves rewards to runs on other machines: python -m tpgrpo_jax.serve --rewards ocr --port 8090"""

import json

from absl import flags

from tpgrpo_jax import command

_REWARDS = flags.DEFINE_list("rewards", [], 'Names, or your own "package.module:make".')
_OPTIONS = flags.DEFINE_string("options", "", """JSON: '{"ocr": {"detect": true}}'.""")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address; others need a token.")
_PORT = flags.DEFINE_integer("port", 8090, "Port; 0 takes a free one.", 0, 65535)
_TOKEN = flags.DEFINE_string("token_file", "", "File with the token that clients must send.")
_CERTIFICATE = flags.DEFINE_string("tls_certificate", "", "PEM file: serve HTTPS.")
_KEY = flags.DEFINE_string("tls_key", "", "PEM file of its private key.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Requests of a reward scored at once; 0: two.", 0)
_WAITING = flags.DEFINE_integer("waiting", 128, "Requests held; more are told to come again.", 1)
_BODY = flags.DEFINE_integer("body_mib", 64, "Size of a request.", 1)
_TIMEOUT = flags.DEFINE_float("timeout", 600.0, "Seconds a reward may take for a request.", 0.001)
_DRAIN = flags.DEFINE_integer("drain", 60, "Seconds to finish what waits, after SIGTERM.", 0)


def main(argv: list[str]) -> None:
  """Parses, validates and calls."""
  command.refuse_arguments(argv)
  from tpgrpo_jax.serving import listen

  listen.check_address(_HOST.value, _TOKEN.value, _CERTIFICATE.value, _KEY.value)
  listen.check_packages()
  from tpgrpo_jax.rewards import tokens, wire
  from tpgrpo_jax.serving import app, build

  specs = build.read_specs(_REWARDS.value, _OPTIONS.value)
  token = tokens.read_token(_TOKEN.value, "--token_file") if _TOKEN.value else ""
  if not build.uses_devices(specs):
    build.stay_on_cpu()
  scorers = build.open_scorers(specs, workers=_WORKERS.value, timeout=_TIMEOUT.value)
  limits = wire.Limits(body=_BODY.value * 2**20)
  rules = app.Rules(limits=limits, token=token, waiting=_WAITING.value)
  canaries = {label: "ok" if each.canary else "none" for label, each in scorers.items()}
  listen.serve(
    app.make_app(scorers, rules, build.versions(specs)),
    host=_HOST.value,
    port=_PORT.value,
    tls=(_CERTIFICATE.value, _KEY.value),
    drain=_DRAIN.value,
    ready=f"serves {', '.join(scorers)} (canaries: {json.dumps(canaries)})",
  )


if __name__ == "__main__":
  command.run(main)
