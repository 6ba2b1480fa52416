#!/usr/bin/env bash
# Trains QnA-ViT-Tiny on real images from nothing: environment, data, minutes on two CPU cores.
# Further arguments go to train.py.
set -euo pipefail
QNA_TIMM_EXTRAS=${QNA_TIMM_EXTRAS:-train}
start=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
root=$PWD
cd -- "$start" # paths among the arguments, and the run folder, are the caller's
# with no data named, train.py takes the digits and configs/quickstart.yaml's values
exec "$PYTHON" "$root/train.py" "$@"
