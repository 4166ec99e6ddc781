#!/usr/bin/env bash
# Makes a virtual environment beside the code and runs a recipe on this machine.
#
#   launch/local.sh                                                 the default recipe
#   launch/local.sh configs/tiny_text_tpgrpo.py --config.seed=1     a recipe, with changed fields
#
# Environment: EXTRAS=ocr (comma-separated extras; "ocr,gpu" on a machine with a CUDA GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
recipe="${1:-configs/tiny_text_tpgrpo.py}"
python3 -m venv .venv
.venv/bin/pip install -q -e ".[${EXTRAS:-ocr}]"
exec .venv/bin/python -m tpgrpo_jax.train --config "$recipe" "${@:2}"
