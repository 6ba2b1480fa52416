# shellcheck shell=bash disable=SC2154
# Sourced, last of all, by the scripts that reproduce a paper's tables: reads their options, trains
# or validates row by row, prints the paper's figures beside ours. Such a script sets
#   RECIPES     folder of the recipes, whose names are the rows'
#   PROCESSES   processes that the recipes' grad_accum_steps are meant for
#   TABLES      lines of |-parted fields, a blank line between tables: the names of the columns, then
#               the rows; the first field is the row's name, or - where there is nothing to run, and
#               the last column, ours, is left out
#   OUTPUT      folder of the run folders unless --output names one
#   WEIGHTS     the same for --weights-dir; empty for the run folders
#   TRAIN_ONLY  pattern of rows that only `train` runs (may be empty)
#   KEPT        row whose run another one starts from: a smoke run keeps its files (may be empty)
#   DATA_HELP   what --data-dir is, in the help; ImageNet's folders if not set
#   PROCESS_COUNTS  numbers of processes that --nproc takes; 1 2 4 8 if not set
#   TEST_AFTER  not empty where recipes validate on a part of the training images: `train` scores what
#               it has trained as `eval` does, on the test images
#   DOWNLOADS   not empty where recipes fetch the data: the folder need not be there
#   TABLE_NOTE  a line below the tables
# and may define train_arguments ROW, which adds to the array `arguments` of train.py.

script=$(basename -- "$0")
data=${DATA_HELP:-'ImageNet: train/ and validation/ (or val/) with class folders'}
nprocs=${PROCESS_COUNTS:-1 2 4 8}

usage() {
  cat <<TEXT
usage: scripts/$script train|eval [options]
  --data-dir DIR     $data
  --rows A,B         only these rows, or patterns of them; all of the table otherwise
  --nproc N          processes (GPUs), one of $nprocs; 1 if not given
  --weights-dir DIR  weights to validate: ROW.safetensors, a run folder ROW, or the authors' ROW (file
                     or folder), which is converted; ./${WEIGHTS:-$OUTPUT} if not given
  --output DIR       run folders, resumed if they are there; ./$OUTPUT if not given
  --smoke            try every row in seconds on tiny data, with fresh weights in eval
Rows are the recipes of $RECIPES.
PYTHON=... names a Python that has qna_timm; otherwise scripts/_env.sh makes one.
TEXT
}

fail() {
  printf '%s: error: %s\n' "$script" "$1" >&2
  exit 2
}

mode=${1:-}
case $mode in
  train | eval) shift ;;
  -h | --help) usage && exit 0 ;;
  *) fail "expected train or eval first, found '${mode}' (--help shows the usage)" ;;
esac

smoke='' data_dir='' rows='' nproc=1 weights_dir='' output=''
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

all_rows=()
heading=1
while IFS='|' read -r row _; do
  if [[ -z $row ]]; then
    heading=1 && continue
  elif [[ -z $heading && $row != - && ! ($mode == eval && $row == "${TRAIN_ONLY:-}") ]]; then
    all_rows+=("$row")
  fi
  heading=''
done <<<"$TABLES"

declare -A selected=()
IFS=',' read -ra patterns <<<"${rows:-*}"
for pattern in "${patterns[@]}"; do
  found=''
  for row in "${all_rows[@]}"; do
    # shellcheck disable=SC2053
    [[ $row != $pattern ]] || selected[$row]=1 found=1
  done
  [[ -n $found ]] || fail "--rows: no row '$pattern' in $mode; there are ${all_rows[*]}"
done
[[ $nproc =~ ^(${nprocs// /|})$ ]] || fail "--nproc must be one of $nprocs to keep the recipes' global batch, found '$nproc'"
weights_dir=${weights_dir:-${WEIGHTS:-${output:-$OUTPUT}}}
if [[ -z $smoke ]]; then
  [[ -n $data_dir ]] || fail "--data-dir is needed (or --smoke)"
  [[ -d $data_dir || -n ${DOWNLOADS:-} ]] || fail "--data-dir: there is no folder '$data_dir'"
  [[ $mode == train || -d $weights_dir ]] || fail "--weights-dir: there is no folder '$weights_dir'"
  data_dir=$(realpath -m -- "$data_dir")
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
output=$(realpath -m -- "${output:-$OUTPUT}")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON:-} ]]; then
  # shellcheck source=scripts/_env.sh
  source scripts/_env.sh
fi

# A key's value in a row's recipe, as words: a list's without brackets, a mapping's as KEY=VALUE.
recipe_value() {
  awk -F': *' -v key="$2" '$1 == key {sub(/^[^:]*: */, ""); print}' "$RECIPES/$1.yaml" |
    sed 's/ *#.*//; s/[][{}",]//g; s/: */=/g'
}

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

# Let a row's dataset be downloaded; into the array `arguments`.
download_arguments() {
  [[ $(recipe_value "$1" dataset) != torch/* ]] || arguments+=(--dataset-download)
}

train_row() {
  local row=$1
  local arguments=(--config "$RECIPES/$row.yaml" --output "$output" --experiment "$row" --resume auto)
  if [[ -n $smoke ]]; then
    arguments+=(--smoke)
  else
    # The recipe's global batch, whatever the number of processes: by accumulation, or, where there
    # are fewer batches than processes, in smaller ones.
    local batch steps=$(($(recipe_value "$row" grad_accum_steps) * PROCESSES))
    arguments+=(--data-dir "$data_dir")
    if ((steps >= nproc)); then
      arguments+=(--grad-accum-steps $((steps / nproc)))
    else
      batch=$(recipe_value "$row" batch_size)
      arguments+=(--grad-accum-steps 1 --batch-size $((batch * steps / nproc)))
    fi
    download_arguments "$row"
  fi
  if declare -F train_arguments >/dev/null; then
    train_arguments "$row"
  fi
  launch train.py "${arguments[@]}" >&2 || return 1
  if [[ -n ${TEST_AFTER:-} ]]; then
    score "$row" "$output/$row/best.safetensors" || return 1
  else
    best_top1 "$output/$row/summary.csv" || return 1
  fi
  # Never without --smoke, where $temporary is empty.
  if [[ -n $temporary && $output == "$temporary"/* && $row != "${KEPT:-}" ]]; then
    rm -rf -- "${output:?}/$row" # a GB for a large model
  fi
}

# Weights of a row in a form that validate.py reads; nothing if there are none.
weights_of() {
  local row=$1 file=$weights_dir/$1.safetensors
  if [[ -n $smoke && ! -f $file ]]; then
    "$PYTHON" - "$RECIPES/$row.yaml" "$file" >&2 <<'CODE' || return 1
import sys

import timm
import yaml
from safetensors.torch import save_file

import qna_timm  # noqa: F401

with open(sys.argv[1], encoding="utf-8") as file:
    recipe = yaml.safe_load(file)
model = timm.create_model(recipe["model"], num_classes=10, **recipe.get("model_kwargs", {}))
save_file(model.state_dict(), sys.argv[2])
CODE
  elif [[ ! -f $file && -f $weights_dir/$row/best.safetensors ]]; then
    file=$weights_dir/$row/best.safetensors
  elif [[ ! -f $file && -e $weights_dir/$row ]]; then
    "$PYTHON" scripts/convert_checkpoint.py "$weights_dir/$row" \
      --model "$(recipe_value "$row" model)" --out "$file" >&2 || return 1
  fi
  [[ ! -f $file ]] || printf '%s\n' "$file"
}

eval_row() {
  local row=$1 file
  file=$(weights_of "$row") || return 1
  if [[ -z $file ]]; then
    printf '%s: no %s or %s.safetensors in %s\n' "$script" "$row" "$row" "$weights_dir" >&2
    printf 'not run\n'
    return
  fi
  score "$row" "$file" || return 1
  [[ -z $smoke ]] || rm -f -- "$file"
}

# Top-1 of a row's weights on the validation images, or test images of a dataset that has them.
score() {
  local row=$1 file=$2 results=$output/$1.eval.json dataset key model_kwargs
  mkdir -p "$output"
  local arguments=(--model "$(recipe_value "$row" model)" --checkpoint "$file" --results-file "$results")
  read -ra model_kwargs <<<"$(recipe_value "$row" model_kwargs)"
  ((${#model_kwargs[@]} == 0)) || arguments+=(--model-kwargs "${model_kwargs[@]}")
  if [[ -n $smoke ]]; then
    arguments+=(--dataset sklearn/digits --num-classes 10 --img-size 32 --num-samples 32 -b 32 -j 0)
  else
    arguments+=(--data-dir "$data_dir")
    dataset=$(recipe_value "$row" dataset)
    [[ -z $dataset ]] || arguments+=(--dataset "$dataset" --split validation)
    download_arguments "$row"
    for key in img_size crop_pct interpolation; do
      arguments+=("--${key//_/-}" "$(recipe_value "$row" "$key")")
    done
  fi
  launch validate.py "${arguments[@]}" >&2 || return 1
  "$PYTHON" -c 'import json, sys; print(format(json.load(open(sys.argv[1]))["top1"], ".2f"))' "$results"
}

# A table of |-parted lines in Markdown, columns aligned.
print_table() {
  awk -F'|' '
    { for (i = 1; i <= NF; i++) if (length($i) > width[i]) width[i] = length($i); line[NR] = $0 }
    END {
      if (width[NF] < 8) width[NF] = 8
      for (n = 1; n <= NR; n++) {
        fields = split(line[n], field, "|")
        for (i = 1; i <= fields; i++) printf(i == 1 ? "| %-*s " : "| %*s ", width[i], field[i])
        print "|"
        for (i = 1; n == 1 && i <= fields; i++) {
          dashes = sprintf("%*s", width[i] + 1, ""); gsub(/ /, "-", dashes)
          printf("%s", i == 1 ? "|:" dashes : "|" dashes ":")
        }
        if (n == 1) print "|"
      }
    }'
}

# A row that fails is told in the table and by the exit code; the others still run. (Errors inside
# `if` do not end the functions above by themselves: hence their `|| return 1`.)
failed=0
declare -A ours=()
for row in "${all_rows[@]}"; do
  [[ -n ${selected[$row]:-} ]] || continue
  printf '== %s %s\n' "$mode" "$row" >&2
  if ours[$row]=$("${mode}_row" "$row" </dev/null); then :; else ours[$row]=failed failed=1; fi
done

# Only tables with a row that was run; of these also the rows that are the paper's alone.
lines=()
rows_run=0 parting=''
flush_table() {
  if ((rows_run)); then
    printf '%s' "$parting"
    printf '%s\n' "${lines[@]}" | print_table
    parting=$'\n'
  fi
  lines=() rows_run=0
}
while IFS= read -r line; do
  row=${line%%|*}
  if [[ -z $line ]]; then
    flush_table
  elif ((${#lines[@]} == 0)); then
    lines+=("$line")
  elif [[ $row == - ]]; then
    lines+=("$line|-")
  elif [[ -n ${ours[$row]:-} ]]; then
    lines+=("$line|${ours[$row]}")
    rows_run=$((rows_run + 1))
  fi
done <<<"$TABLES"
flush_table
[[ -z ${TABLE_NOTE:-} ]] || printf '%s\n' "$TABLE_NOTE"
[[ -z $smoke ]] || printf '(smoke run: two updates or 32 images; "Ours" says nothing but that it ran)\n'
exit "$failed"
