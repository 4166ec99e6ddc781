#!/usr/bin/env bash
# Runs a recipe on a Cloud TPU slice, one process per host; JAX finds the hosts by itself.
#
#   export NAME=tpgrpo ZONE=us-east5-a ACCELERATOR=v6e-16 RUNTIME=v2-alpha-tpuv6e
#   launch/tpu_pod.sh create                           asks for a queued resource and waits for it
#   launch/tpu_pod.sh install                          this commit and its packages, on all hosts
#   launch/tpu_pod.sh start configs/sd35m_ocr.py --config.run.dir=gs://my-bucket/runs/ocr
#   launch/tpu_pod.sh logs                             follows host 0 (HOST=3: host 3)
#   launch/tpu_pod.sh stop                             the run saves its last finished epoch and exits
#   launch/tpu_pod.sh delete                           gives the TPU back
#
# Environment:
#   NAME, ZONE, ACCELERATOR, RUNTIME   as above; the project is gcloud's own
#   SPOT=1     create: a cheaper slice that can be taken away
#   DRY_RUN=1  prints the commands instead
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NAME:?a name for the TPU}" "${ZONE:?such as us-east5-a}"

run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

queue() { # VERB [FLAG ...]
  run gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

on() { # HOST COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

create() {
  queue create --node-id="$NAME" --accelerator-type="${ACCELERATOR:?such as v6e-16}" \
    --runtime-version="${RUNTIME:?such as v2-alpha-tpuv6e}" ${SPOT:+--spot}
  local state=
  until [[ "$state" == ACTIVE || -n "${DRY_RUN:-}" ]]; do
    sleep 30
    state="$(queue describe --format='value(state.state)')"
    echo "$NAME: $state"
    if [[ "$state" == FAILED || "$state" == SUSPEND* ]]; then
      exit 1
    fi
  done
}

install() {
  local archive=/tmp/tpgrpo_jax.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:$archive" --zone="$ZONE" --worker=all
  # The image's own Python is older than 3.11; uv brings one.
  on all "set -e
    mkdir -p tpgrpo_jax && cd tpgrpo_jax && tar xzf $archive
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --python 3.11 .venv
    ~/.local/bin/uv pip install --python .venv/bin/python -e '.[ocr,gcs,tpu]'"
}

start() {
  local train=(.venv/bin/python -m tpgrpo_jax.train --config "$@")
  on all "set -e
    cd tpgrpo_jax
    if kill -0 \$(cat train.pid) 2>/dev/null; then echo 'already running: stop it first' >&2; exit 1; fi
    nohup ${train[*]@Q} >train.log 2>&1 </dev/null & echo \$! >train.pid"
}

logs() {
  on "${HOST:-0}" "tail -n 100 -f tpgrpo_jax/train.log"
}

stop() {
  on all "kill -TERM \$(cat tpgrpo_jax/train.pid)"
}

delete() {
  queue delete --force --quiet
}

case "${1:-}" in
  create | install | logs | stop | delete) "$1" ;;
  start) start "${@:2}" ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" && exit 2 ;;
esac
