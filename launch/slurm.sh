#!/usr/bin/env bash
# Runs a recipe under SLURM, one process per GPU; JAX finds the processes of the job by itself.
#
#   sbatch launch/slurm.sh configs/sd35m_ocr.py --config.run.dir=/shared/runs/ocr
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --partition=gpu launch/slurm.sh configs/...
#   sbatch --ntasks-per-node=1 launch/slurm.sh configs/...    one process per node, with all of its GPUs
#   DRY_RUN=1 launch/slurm.sh configs/...                     prints what a job would run
#
# Options of sbatch go before this file and replace the lines below; a recipe and its fields go behind it.
# Environment: PYTHON, an interpreter that has the package (.venv/bin/python of the folder sbatch is called in).
#
# Every process must see every GPU of its node, so neither --gpus-per-task nor --gpu-bind.
# TERM@120: 120 s before the time is up the run hears SIGTERM, saves its last finished epoch and exits with
# status 143, and the job is queued again.
#SBATCH --job-name=tpgrpo
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

train=("${PYTHON:-.venv/bin/python}" -m tpgrpo_jax.train --config "${1:-configs/tiny_text.py}" "${@:2}")
# JAX gives task i of a node the GPU i alone, unless this says otherwise.
if [[ "${SLURM_NTASKS_PER_NODE:-8}" == 1 ]]; then
  train=(env JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))" "${train[@]}")
fi
status=0
# When one process ends, the others have 120 s to save and end too.
run srun --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 --wait=120 \
  "${train[@]}" || status=$?

# A job that was cancelled is no longer RUNNING and stays cancelled.
if ((status == 143)) && [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
