#!/usr/bin/env bash
# Reproduce the table of QnA-ViT (arXiv:2112.11435) row by row and print the paper's top-1 beside
# ours: `train` trains each recipe of configs/qna, `eval` validates published weights.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/qna_table.sh train|eval [options]
  --data-dir DIR     ImageNet: train/ and validation/ (or val/) with class folders
  --rows A,B         only these rows; all of configs/qna otherwise
  --nproc N          processes (GPUs), 1, 2, 4 or 8; 1 if not given
  --weights-dir DIR  published weights: MODEL.safetensors, or the authors' MODEL (file or folder),
                     which is converted; ./weights if not given
  --output DIR       run folders, resumed if they are there; ./output/qna_table if not given
  --smoke            try every row in seconds on tiny data, with fresh weights in eval
PYTHON=... names a Python that has qna_timm; otherwise scripts/_env.sh makes one.
TEXT
}

fail() {
  printf 'qna_table.sh: error: %s\n' "$1" >&2
  exit 2
}

# row | parameters and GFLOPs as the README of the paper's code has them | its top-1
readonly TABLE='qna_vit_tiny|16M|2.5|81.7
qna_vit_tiny_7x7|16M|2.6|82.0
qna_vit_small|25M|4.4|83.2
qna_vit_base|56M|9.7|83.9
qna_vit_base_384_finetune|56M|-|-'
readonly GLOBAL_PROCESSES=8

mode=${1:-}
case $mode in
  train | eval) shift ;;
  -h | --help) usage && exit 0 ;;
  *) fail "expected train or eval first, found '${mode}' (--help shows the usage)" ;;
esac

smoke='' data_dir='' rows='' nproc=1 weights_dir=weights output=''
while (($#)); do
  case $1 in
    --smoke) smoke=1 && shift && continue ;;
    -h | --help) usage && exit 0 ;;
    --data-dir | --rows | --nproc | --weights-dir | --output) ;;
    *) fail "unknown option '$1' (--help shows the usage)" ;;
  esac
  (($# > 1)) || fail "$1 needs a value"
  case $1 in
    --data-dir) data_dir=$2 ;;
    --rows) rows=$2 ;;
    --nproc) nproc=$2 ;;
    --weights-dir) weights_dir=$2 ;;
    --output) output=$2 ;;
  esac
  shift 2
done

all_rows=$(cut -d'|' -f1 <<<"$TABLE")
[[ $mode == train ]] || all_rows=$(grep -v finetune <<<"$all_rows")
selected=${rows:+${rows//,/$'\n'}}
selected=${selected:-$all_rows}
while read -r row; do
  grep -qx -- "$row" <<<"$all_rows" || fail "--rows: no row '$row' in $mode; there are $(paste -sd' ' <<<"$all_rows")"
done <<<"$selected"
[[ $nproc =~ ^(1|2|4|8)$ ]] || fail "--nproc must be 1, 2, 4 or 8 to keep the recipes' global batch, found '$nproc'"
if [[ -z $smoke ]]; then
  [[ -n $data_dir ]] || fail "--data-dir is needed (or --smoke)"
  [[ -d $data_dir ]] || fail "--data-dir: there is no folder '$data_dir'"
  [[ $mode == train || -d $weights_dir ]] || fail "--weights-dir: there is no folder '$weights_dir'"
  data_dir=$(realpath -- "$data_dir")
fi

weights_dir=$(realpath -m -- "$weights_dir")
temporary=''
if [[ -n $smoke ]]; then
  temporary=$(mktemp -d)
  trap 'rm -rf -- "$temporary"' EXIT
  weights_dir=$temporary/weights
  mkdir -p "$weights_dir"
  output=${output:-$temporary/output}
fi
output=$(realpath -m -- "${output:-output/qna_table}")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  # shellcheck source=scripts/_env.sh
  source scripts/_env.sh
fi

# Run a script on $nproc processes.
launch() {
  if ((nproc > 1)); then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$nproc" "$@"
  else
    "$PYTHON" "$@"
  fi
}

# Best top-1 of a finished run, from its summary.csv.
best_top1() {
  "$PYTHON" - "$1" <<'CODE'
import csv
import sys

with open(sys.argv[1], newline="") as file:
    values = [float(row["eval_top1"]) for row in csv.DictReader(file) if row.get("eval_top1")]
print(f"{max(values):.2f}" if values else "not run")
CODE
}

train_row() {
  local row=$1 accumulation
  local arguments=(--config "configs/qna/$row.yaml" --output "$output" --experiment "$row" --resume auto)
  if [[ -n $smoke ]]; then
    arguments+=(--smoke)
  else
    # Fewer processes than the recipe's eight make up for it by accumulation.
    accumulation=$(awk -F': *' '$1 == "grad_accum_steps" {print $2}' "configs/qna/$row.yaml")
    arguments+=(--data-dir "$data_dir")
    arguments+=(--grad-accum-steps $((accumulation * GLOBAL_PROCESSES / nproc)))
  fi
  if [[ $row == *_finetune ]]; then
    local base=$output/qna_vit_base/best.safetensors
    [[ -f $base ]] || base=$weights_dir/qna_vit_base.safetensors
    [[ -f $base || -z $smoke ]] || base=''
    [[ -z $base ]] || arguments+=(--pretrained-path "$base")
  fi
  launch train.py "${arguments[@]}" >&2 || return 1
  best_top1 "$output/$row/summary.csv"
}

# Published weights of a row as safetensors; nothing if there are none.
weights_of() {
  local row=$1 file=$weights_dir/$1.safetensors
  if [[ -n $smoke && ! -f $file ]]; then
    "$PYTHON" - "$row" "$file" >&2 <<'CODE' || return 1
import sys

import timm
from safetensors.torch import save_file

import qna_timm  # noqa: F401

save_file(timm.create_model(sys.argv[1], num_classes=10).state_dict(), sys.argv[2])
CODE
  elif [[ ! -f $file && -e $weights_dir/$row ]]; then
    "$PYTHON" scripts/convert_checkpoint.py "$weights_dir/$row" --model "$row" --out "$file" >&2 || return 1
  fi
  [[ ! -f $file ]] || printf '%s\n' "$file"
}

eval_row() {
  local row=$1 file results
  file=$(weights_of "$row") || return 1
  if [[ -z $file ]]; then
    printf 'qna_table.sh: no %s or %s.safetensors in %s\n' "$row" "$row" "$weights_dir" >&2
    printf 'not run\n'
    return
  fi
  mkdir -p "$output"
  results=$output/$row.eval.json
  local arguments=(--model "$row" --checkpoint "$file" --results-file "$results")
  if [[ -n $smoke ]]; then
    arguments+=(--dataset sklearn/digits --num-classes 10 --img-size 32 --num-samples 32 -b 32 -j 0)
  else
    arguments+=(--data-dir "$data_dir" --img-size 224 --crop-pct 0.875 --interpolation bicubic)
  fi
  launch validate.py "${arguments[@]}" >&2 || return 1
  "$PYTHON" -c 'import json, sys; print(format(json.load(open(sys.argv[1]))["top1"], ".2f"))' "$results"
}

# A row that fails is told in the table and by the exit code; the others still run. (Errors inside
# `if` do not end the functions above by themselves: hence their `|| return 1`.)
failed=0
lines=()
while IFS='|' read -r row parameters gflops paper; do
  grep -qx -- "$row" <<<"$selected" || continue
  printf '== %s %s\n' "$mode" "$row" >&2
  if ours=$("${mode}_row" "$row" </dev/null); then :; else ours=failed failed=1; fi
  lines+=("$(printf '| %-25s | %6s | %6s | %11s | %8s |' "$row" "$parameters" "$gflops" "$paper" "$ours")")
done <<<"$TABLE"

printf '| %-25s | %6s | %6s | %11s | %8s |\n' Model Params GFLOPs 'Paper top-1' 'Ours'
printf '|:--------------------------|-------:|-------:|------------:|---------:|\n'
printf '%s\n' "${lines[@]}"
[[ -z $smoke ]] || printf '(smoke run: two updates or 32 images; "Ours" says nothing but that it ran)\n'
exit "$failed"
