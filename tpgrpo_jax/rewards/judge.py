"""Judges: models that look at a picture and answer in words, behind an OpenAI-compatible server."""

import base64
from collections.abc import Mapping, Sequence
import json
from typing import Any, NamedTuple

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import types
from tpgrpo_jax.rewards import addresses, judge_templates, servers, wire
from tpgrpo_jax.rewards.combine import RewardError

_PATH = "/v1/chat/completions"


class Verdict(NamedTuple):
  """What a judge said of one picture.

  Attributes:
    question: what it was asked.
    answer: what it said.
    score: what was read from it.
    axes: name -> score, where its template has several.
  """

  question: str
  answer: str
  score: float
  axes: dict[str, float]


def make(
  *,
  url: str | Sequence[str],
  model: str,
  template: str,
  pattern: str = "",
  json_path: str = "",
  low: float | None = None,
  high: float | None = None,
  token_file: str = "",
  ca_file: str = "",
  timeout: float = 120.0,
  connections: int = 8,
  tries: int = 3,
  max_tokens: int = 1024,
) -> types.RewardFn:
  """Makes the reward that a judge gives, such as a vision-language model served by vLLM or SGLang.

  Each picture is one question. An answer without a score is asked for again, a little less predictably each
  time; then the run stops with the answer: no score is made up.

  Args:
    url: of the server, without /v1/chat/completions; of several, which take turns.
    model: its name there.
    template: a name of judge_templates.TEMPLATES, or the path of a text file with {prompt} in it.
    pattern: with a file: regular expression with one group, the score, or with several named ones.
    json_path: with a file, instead: where the score is in the answer's JSON, such as "scores.quality".
    low: the lowest score that can be; needed with a file.
    high: the highest.
    token_file: file of the server's API key.
    ca_file: PEM file of the authority that signed the server's certificate.
    timeout: seconds for one answer.
    connections: questions on their way at the same time.
    tries: how often a picture is asked about before the run stops.
    max_tokens: of an answer.

  Returns:
    (images uint8 [N, H, W, 3], prompts, metadata) -> (scores float32 [N], info with "text", the answers,
    and each axis of the template). `reward.judge(image, prompt, metadata)` gives the Verdict on one.

  Raises:
    ValueError: an option out of its range, or no server with that model.
    RewardError: (the reward) an answer without a score, or one out of its range.
    OSError: (the reward) no answer; another try may go well.
  """
  chosen = judge_templates.choose(template, pattern, json_path, low, high)
  for name, value in (("tries", tries), ("max_tokens", max_tokens)):
    if type(value) is not int or value < 1:
      raise ValueError(f"{name}={value!r}: must be an integer >= 1.")
  urls = [each.removesuffix("/v1") for each in addresses.check_urls(url)]
  pool = servers.Servers(
    urls,
    token_file=token_file,
    ca_file=ca_file,
    timeout=timeout,
    connections=connections,
    verify=lambda pool, address: _check_model(pool, address, model),
  )

  def judge(image: UInt8[np.ndarray, "H W 3"], prompt: str, metadata: Mapping[str, Any]) -> Verdict:
    question = judge_templates.fill(chosen, prompt, metadata)
    pictures = [_edited(metadata), image] if judge_templates.sees_both(chosen) else [image]
    encoded = [base64.b64encode(wire.encode_image(each)).decode() for each in pictures]
    answer = ""
    for attempt in range(tries):
      body = _request(
        model, question, encoded, attempt, {"max_tokens": max_tokens, **chosen.options}
      )
      reply = pool.send("POST", _PATH, body, wire.JSON)
      choice = _choice(reply)
      try:
        score, axes = chosen.read(choice)
      except judge_templates.Unreadable as error:
        answer = str(error)
        continue
      wrong = [each for each in (*axes.values(), score) if not chosen.low <= each <= chosen.high]
      if wrong:
        answer = (
          f"the score {wrong[0]:g}, outside {chosen.low:g} to {chosen.high:g}, in: {_said(choice)}"
        )
        continue
      return Verdict(question, _said(choice), score, axes)
    raise RewardError(
      f"{pool.urls[0]} ({model}) gave no score in {tries} answers about {prompt[:200]!r}; the last one: "
      f"{answer[:600]!r}. Nothing is made up for it. Look at the template, at max_tokens and at the pattern."
    )

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    if not len(prompts):
      return np.zeros(0, np.float32), {}
    asked = zip(images, prompts, metadata, strict=True)
    verdicts = servers.in_parallel(judge, asked, connections)
    info: dict[str, Any] = {"text": [verdict.answer for verdict in verdicts]}
    for name in verdicts[0].axes:
      info[name] = np.asarray([verdict.axes[name] for verdict in verdicts], np.float32)
    return np.asarray([verdict.score for verdict in verdicts], np.float32), info

  reward.judge = judge  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def _edited(metadata):
  """The picture that was to be edited."""
  picture = metadata.get("image")
  if not isinstance(picture, np.ndarray):
    raise RewardError(
      "the judge's template asks about {image}, the picture that was to be edited, and the prompt has none: "
      "the run's model paints from text alone. Use a template without it."
    )
  return picture


def _request(model, question, pictures, attempt, options):
  content: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{each}"}}
    for each in pictures
  ]
  content.append({"type": "text", "text": question})
  request = {
    "model": model,
    "messages": [{"role": "user", "content": content}],
    "temperature": 0.0 if attempt == 0 else 0.3,  # at 0 it would say the same again
    "seed": attempt,
    **options,
  }
  return json.dumps(request).encode()


def _choice(reply) -> Mapping[str, Any]:
  """The one choice of a completion."""
  try:
    (choice, *_) = json.loads(reply.body)["choices"]
    if not isinstance(choice, dict):
      raise TypeError("no object")
    return choice
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise RewardError(
      f"{reply.url}{_PATH} answered {reply.body[:200]!r}: is no chat completion. Is it another server?"
    ) from error


def _said(choice):
  try:
    return judge_templates.text_of(choice)
  except judge_templates.Unreadable:
    return ""


def _check_model(pool, address, model):
  """Raises RewardError where the server lists its models and this one is not among them."""
  listed = pool.ask(address, "GET", "/v1/models", statuses=(200, 404, 405))
  if listed.status != 200:
    return  # a server that lists none
  try:
    names = [each["id"] for each in json.loads(listed.body)["data"]]
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise RewardError(
      f"{address}/v1/models answered {listed.body[:80]!r}: is no OpenAI-compatible server."
    ) from error
  if model not in names:
    raise RewardError(f"{address} has no model {model!r}, but {', '.join(map(str, names))[:300]}.")
