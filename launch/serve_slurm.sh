#!/usr/bin/env bash
# Serves rewards from one node of a SLURM cluster, for runs on other nodes.
#
#   sbatch launch/serve_slurm.sh ocr                                  a reward of the library
#   sbatch --gpus=1 launch/serve_slurm.sh my_judges:make --workers=4  your own, with flags of the server
#   DRY_RUN=1 launch/serve_slurm.sh ocr                               prints what a job would run
#
# Options of sbatch go before this file and replace the lines below.
# Environment:
#   PYTHON      an interpreter that has the package with the extra serve (.venv/bin/python)
#   PORT        8090
#   TOKEN_FILE  the secret that runs must send; made when it is not there (reward.token)
#   URL_FILE    where the address is written, for the runs (reward.url)
#
# A run reads both:  --config.rewards="{'ocr': {'weight': 1.0, 'make': 'remote', 'reward': 'ocr',
#   'url': '$(cat reward.url)', 'token_file': 'reward.token'}}"
# TERM@60: 60 s before the time is up the server takes nothing new, finishes what waits, and ends.
#SBATCH --job-name=rewards
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
rewards="${1:?the rewards to serve, such as ocr}"
token_file="${TOKEN_FILE:-reward.token}"
port="${PORT:-8090}"
serve=("${PYTHON:-.venv/bin/python}" -m tpgrpo_jax.serve --rewards "$rewards"
  --host 0.0.0.0 --port "$port" --token_file "$token_file" --drain 50 "${@:2}")
step=(srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-16}" "${serve[@]}")
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${step[@]}" && echo
  exit
fi
if [[ ! -s "$token_file" ]]; then
  (umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$token_file")
fi
echo "http://$(hostname -f):$port" >"${URL_FILE:-reward.url}"
exec "${step[@]}"
