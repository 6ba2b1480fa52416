#!/usr/bin/env bash
# scripts/test.sh, then the tests that it leaves out (mostly recipes) and timm's tests on every model name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/test.sh
source scripts/_env.sh
"$PYTHON" -m pip install --quiet --disable-pip-version-check onnxscript onnxruntime
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 -m thorough
scripts/timm_tests.sh --all
