#!/usr/bin/env bash
# Trains each method on Fashion-MNIST, measures all in the same way, prints a table and writes runs/report.html.
#
#   bash run.sh                     about 10 minutes on two CPU cores
#   bash run.sh quick               the same steps on few images, about 2 minutes; its numbers mean nothing
#   bash run.sh full [SEED ...]     the long schedules of docs/results.md, seeds 0 and 1 unless given: hours
#   bash run.sh labels [SEED ...]   classifiers from 100 to 60,000 labels, from scratch and from simclr
#   bash run.sh test [WORD ...]     the tests, or those with a WORD in their names
#
# Stopped at any moment, the same command continues. PYTHON=/path/to/python chooses the Python.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

rows='pixels pca random ae conv vae simclr classify scan query control'   # control: query, but at random
counts='100 250 500 1000 2000 5000 6000 7500 10000 20000 60000'           # labels

settings() {   # the flags of row $2 in schedule $1, beside the defaults of its method
  case $1 in default) echo --limit 20000 ;; quick) echo --limit 1000 ;; esac
  case $1-$2 in
    default-ae)      echo --epochs 10 ;;
    default-random | default-conv | default-vae | default-simclr) echo --width 0.25 ;;   # half of it, or less
    default-query)   echo --budget 300 --rounds 3 --round-epochs 1 --decay-epochs 2 ;;
    default-control) echo --budget 300 --rounds 1 --round-epochs 3 --decay-epochs 2 ;;   # its labels at once
    quick-query | quick-control) echo --budget 100 --rounds 2 --round-epochs 1 --decay-epochs 1 ;;
    quick-ae | quick-conv | quick-vae | quick-simclr | quick-classify) echo --epochs 1 ;;
    full-conv | full-vae) echo --epochs 10 ;;
    full-simclr)     echo --epochs 15 ;;
    full-query)      echo --budget 1000 --audit 0 ;;
    full-control)    echo --budget 1000 --rounds 1 --round-epochs 30 ;;
  esac
}

stop() {
  echo "run.sh: $1" >&2
  exit "${2:-2}"
}
trap 'stop "stopped; the same command continues" 130' INT TERM

environment() {   # sets PY: $PYTHON, else .venv, else python3; where torch is missing, .venv is made
  PY=${PYTHON:-python3}
  [[ -z ${PYTHON:-} && -x .venv/bin/python ]] && PY=.venv/bin/python
  "$PY" -c 'import torch, numpy, scipy' 2>/dev/null && return
  echo 'run.sh: installing requirements.txt into .venv; this is done once and takes some minutes'
  "$PY" -m venv .venv && .venv/bin/python -m pip install -r requirements.txt ||
    stop 'that failed for the reason above; wanted Python 3.10 or newer with venv and pip'
  PY=.venv/bin/python
}

find_data() {   # in data/, or downloaded into it; a failure is one sentence
  PYTHONPATH=. "$PY" -c 'import sys
sys.excepthook = lambda kind, error, trace: print(f"run.sh: {error}", file=sys.stderr)
import data; data.find("fashion-mnist")'
}

debian() {   # Debian's package of the data set, unpacked without root
  local folder
  folder=$(mktemp -d)
  (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download dataset-fashion-mnist) &&
    dpkg-deb -x "$folder"/*.deb "$folder" && mkdir -p data/fashion-mnist &&
    cp "$folder"/usr/share/datasets/fashion-mnist/*.gz data/fashion-mnist/
}

train() {   # name of the run, its row, further flags
  local name=$1 method=${2/control/query}
  [[ $2 == control ]] && set -- "$@" --pick random
  "$PY" ssl.py --method "$method" --name "$name" --resume "${@:3}" ||
    stop "$name did not finish, as said above; the same command continues" $?
  runs+=("runs/$name")
}

table() {   # schedule, seed: every row
  for row in $rows; do
    case $row in classify | scan | query | control) start="--encoder runs/$1-simclr-$2" ;; *) start= ;; esac
    train "$1-$row-$2" "$row" --seed "$2" $(settings "$1" "$row") $start
  done
}

label_counts() {   # seed
  train "full-simclr-$1" simclr --seed "$1" $(settings full simclr)
  for n in $counts; do
    train "labels-$n-scratch-$1" classify --seed "$1" --labels "$n"
    train "labels-$n-simclr-$1" classify --seed "$1" --labels "$n" --encoder "runs/full-simclr-$1"
  done
}

schedule=${1:-default} seeds=${*:2} runs=()
case $schedule in
  default) seeds=0; echo 'run.sh: every method on 20,000 images; about 10 minutes on two CPU cores' ;;
  quick)   seeds=0; echo 'run.sh: every method on 1,000 images; about 2 minutes, and the numbers mean nothing' ;;
  full)    seeds=${seeds:-0 1}; echo "run.sh: every method on all images; some hours for each of the seeds $seeds" ;;
  labels)  seeds=${seeds:-0}; echo "run.sh: simclr and 22 classifiers; about 2 hours for each of the seeds $seeds" ;;
  test)    environment; exec "$PY" test_all.py "${@:2}" ;;
  *)       stop "'$schedule' is not known; wanted quick, full [SEED ...], labels [SEED ...] or test [WORD ...]" ;;
esac
environment
find_data || { debian && find_data; } || stop 'put the four files of Fashion-MNIST into data/fashion-mnist/'
for seed in $seeds; do
  if [[ $schedule == labels ]]; then label_counts "$seed"; else table "$schedule" "$seed"; fi
done
"$PY" ssl.py --compare "${runs[@]}"
echo 'run.sh: open runs/report.html in a browser; each run has a report of its own in its folder'
