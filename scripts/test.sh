#!/usr/bin/env bash
# The whole check of a change: style, tests, which try every recipe, and timm's own tests. Makes its
# environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ruff check .
ruff format --check --quiet .
# two processes with a thread each do more tests a minute than one process with two
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 --dist worksteal
scripts/timm_tests.sh
