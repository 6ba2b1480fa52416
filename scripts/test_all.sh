#!/usr/bin/env bash
# scripts/test.sh, with timm's tests on every model name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/test.sh
scripts/timm_tests.sh --all
