#!/usr/bin/env bash
# Reproduce the CIFAR-100 table of the adaptive spans (arXiv:2004.08708), size by size and window by
# window: `train` trains the recipes of configs/span, which validate on a part of the training
# images, and scores each best checkpoint on the test images; `eval` scores given weights on them.
set -euo pipefail

# As we count: GMACs of one image at 32x32, of learned windows at their initial spans.
readonly TABLES='Model|Window|Params|GMACs|Top-1, ours
sa_resnet_small_cnn|3x3 convolution|0.55M|0.052
sa_resnet_small_local|5x5|0.42M|0.036
sa_resnet_small_adaptive|learned|0.42M|0.039
sa_resnet_medium_cnn|3x3 convolution|2.11M|0.234
sa_resnet_medium_local|5x5|1.59M|0.159
sa_resnet_medium_adaptive|learned|1.60M|0.166
sa_resnet_large_cnn|3x3 convolution|3.09M|0.323
sa_resnet_large_local|5x5|2.23M|0.220
sa_resnet_large_adaptive|learned|2.26M|0.230'
readonly RECIPES=configs/span PROCESSES=1 OUTPUT=output/span_table WEIGHTS='' TEST_AFTER=1 DOWNLOADS=1
# The batch of 50 is divided: each of two processes has 25 images, as in the released code.
readonly PROCESS_COUNTS='1 2' DATA_HELP='CIFAR-100, downloaded into this folder if it is not there'
readonly TABLE_NOTE="(ours alone: the paper's accuracies are not known to us)"

# shellcheck source=scripts/_table.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_table.sh"
