"""The text-rendering reward: how much of the wanted text an OCR model reads off the image."""

import collections
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent import futures
import functools
import os
import re
from typing import Any
import unicodedata

from jaxtyping import Float32, UInt8
import numpy as np

from tpgrpo_jax import registry, types, version
from tpgrpo_jax.cost import onnx_flops

# Measured on one thread, 24x48 and 24x64 images: a batch of 8 costs 8 to 16 % less than single
# images, and larger ones gain nothing more.
_BATCH = 8
# What opens after a digit is an inch mark, and so is what stands alone behind one. CSV doubles its quotes.
_DOUBLED = re.compile(r'(?<!")""(?=[^"\s])(.*?[^"\s])""(?!")')
_TWICE = re.compile(r"(?<!')''(?=[^'\s])([^']*[^'\s])''(?!')")
_QUOTED = re.compile(
  r"(?<!\d)(?!(?<=\d\s)\"\s)[\"＂“”„«»‹›「『]([^\"＂“”«»‹›「」『』]*)[\"＂“”«»‹›」』]"
)
# An apostrophe stands after a letter, and closes nothing before one; nor do decades, 'n' and 'Tis open.
_SINGLE = re.compile(
  r"(?<![^\s(\[{:,;-])['‘‚](?!\d0s\b|[tT](?:is|was)\b|[nN]['’](?:\s|$)|(?:[cC]ause|[tT]il|[eE]m)\s)(?=\S)(.*?\S)"
  r"['’‘](?=$|[\s.,;:!?)\]}-])"
)
_FOLDED = str.maketrans(
  {**dict.fromkeys("‘’‚‛′`´", "'"), **dict.fromkeys("“”„‟«»″", '"')} | dict.fromkeys("‐‑‒–—―−", "-")
)


def make(
  *, workers: int = 0, detect: bool = False, rule: str = "edit_distance", text_score: float = 0.0
) -> types.RewardFn:
  """Makes the reward 1 - min(distance(read, target), |target|) / |target|, between 0 and 1.

  Whitespace and case do not count, nor do Unicode's compatibility forms (full-width digits). The
  target is what `target_text` says. The OCR model is PP-OCR by way of rapidocr. An image's score
  does not depend on the batch that it is in, nor on the number of workers.

  Source: Flow-GRPO (arXiv 2505.05470). Its code also gives 1 whenever the target occurs within what
  was read; rule="flow_grpo" with detect=True and text_score=0.5 (PaddleOCR's) does as it does.

  Args:
    workers: threads, each reading one image or small batch at a time; 0 is one per CPU core that this process
      may use.
    detect: find the lines of text first, then read each; without it the whole image is taken as one
      line, which is far cheaper and right for pictures of single words.
    rule: a name of RULES, the score of two strings.
    text_score: lines read with less confidence than this count as not read.

  Returns:
    (images uint8 [N, H, W, 3] RGB, prompts, metadata) -> (scores float32 [N], info), where info has
    "text", the N strings read, and "exact" float32 [N], 1 where the whole text is right.

  Raises:
    ValueError: an option out of its range, or, from the reward, a prompt without target text.
    ImportError: the OCR packages are not installed.
  """
  if type(workers) is not int or workers < 0:
    raise ValueError(f"workers={workers!r}: must be an integer >= 0. 0 is one per core.")
  if not isinstance(detect, bool):
    raise ValueError(f"detect={detect!r}: must be True or False.")
  if isinstance(text_score, str) or not 0.0 <= text_score <= 1.0:
    raise ValueError(f"text_score={text_score!r}: must be in [0, 1]. 0 keeps every line.")
  registry.check(rule, RULES, field="rule")
  engine = _load_engine(detect)
  # Threads, not processes: onnxruntime releases the GIL and takes 98 % of the time, so that two
  # threads on two cores are twice as fast as one. They share one copy of the weights.
  pool = futures.ThreadPoolExecutor(workers or _allowed_cores(), thread_name_prefix="ocr")
  read = _read_scenes if detect else _read_lines

  def check(prompt: str, metadata: Mapping[str, Any]) -> str:
    target = normalize(target_text(prompt, metadata))
    if not target:
      raise ValueError(
        f"prompt={prompt!r}: the text to render is empty. Put it between double quotes in the prompt, or "
        'in the prompt\'s metadata as "text".'
      )
    return target

  def reward(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
  ) -> tuple[Float32[np.ndarray, " N"], dict[str, Any]]:
    targets = [check(p, m) for p, m in zip(prompts, metadata, strict=True)]
    texts = read(engine, pool, images, text_score)
    pairs = [(normalize(text), target) for text, target in zip(texts, targets, strict=True)]
    scores = np.asarray([RULES[rule](text, target) for text, target in pairs], np.float32)
    exact = np.asarray([text == target for text, target in pairs], np.float32)
    return scores, {"text": texts, "exact": exact}

  reward.check = check  # pyright: ignore[reportFunctionMemberAccess]
  reward.survey = functools.partial(survey, lambda: _alphabet(engine))  # pyright: ignore[reportFunctionMemberAccess]
  if not detect:  # else what there is to do depends on the lines that are found
    reward.flops = functools.cache(functools.partial(_flops, engine))  # pyright: ignore[reportFunctionMemberAccess]
  return reward


def survey(alphabet: Callable[[], Set[str]], prompts: Sequence[types.Prompt]) -> list[str]:
  """What is probably not meant in a set of prompts, a line each: no quoted text, unreadable characters.

  Args:
    alphabet: gives the characters that the reader knows, as `normalize` leaves them.
    prompts: all that will be scored.
  """
  lines, count = [], len(prompts)
  whole = [p.text for p in prompts if "text" not in p.metadata and quoted_text(p.text) is None]
  if whole:
    lines.append(
      f"{len(whole):,} of {count:,} prompts have no quoted text, so all of each is the text to render, such "
      f'as {whole[0][:60]!r}. Quote the text in the prompt, or name it in its metadata as "text".'
    )
  asked = collections.Counter(c for p in prompts for c in {*normalize(target_text(*p))})
  if unknown := asked.keys() - alphabet():
    most = sorted(unknown, key=lambda c: (-asked[c], c))
    named = ", ".join(f"{c!r} (in {asked[c]:,})" for c in most[:8])
    more = f" and {len(most) - 8} more" if len(most) > 8 else ""
    lines.append(
      f"the reader does not know the characters {named}{more}: prompts that ask for them cannot reach 1."
    )
  return lines


def quoted_text(prompt: str) -> str | None:
  """What a prompt quotes: the first text in double quotes, else the first in single ones; None for none."""
  prompt = prompt.replace('\\"', '"')
  inner = prompt[1:-1]
  is_field = re.fullmatch(r'".*"".*"', prompt, re.DOTALL)  # of CSV, as a whole
  if is_field or (re.fullmatch(r'"[^"]*"', prompt) and _SINGLE.search(inner)):
    prompt = inner
  prompt = _TWICE.sub(r'"\1"', _DOUBLED.sub(r'"\1"', prompt))
  quoted = _QUOTED.findall(prompt)
  if quoted:
    return next(filter(str.strip, quoted), quoted[0])
  found = _SINGLE.search(prompt)
  return found.group(1) if found else None


def target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
  """The text to show: metadata["text"], else what the prompt quotes, else the whole prompt.

  Args:
    prompt: what the generator was asked; see `quoted_text`.
    metadata: of this prompt.

  Raises:
    ValueError: metadata["text"] is not a string.
  """
  if "text" in metadata:
    if not isinstance(metadata["text"], str):
      raise ValueError(
        f"prompt={prompt!r}: its metadata has text={metadata['text']!r}: must be a string. "
        "Quote it in the data file."
      )
    return metadata["text"]
  quoted = quoted_text(prompt)
  return prompt if quoted is None else quoted


def normalize(text: str) -> str:
  """The text without whitespace, case and compatibility forms: "７" and "ﬁ" become "7" and "fi".

  Nor do typographic quotes and dashes differ from plain ones.
  """
  # Before NFKC, which makes a space and an accent of some.
  plain = unicodedata.normalize("NFKC", text.translate(_FOLDED)).translate(_FOLDED)
  return "".join(plain.casefold().split())


def edit_similarity(read: str, target: str) -> float:
  """1 - min(d, n) / n, with d the Levenshtein distance and n = |target|; in [0, 1].

  Args:
    read: what was read, normalized.
    target: what should have been read, normalized and not empty.
  """
  from rapidfuzz.distance import Levenshtein

  return 1.0 - min(Levenshtein.distance(read, target), len(target)) / len(target)


def edit_similarity_or_contained(read: str, target: str) -> float:
  """1 if `target` occurs anywhere in `read`, else `edit_similarity`; Flow-GRPO's code, ocr.py."""
  return 1.0 if target in read else edit_similarity(read, target)


RULES: dict[str, Callable[[str, str], float]] = {
  "edit_distance": edit_similarity,
  "flow_grpo": edit_similarity_or_contained,
}


def _allowed_cores():
  """Those that this process may use, which under a scheduler or in a container are not all."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # not Linux
    return os.cpu_count() or 1


def _load_engine(detect):
  try:
    import onnxruntime  # noqa: F401  (rapidocr asks for it only when the first image is read)
    import rapidfuzz  # noqa: F401
    import rapidocr
  except ImportError as error:
    raise ImportError(
      f"the ocr reward needs packages that are not installed ({error}). "
      f"Run: {version.install('ocr')}"
    ) from error
  return rapidocr.RapidOCR(
    params={
      "Global.log_level": "critical",
      "Global.use_cls": False,  # no upside-down lines: Flow-GRPO leaves the classifier out too
      "Global.text_score": 0.0,  # applied here, to lines with and without detection alike
      "Rec.rec_batch_num": _BATCH,
      # The default pads every line to width 320, which triples the cost of a 24x48 image. Here
      # a line is as wide as its own aspect ratio says, and at least square.
      "Rec.rec_img_shape": [3, 48, 320 if detect else 48],
      "EngineConfig.onnxruntime.intra_op_num_threads": 1,
      "EngineConfig.onnxruntime.inter_op_num_threads": 1,
      # Reusing memory gains 1 % (batches of 4) to 16 % (of 32) where all shapes are equal; with
      # shapes that vary, as those of detected lines do, the memory kept would grow.
      "EngineConfig.onnxruntime.enable_cpu_mem_arena": not detect,
    }
  )


def _alphabet(engine):
  """The characters that the reader knows, as `normalize` leaves them."""
  _recognize(engine, [np.zeros((8, 8, 3), np.uint8)] * _BATCH)  # opens the model
  return set(normalize("".join(engine.text_rec.postprocess_op.character)))


def _flops(engine, height, width):
  """Operations of reading one picture of this size as one line."""
  image = np.zeros((height, width, 3), np.uint8)
  _recognize(engine, [image] * _BATCH)  # opens the model
  reader = engine.text_rec
  _, tall, wide = reader.rec_image_shape
  line = reader.resize_norm_img(image, max(wide / tall, width / height))
  return onnx_flops.count(reader.session.session._model_path, line[None])


def _read_lines(engine, pool, images, text_score):
  """One line of text per image."""
  images = np.ascontiguousarray(images[..., ::-1])  # PP-OCR was trained on BGR

  def read(start):
    chunk = list(images[start : start + _BATCH])
    count = len(chunk)
    # Always full batches: kernels are chosen by shape and round differently, so that an image in a
    # short batch could, on a close call, be read differently from the same image in a full one.
    lines, confidences = _recognize(engine, chunk + chunk[-1:] * (_BATCH - count))
    return [t if c >= text_score else "" for t, c in zip(lines[:count], confidences)]

  chunks = pool.map(read, range(0, len(images), _BATCH))
  return [text for chunk in chunks for text in chunk]


def _recognize(engine, chunk):
  # RapidOCR.__call__ takes one image; this method of it, not in its manual, takes a batch.
  result = engine.recognize_txt(chunk)
  return result.txts, result.scores


def _read_scenes(engine, pool, images, text_score):
  """All lines of text found in each image, from top to bottom, joined by spaces."""

  def read(image):
    result = engine(np.ascontiguousarray(image[..., ::-1]))
    if result.txts is None:
      return ""
    lines: list[str] = [t for t, c in zip(result.txts, result.scores) if c >= text_score]
    return " ".join(lines)

  return list(pool.map(read, images))
