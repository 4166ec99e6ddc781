#!/usr/bin/env bash
# Everything that can be measured on a GPU in ten minutes, the most important first:
#
#   bash benchmarks/gpu.sh                     the GPU of this host
#   bash benchmarks/gpu.sh --small             the same code paths with small models, on a CPU too
#   WHEELS=/path/to/folder bash benchmarks/gpu.sh      without a network: installs what is missing from there
#
# Each figure is one JSON line on the terminal as soon as it is known, and in $OUT (default: gpu_figures) as
# figures.jsonl beside the list of the slowest kernels. See benchmarks/gpu.py for the figures and options.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-gpu_figures}
mkdir -p "$out"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"  # the figures are those of one GPU
export PYTHONPATH="$PWD:$PWD/benchmarks:$PWD/$out/packages${PYTHONPATH:+:$PYTHONPATH}"

if [[ -n ${WHEELS:-} ]]; then
  missing=$("$python" benchmarks/wheels.py --names)
  if [[ -n $missing ]]; then
    # shellcheck disable=SC2086
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$out/packages" $missing
  fi
fi
"$python" benchmarks/wheels.py
exec "$python" benchmarks/gpu.py --output "$out" "$@"
