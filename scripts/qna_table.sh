#!/usr/bin/env bash
# Reproduce the table of QnA-ViT (arXiv:2112.11435) row by row and print the paper's top-1 beside
# ours: `train` trains each recipe of configs/qna, `eval` validates published weights.
set -euo pipefail

# Parameters, GFLOPs and top-1 as the README of the paper's code has them.
readonly TABLES='Model|Params|GFLOPs|Paper top-1|Ours
qna_vit_tiny|16M|2.5|81.7
qna_vit_tiny_7x7|16M|2.6|82.0
qna_vit_small|25M|4.4|83.2
qna_vit_base|56M|9.7|83.9
qna_vit_base_384_finetune|56M|-|-'
readonly RECIPES=configs/qna PROCESSES=8 OUTPUT=output/qna_table WEIGHTS=weights
readonly TRAIN_ONLY=qna_vit_base_384_finetune KEPT=qna_vit_base

# The fine-tuned row starts from this script's own run at 224, else from published weights.
train_arguments() {
  [[ $1 == *_finetune ]] || return 0
  local base=$output/qna_vit_base/best.safetensors
  [[ -f $base ]] || base=$weights_dir/qna_vit_base.safetensors
  [[ -f $base || -z $smoke ]] || base=''
  [[ -z $base ]] || arguments+=(--pretrained-path "$base")
}

# shellcheck source=scripts/_table.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_table.sh"
