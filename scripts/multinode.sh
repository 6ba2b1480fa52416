#!/usr/bin/env bash
# One run of train.py on several machines without a scheduler: the same command on each of them.
#
#   scripts/multinode.sh --nodes 2 --nproc 8 --endpoint gpu01 RUN [FLAG...]
#
# The machines meet at the endpoint, which is one of them, and torchrun starts a process per GPU.
# Where a process or a machine is lost, all are started again and go on from the last save as soon
# as the machines are complete; so RUN's folder (--output) is to be on a disk that all of them see.
# A machine that was lost comes back by the same command; when the endpoint's machine was lost, all
# end, and come back by it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/multinode.sh --nodes N [options] RUN [FLAG...]
  RUN                  name of the run (--experiment), the same on every machine
  FLAG...              train.py's flags, the same on every machine
  --nodes N            machines that take part
  --nproc N            processes (GPUs) on each; as many as there are GPUs, or 1, if not given
  --endpoint HOST:PORT where the machines meet: one of them, port 29400 if not given; needed from
                       two machines on
  --max-restarts N     starts after a lost process; 3 if not given
  --join-timeout S     seconds to wait for machines that are missing, 600 if not given
PYTHON=... names a Python that has qna_timm; otherwise scripts/_env.sh makes one.
TEXT
}

fail() {
  printf 'multinode.sh: error: %s\n' "$1" >&2
  exit 2
}

number() {
  if [[ ! $2 =~ ^[0-9]+$ ]] || ((10#$2 < $3)); then fail "$1 $2: not a whole number from $3"; fi
}

nodes='' nproc=gpu endpoint='' max_restarts=3 join_timeout=600
while (($#)); do
  case $1 in
    -h | --help) usage && exit 0 ;;
    --nodes | --nproc | --endpoint | --max-restarts | --join-timeout) ;;
    -*) fail "unknown option '$1' (train.py's flags come after the run's name; --help shows the usage)" ;;
    *) break ;;
  esac
  (($# > 1)) || fail "$1 needs a value"
  case $1 in
    --nodes) number "$1" "$2" 1 && nodes=$2 ;;
    --nproc) number "$1" "$2" 1 && nproc=$2 ;;
    --endpoint) endpoint=$2 ;;
    --max-restarts) number "$1" "$2" 0 && max_restarts=$2 ;;
    --join-timeout) number "$1" "$2" 1 && join_timeout=$2 ;;
  esac
  shift 2
done
[[ -n $nodes ]] || fail '--nodes is needed: how many machines take part (--help shows the usage)'
(($#)) || fail 'no name for the run (--help shows the usage)'
run=$1
shift
if [[ -z $endpoint ]]; then
  ((nodes == 1)) || fail "--endpoint is needed with --nodes $nodes: HOST:PORT of one of the machines"
  endpoint=localhost:0
elif [[ ! $endpoint =~ ^[^:]+(:[0-9]+)?$ ]]; then
  fail "--endpoint $endpoint: not HOST or HOST:PORT"
elif [[ $endpoint != *:* ]]; then
  endpoint=$endpoint:29400
fi

start=$PWD
if [[ -z ${PYTHON:-} ]]; then
  QNA_TIMM_EXTRAS=${QNA_TIMM_EXTRAS:-train}
  # shellcheck source=scripts/_env.sh
  source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
fi
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
root=$PWD
cd -- "$start" # paths among the flags are the caller's
if [[ $nproc == gpu ]]; then
  nproc=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
exec "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$nproc" \
  --rdzv-backend c10d --rdzv-id "$run" --rdzv-endpoint "$endpoint" \
  --rdzv-conf "join_timeout=$join_timeout" --max-restarts "$max_restarts" \
  "$root/train.py" --resume auto --experiment "$run" "$@"
