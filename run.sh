#!/usr/bin/env bash
# Trains all methods but cluster on Fashion-MNIST, measures them alike, prints a table, writes a report.
#   bash run.sh                     about 10 minutes on two CPU cores
#   bash run.sh quick               the same steps on few images, about 2 minutes; its numbers mean nothing
#   bash run.sh full [SEED ...]     the long schedules of docs/results.md, seeds 0 and 1 unless given: hours
#   bash run.sh labels [SEED ...]   classifiers from 100 to 60,000 labels, from scratch and from simclr
#   bash run.sh test [WORD ...]     the tests, or those with a WORD in their names
# Stopped at any moment, the same command continues; only the tests start again.
# PYTHON=/path/to/python chooses the Python.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

rows='pixels pca random ae conv vae simclr classify scan query control'   # control: query, but at random

settings() {   # the flags of row $2 in schedule $1 with seed $3, beside the defaults of its method
  case $1 in short) echo --limit 15000 ;; quick) echo --limit 1000 ;; esac
  case $2 in classify | scan | query | control) echo --encoder "runs/$1-simclr-seed=$3" ;; esac
  case $2 in control) echo --pick random ;; esac
  case $1-$2 in
    short-ae)      echo --epochs 10 ;;
    short-random | short-conv | short-vae | short-simclr) echo --width 0.25 ;;   # half of it, or less
    short-query)   echo --labels 300 --rounds 3 --epochs 1 --decay-epochs 2 ;;
    short-control) echo --labels 300 --rounds 1 --epochs 3 --decay-epochs 2 ;;   # its labels at once
    quick-query | quick-control) echo --labels 100 --rounds 2 --epochs 1 --decay-epochs 1 ;;
    quick-ae | quick-conv | quick-vae | quick-simclr | quick-classify) echo --epochs 1 ;;
    full-conv | full-vae) echo --epochs 10 ;;
    full-query)    echo --labels 1000 --audit 0 ;;
    full-control)  echo --labels 1000 --rounds 1 --epochs 30 ;;
  esac
}

stop() { echo "run.sh: $1" >&2; exit "${2:-2}"; }
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

debian_data() {   # Debian's package of the data set, unpacked without root
  local folder=$(mktemp -d)
  (cd "$folder" && apt-get -qq -o APT::Sandbox::User=root download dataset-fashion-mnist) &&
    dpkg-deb -x "$folder"/*.deb "$folder" && mkdir -p data/fashion-mnist &&
    cp "$folder"/usr/share/datasets/fashion-mnist/*.gz data/fashion-mnist/
}

train() {   # name of the run, method, flags
  "$PY" ssl.py --method "$2" --name "$1" --resume "${@:3}" ||
    stop "$1 did not finish, as said above; the same command continues" $?
  runs+=("runs/$1")
}

schedule=${1:-short} seeds=${*:2} runs=()
case $schedule in
  short)   seeds=0; echo 'run.sh: every method on 15,000 images; about 10 minutes on two CPU cores' ;;
  quick)   seeds=0; echo 'run.sh: every method on 1,000 images; about 2 minutes; the numbers mean nothing' ;;
  full)    seeds=${seeds:-0 1}; echo "run.sh: every method on all images; hours for each seed: $seeds" ;;
  labels)  seeds=${seeds:-0}; echo "run.sh: simclr and 22 classifiers; hours for each seed: $seeds" ;;
  test)    environment; exec "$PY" test_all.py "${@:2}" ;;
  *)       stop "'$schedule' is not known; wanted quick, full, labels or test" ;;
esac
environment
find_data || { debian_data && find_data; } || stop 'put its four files into data/fashion-mnist/'
for seed in $seeds; do
  if [[ $schedule == labels ]]; then
    start=full-simclr-seed=$seed
    train "$start" simclr --seed "$seed" $(settings full simclr "$seed")
    for n in 100 250 500 1000 2000 5000 6000 7500 10000 20000 60000; do
      train "labels-$n-scratch-seed=$seed" classify --seed "$seed" --labels "$n"
      train "labels-$n-simclr-seed=$seed" classify --seed "$seed" --labels "$n" --encoder "runs/$start"
    done
  else
    for row in $rows; do
      more=$(settings "$schedule" "$row" "$seed")
      train "$schedule-$row-seed=$seed" "${row/control/query}" --seed "$seed" $more
    done
  fi
done
"$PY" ssl.py --compare "${runs[@]}"
echo 'run.sh: open runs/report.html in a browser; each run has a report of its own in its folder'
