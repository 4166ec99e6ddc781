#!/usr/bin/env bash
# Runs a recipe on this machine, as one process or as several that are one program.
#
#   launch/local.sh                                                 the default recipe
#   launch/local.sh configs/tiny_text.py --config.seed=1            a recipe, with changed fields
#   EXTRAS=ocr,gpu PROCESSES=8 launch/local.sh configs/...          8 processes, a GPU each
#   DEVICES=4 PROCESSES=2 launch/local.sh                           2 processes, 2 virtual CPU devices each
#
# Environment:
#   EXTRAS     comma-separated extras to install into .venv beside the code (ocr; with a CUDA GPU ocr,gpu)
#   PYTHON     an interpreter that has the package already: then nothing is installed
#   PROCESSES  how many processes (1)
#   DEVICES    virtual CPU devices of all processes together; without it process i has GPU i
#
# Process 0 writes here as it is, the others with "[i] " before every line. SIGINT and SIGTERM go to all
# of them; then they save the last finished epoch and exit with status 143. When one
# fails the others are stopped, and its exit status is that of this script.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe="${1:-configs/tiny_text.py}"
processes="${PROCESSES:-1}"
if [[ -z "${PYTHON:-}" ]]; then
  python3 -m venv .venv
  .venv/bin/pip install -q -e ".[${EXTRAS:-ocr}]"
  PYTHON=.venv/bin/python
fi
if [[ -n "${DEVICES:-}" ]]; then
  if ((DEVICES % processes)); then
    echo "DEVICES=$DEVICES: must be a multiple of PROCESSES=$processes." >&2
    exit 2
  fi
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$((DEVICES / processes))"
fi
train=("$PYTHON" -m tpgrpo_jax.train --config "$recipe" "${@:2}")
if ((processes == 1)); then
  exec "${train[@]}"
fi

port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
train+=(--config.distributed.coordinator="localhost:$port" --config.distributed.num_processes="$processes")
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((processes - 1)))}"
if ((${#gpus[@]} < processes)) && [[ -z "${DEVICES:-}" ]]; then
  echo "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: must name a GPU for each of PROCESSES=$processes." >&2
  exit 2
fi

set -m # without it bash makes its children deaf to SIGINT
running=()
asked_to_stop=
# Of bash's own table, which has a process from the moment that it is there.
trap 'asked_to_stop=1; kill -INT $(jobs -p)' INT
trap 'asked_to_stop=1; kill -TERM $(jobs -p)' TERM
for ((i = 0; i < processes; i++)); do
  one=(env CUDA_VISIBLE_DEVICES="${gpus[i]:-}" "${train[@]}" --config.distributed.process_id="$i")
  if ((i == 0)); then
    "${one[@]}" &
  else
    "${one[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
  fi
  running[$!]=$!
done

stop() { # a process that waits for a lost one does not always hear SIGTERM
  kill -TERM "$@"
  sleep 10
  kill -KILL "$@"
} 2>/dev/null
status=0
while ((${#running[@]})); do
  for process in "${running[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      continue
    fi
    code=0
    wait "$process" || code=$?
    unset "running[$process]"
    if ((code && !status)); then
      status=$code
      if [[ -z "$asked_to_stop" ]] && ((${#running[@]})); then
        stop "${running[@]}" &
        stopper=$!
        disown
      fi
    fi
  done
  sleep 0.2
done
if [[ -n "${stopper:-}" ]]; then
  kill -- "-$stopper" 2>/dev/null || true
fi
exit "$status"
