#!/usr/bin/env bash
# Trains on one machine with all its accelerators, and starts again what ended in an
# error:
#
#   bash launch/one_box.sh [--processes=1] [--restarts=10] [--pause=10] [--port=8476]
#     [--dry_run] -- --config=configs/stage_4k.py --workdir=runs/4k
#
# One process drives all accelerators, which is the fastest. With --processes=8 eight
# do, each with its own GPU. --dry_run only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
processes=1 restarts=10 pause=10 port=8476
options processes restarts pause port -- "$@"
need processes
cd "$root"
python=${PIXSIGMA_PYTHON:-.venv/bin/python}

start() {
  local index pids=() code=0 command=("$python" -m pixsigma_jax.train "${train[@]}") place
  # Told to stop, it tells them, and they stop at the same step.
  trap '((${#pids[@]})) && kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
  for ((index = 0; index < processes; index++)); do
    place=(env)
    if ((processes > 1)); then
      place+=(CUDA_VISIBLE_DEVICES="$index" JAX_COORDINATOR_ADDRESS="localhost:$port"
        JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$index")
    fi
    show "Train, process $index of $processes" "${place[@]}" "${command[@]}"
    [[ -n $dry_run ]] || { "${place[@]}" "${command[@]}" & pids+=($!); }
  done
  for index in "${!pids[@]}"; do
    # A signal interrupts a wait, which then has to be waited for again.
    while kill -0 "${pids[index]}" 2>/dev/null; do wait "${pids[index]}" || true; done
    wait "${pids[index]}" || code=$?
  done
  trap - INT TERM
  return $code
}

try_again "$restarts" "$pause" start
