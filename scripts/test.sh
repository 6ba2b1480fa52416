#!/usr/bin/env bash
# The whole check of a change: style, tests, which try a recipe of each kind, and timm's own tests.
# Makes its environment.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ruff check .
ruff format --check --quiet .
# processes of one thread each do more tests a minute than one of two threads; many of them wait for
# files and signals, so that a third has something to do on two processors
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 3 --dist worksteal -m "not thorough"
scripts/timm_tests.sh
