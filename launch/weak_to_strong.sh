#!/usr/bin/env bash
# PixArt-Σ's chain from 256 to 4096 pixels, each stage from where its parent ended:
#
#   bash launch/weak_to_strong.sh [--dry_run] [STAGE …] [--config.FIELD=VALUE …]
#
# STAGE is a file of configs/ without its ending, with an argument if wished, and lies
# in runs/weak_to_strong afterwards; without any, all six are trained, 1K to 4K with
# compressed keys and values. The uncompressed rows of the paper's table 4:
#
#   bash launch/weak_to_strong.sh stage_1k:full stage_2k:full stage_4k:full
#
# A stage that has all its steps is skipped, and said to be. Flags go on to every stage.
# Interrupted at any moment, the same command goes on where it was. --dry_run prints what
# it would run. docs/stages.md tells what has to be there first.
#
#   EXTRA=gpu bash launch/weak_to_strong.sh     installs JAX for GPUs (or tpu) into .venv
#   PIXSIGMA_PYTHON=python3 bash launch/…       takes a Python that has the package
#   TRAIN="bash launch/one_box.sh --processes=8 --" bash launch/…   trains by another
#                                               script, which takes train's flags
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

dry_run='' stages=() flags=()
for word in "$@"; do
  case $word in
    --dry_run) dry_run=1 ;;
    -*) flags+=("$word") ;;
    *) stages+=("$word") ;;
  esac
done
if ((!${#stages[@]})); then
  stages=(stage_256_vae stage_256_align stage_512 stage_1k stage_2k stage_4k)
fi

if [[ -n ${PIXSIGMA_PYTHON:-} ]]; then
  python=$PIXSIGMA_PYTHON
else
  make_venv ${EXTRA:+"$EXTRA"}
fi
cd "$root"
train=("$python" -m pixsigma_jax.train)
if [[ -n ${TRAIN:-} ]]; then read -ra train <<<"$TRAIN"; fi

# Signals are for the training: it saves and ends, and so does the chain.
child='' stopped=''
stop() {
  stopped=$1
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap 'stop 143' TERM
trap 'stop 130' INT

# Until it is over: a signal interrupts a wait, and not what is waited for.
run() {
  local code=0
  "$@" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=''
  if [[ -n $stopped ]]; then exit "$stopped"; fi
  return "$code"
}

# Whether a stage is done the trainer knows.
ask() {
  standing=$("$python" -m pixsigma_jax.train "${arguments[@]}" --dry_run)
  if [[ -n $stopped ]]; then exit "$stopped"; fi
}

for stage in "${stages[@]}"; do
  file=configs/${stage%%:*}.py
  [[ -e $file ]] || die "There is no stage ${stage%%:*}: $file does not exist."
done
for stage in "${stages[@]}"; do
  argument=${stage#"${stage%%:*}"}
  arguments=(
    --config="configs/${stage%%:*}.py$argument"
    --workdir="runs/weak_to_strong/${stage/:/_}"
    ${flags[@]+"${flags[@]}"}
  )
  ask
  if [[ $standing == done:* ]]; then
    echo "── Skipping $stage, ${standing}."
    continue
  fi
  echo "── $stage, ${standing}:"
  echo "${train[@]}" "${arguments[@]}"
  if [[ -n $dry_run ]]; then continue; fi
  run "${train[@]}" "${arguments[@]}"
  ask
  [[ $standing == done:* ]] || die "The training of $stage returned, and $standing."
done
if [[ -z $dry_run ]]; then echo "── The chain has ended: runs/weak_to_strong"; fi
