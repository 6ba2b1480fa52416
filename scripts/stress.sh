#!/usr/bin/env bash
# Kills, cuts and damage by the hundred, and what came of them: quarter of an hour on two cores.
#   scripts/stress.sh [--quick] [--seed N] [PART...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
OMP_NUM_THREADS=1 exec "$PYTHON" tests/training/stress.py "$@"
