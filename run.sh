#!/usr/bin/env bash
# The main job: learns from Fashion-MNIST by each of the methods below, measures all the same way, prints one table.
#
#   bash run.sh          about half an hour on two CPU cores
#   bash run.sh quick    a smoke run of about 3 minutes
#   bash run.sh full     the long schedule whose numbers the README quotes, for the seeds 0 and 1: four hours
#                        (bash run.sh full 2 3 4 for others)
#   bash run.sh labels   classifiers from 100 to 60,000 labels, from scratch and from SimCLR, for the seed 0 (or those
#                        given): an hour
#   bash run.sh test     the tests; further words go to test_all.py
#
# Stopped at any moment, by Ctrl-C for instance, the same command continues. PYTHON=/path/to/python chooses the Python.
set -euo pipefail

methods='pixels pca random ae conv vae simclr simclr-near scan query query-random'

flags() {   # of method $2 in schedule $1, whose run is called $3; a method that isn't named keeps its defaults;
            # query-random is the control of query, simclr-near goes on with neighbours as pairs
  case $2 in
    simclr-near)  echo --encoder "runs/${3/simclr-near/simclr}" "runs/${3/simclr-near/conv}" --lr 0.002 ;;
    query)        echo --encoder "runs/${3/query/simclr}" "runs/${3/query/conv}" ;;
    query-random) echo --encoder "runs/${3/query-random/simclr}" "runs/${3/query-random/conv}" --pick random ;;
    scan)         echo --encoder "runs/${3/scan/simclr-near}" "runs/${3/scan/conv}" ;;
  esac
  case $1-$2 in
    quick-pixels | quick-pca | quick-random) echo --limit 6000 ;;   # nothing to train
    quick-query*)     echo --limit 6000 --budget 100 --rounds 2 --round-epochs 1 --closing 1 ;;
    quick-scan)       echo --limit 6000 --heads 12 --iterations 1 --epochs 1 --closing 1 ;;
    quick-*)          echo --limit 6000 --epochs 1 ;;
    default-query*)   echo --budget 200 --rounds 4 --round-epochs 1 --closing 1 ;;
    default-simclr-near) echo --epochs 2 ;;
    default-scan | full-scan) echo --iterations 0 ;;   # self-labelling made it no better
    full-conv | full-vae) echo --epochs 10 ;;
    full-simclr)      echo --epochs 15 ;;
    full-query)       echo --audit 0 ;;   # all queries where they say most, none to estimate the accuracy
    full-query-random) echo --rounds 1 --round-epochs 30 ;;   # in rounds it would keep its first errors
    full-simclr-near) echo --epochs 4 ;;
  esac
}

[[ ${PYTHON:-} == [!/]*/* ]] && PYTHON=$PWD/$PYTHON
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
here=$PWD
venv=$here/.venv/bin/python
pythons=("$venv" python python3 python3.13 python3.12 python3.11 python3.10)
[[ -n ${PYTHON:-} ]] && pythons=("$PYTHON" "$venv")
files=$(echo {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz)
counts='100 250 500 1000 2000 5000 6000 7500 10000 20000 60000'
usage='usage: bash run.sh [quick|full [SEED ...]|labels [SEED ...]|test [WORD]]'
again='run the same command again to continue'
tmp=
trap 'rm -rf "$tmp"' EXIT
trap 'stop 130 "stopped: $again"' INT
trap 'stop 143 "stopped: $again"' TERM

stop() {   # exit code, sentence
  echo "run.sh: $2" >&2
  exit "$1"
}

ready() (   # is Python $1 new enough, with the packages? Asked in / since our ssl.py has no part in it
  [[ $1 != "$venv" || ! -e $here/.venv/unfinished ]] || return 1
  cd / && "$1" -c 'import sys; assert sys.version_info >= (3, 10)
import torch, numpy, scipy; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)' 2>/dev/null
)

environment() {   # sets PY
  for PY in "${pythons[@]}"; do
    ready "$PY" && return
  done
  make_venv
  PY=$venv
}

recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

base_python() {
  local python
  for python in "${pythons[@]}"; do
    [[ $python != "$venv" ]] && recent "$python" && echo "$python" && return
  done
  stop 2 "Python 3.10 or newer is needed: install it, or say where it is with PYTHON=/path/to/python"
}

make_venv() (   # .venv with requirements.txt; made anew if it was left unfinished or its Python is gone or old
  trap 'exit 130' INT   # the sentence is said outside
  base=$(base_python)
  cd /
  echo "run.sh: installing requirements.txt into .venv; this is done once and takes some minutes"
  if [[ -e $here/.venv/unfinished ]] || ! recent "$venv"; then
    rm -rf "$here/.venv" && mkdir "$here/.venv" && touch "$here/.venv/unfinished"
    "$base" -m venv "$here/.venv" >/dev/null 2>&1 || "$base" -m venv --without-pip "$here/.venv" ||
      stop 2 "$base can't make a virtual environment: install its venv (Debian: apt install python3-venv)"
  fi
  pip=("$venv" -m pip)
  "${pip[@]}" --version >/dev/null 2>&1 || pip=("$base" -m pip --python "$venv")   # no ensurepip
  "${pip[@]}" --version >/dev/null 2>&1 ||
    stop 2 "$base has neither ensurepip nor pip 22.3 or newer: install one (Debian: apt install python3-venv)"
  "${pip[@]}" install -r "$here/requirements.txt" ||
    stop 2 "pip could not install requirements.txt into .venv, for the reason above: mend it and $again"
  rm -f "$here/.venv/unfinished"
  ready "$venv" || stop 2 "torch, numpy and scipy do not import from .venv: delete that folder and $again"
)

debian_data() {   # Debian's package of the data set, unpacked without root
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
  echo "run.sh: trying Debian's package dataset-fashion-mnist"
  tmp=$(mktemp -d)
  (
    cd "$tmp"
    get() { apt-get -qq -o APT::Sandbox::User=root download dataset-fashion-mnist; }
    get || { [[ $(id -u) == 0 ]] && apt-get -qq update && get; }
  ) && dpkg-deb -x "$tmp"/*.deb "$tmp" && mkdir -p data/fashion-mnist || return 1
  for file in $files; do   # moved into place whole, or not at all
    cp "$tmp/usr/share/datasets/fashion-mnist/$file" "data/fashion-mnist/$file.tmp" &&
      mv "data/fashion-mnist/$file.tmp" "data/fashion-mnist/$file" || return 1
  done
}

train() {   # schedule, method, name of the run, further flags
  local code=0 schedule=$1 method=$2 name=$3
  shift 3
  "$PY" ssl.py --method "${method%-*}" --name "$name" --resume $(flags "$schedule" "$method" "$name") "$@" ||
    code=$?
  case $code in
    0)         runs+=("runs/$name") ;;
    130 | 143) stop $code "stopped: $again" ;;
    *)         stop $code "$name failed with exit code $code; what it said is above" ;;
  esac
}

schedule=${1:-default}
case $schedule in
  test) shift; environment; exec "$PY" test_all.py "$@" ;;
  full)   shift; seeds=${*:-0 1} ;;
  labels) shift; seeds=${*:-0} ;;
  quick | default) [[ $# -le 1 ]] || stop 2 "'$2' is one word too many; $usage" ;;
  *) stop 2 "'$schedule' is no schedule; $usage" ;;
esac
[[ ${seeds-0} =~ ^\ *[0-9][0-9\ ]*$ ]] || stop 2 "'$seeds' are no seeds; $usage"
environment

"$PY" ssl.py --fetch || { debian_data && "$PY" ssl.py --fetch; } ||
  stop 2 "Fashion-MNIST could not be fetched: put its files ${files// /, } into data/fashion-mnist/ and $again"

runs=()
case $schedule in
  quick)   for method in $methods; do train quick "$method" "quick-$method"; done ;;
  default) for method in $methods; do train default "$method" "$method"; done ;;
  full)    for seed in $seeds; do
             for method in $methods; do train full "$method" "full-$method-seed=$seed" --seed $seed; done
           done ;;
  labels)  for seed in $seeds; do
             train full simclr "full-simclr-seed=$seed" --seed $seed
             for n in $counts; do
               train labels classify "labels-$n-scratch-seed=$seed" --labels $n --seed $seed
               train labels classify "labels-$n-simclr-seed=$seed" --labels $n --seed $seed \
                 --encoder "runs/full-simclr-seed=$seed"
             done
           done ;;
esac
"$PY" ssl.py --compare "${runs[@]}"
