#!/usr/bin/env bash
# Trains QnA-ViT-Tiny on real images from nothing: environment, data, minutes on two CPU cores.
# Further arguments go to train.py.
set -euo pipefail
QNA_TIMM_EXTRAS=${QNA_TIMM_EXTRAS:-train}
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" train.py --config configs/quickstart.yaml "$@"
