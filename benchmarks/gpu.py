"""All figures of a GPU in ten minutes: bash benchmarks/gpu.sh, or python benchmarks/gpu.py --output FOLDER

Every figure is one JSON line, printed and added to FOLDER/figures.jsonl when it is known. The parts come
in this order, each in a process of its own, so that memory is free again and a part that fails or hangs
takes nothing with it; what --minutes leaves no time for is named and left out.

correctness  on_policy: first log-ratio of an epoch of the tiny model, with the rollout's log-probs and with
             the update's own, in float32 and bfloat16. attention: the kernel of this device and its gradients
             against XLA's in float32. blocks: two SD3.5-Medium blocks and their adapters' gradients against
             the CPU's in float32. All errors are over the largest value.
sd35         SD3.5-Medium at 512 x 512, random weights: matmul_peak, evaluation, rollout with all completions,
             update with blocks rematerialised and without, for several batches; then trace: the kernels that
             one update spends most time in, as text in FOLDER/kernels.txt.
torch        evaluation and update of the same sizes by diffusers and peft, eager and compiled; then ours over
             theirs. The update is W forward and backward passes and one AdamW step.
epoch        vae_decode and pickscore alone, then one microbatch through everything that an epoch does:
             the run's own rollout with decoding, PickScore, the update. images_per_second counts all images.
flux         FLUX.1-dev with int8 weights: the run's own rollout and update.
tiny_text    configs/tiny_text.py to its end, or as far as the time goes: minutes, and the held-out reward
             before and after.

--small takes small models through the same code, on a CPU too.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

SHORTEST = 20.0  # seconds: a part is not begun with less
PARTS = ("correctness", "sd35", "torch", "epoch", "flux", "tiny_text")


def positive(kind: type) -> Callable[[str], Any]:
  """Of argparse: text -> a number above 0."""

  def number(text):
    value = kind(text)
    if not 0 < value < float("inf"):
      raise argparse.ArgumentTypeError(f"{text!r}: must be above 0")
    return value

  number.__name__ = f"positive {kind.__name__}"  # in argparse's own message of what is no number
  return number


def sizes(text: str) -> list[int]:
  """Of argparse: "4,8,16" -> [4, 8, 16]."""
  return [positive(int)(size) for size in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
  """Parses, and runs the parts, or one of them."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", type=pathlib.Path, default="gpu_figures", help="folder")
  parser.add_argument("--minutes", type=positive(float), default=10.0, help="for everything")
  parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in order")
  parser.add_argument(
    "--batches", type=sizes, default=[], help="of sd35, such as 4,8,16; the first one also of torch"
  )
  parser.add_argument(
    "--repeats", type=positive(int), default=3, help="timed rounds of what takes seconds"
  )
  parser.add_argument("--small", action="store_true", help="small models")
  parser.add_argument(
    "--until", type=float, default=0.0, help=argparse.SUPPRESS
  )  # of one part's process
  args = parser.parse_args(arguments)
  args.sizes = args.batches or ([2] if args.small else [4, 8, 16])
  unknown = set(args.parts.split(",")) - {*PARTS}
  if unknown:
    parser.error(f"--parts={args.parts}: {unknown} must be of {', '.join(PARTS)}")
  args.output.mkdir(parents=True, exist_ok=True)
  if args.until:
    import gpu_parts

    gpu_parts.PARTS[args.parts](args)
  else:
    run_parts(args)


def run_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs each part in a process of its own while there is time; returns all figures."""
  until = time.time() + 60 * args.minutes
  figures: list[dict[str, Any]] = []
  with open(args.output / "figures.jsonl", "a") as file:

    def keep(line):
      figures.append(json.loads(line))
      print(line, file=file, flush=True)
      print(line, flush=True)

    for part in args.parts.split(","):
      left = until - time.time()
      if left < SHORTEST:
        keep(json.dumps({"figure": "left_out", "part": part, "why": f"{left:.0f} s were left"}))
        continue
      ended = run_part(args, part, until, keep)
      if ended:
        keep(json.dumps({"figure": "cut", "part": part, "why": ended}))
      if part == "torch":
        for line in compare(figures):
          keep(json.dumps(line))
  return figures


def run_part(args, part, until, keep) -> str:
  """Runs one part and hands on its JSON lines; returns why it ended early, or nothing."""
  command = [sys.executable, __file__, f"--parts={part}", f"--until={until}"]
  command += [f"--output={args.output}", f"--repeats={args.repeats}"]
  command += [f"--batches={','.join(map(str, args.sizes))}"] + ["--small"] * args.small
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
  if part == "torch":
    environment |= {"JAX_PLATFORMS": "cpu"}  # jax only counts operations there
  with open(args.output / f"{part}.log", "w") as log:
    process = subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
    )
    killer = threading.Timer(max(0.0, until - time.time()), process.kill)
    killer.start()
    try:
      for line in process.stdout or ():
        if line.startswith("{"):
          keep(line.strip())
    finally:
      killer.cancel()
      code = process.wait()
  if code < 0:
    return "its time was over" if time.time() >= until - 1 else f"signal {-code}: {part}.log"
  if code:
    words = (args.output / f"{part}.log").read_text().strip().splitlines()
    return f"{words[-1] if words else f'exit status {code}'} ({part}.log)"
  return ""


def compare(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Our seconds over torch's, of the figures that both have at the same batch and remat."""
  key = lambda line, name: (
    name,
    line.get("batch"),
    line.get("remat") if name == "update" else None,
  )
  ours = {
    key(line, name): line["seconds"]
    for line in figures
    for name, figure in (("evaluation", "evaluation_jax"), ("update", "update"))
    if line["figure"] == figure
  }
  return [
    {
      "figure": f"{name}_over_torch",
      "mode": line["mode"],
      "ratio": round(ours[place] / line["seconds"], 3),
      **{k: line.get(k) for k in ("batch", "remat")},
    }
    for line in figures
    for name in ("evaluation", "update")
    if line["figure"] == f"torch_{name}" and (place := key(line, name)) in ours
  ]


if __name__ == "__main__":
  main()
