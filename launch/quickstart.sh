#!/usr/bin/env bash
# From nothing to images that follow their prompts: bash launch/quickstart.sh
#
# Installs into .venv, writes real handwritten digits as captioned color images, trains
# PixArt-Σ in miniature through its weak-to-strong chain, and writes runs/quickstart/.
# Interrupted at any moment, the same command goes on where it was.
#
#   bash launch/quickstart.sh --picture   # installs and draws with the trained miniature
#                                         # of weights/miniature: a minute, no training
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
[[ $# == 0 || $* == --picture ]] ||
  die "There is no $*: give nothing, or --picture to draw without training."
make_venv
cd "$root"

runs=runs/quickstart
# The stages share programs: what one has compiled, the next reads.
export JAX_COMPILATION_CACHE_DIR=$root/$runs/compilation_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
# Two devices, each training on half of the batch: a tenth faster on two cores.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=2"
# Large pages, since XLA asks for each step's memory anew: a third faster at 16 pixels.
# Of glibc since 2.35; any other C library takes no notice.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1

run() {
  echo "── $*"
  "$python" -m "pixsigma_jax.$1" "${@:2}"
}

# Three prompts each of one digit, of two side by side, of two above each other.
draw() {
  run sample --checkpoint="$1" --prompts_file=configs/quickstart/prompts.txt \
    --height={16,16,16,16,16,16,32,32,32} --width={16,16,16,32,32,32,16,16,16} \
    --dtype=float32 --seed=1 --output="$2" --grid
  echo "Images: $2/grid.png"
}

if [[ $* == --picture ]]; then
  draw weights/miniature runs/picture
  exit
fi

prepare() {
  run prepare --dataset=digits --resolution="$1" --count=10000 --seed=1 \
    --output=$runs/data/"$1"px
}

train() {
  run train --config=configs/quickstart/"$1" --workdir=$runs/"$2"
}

prepare 8
train low.py low
prepare 16
train high.py high
train high.py:extended high_extended
train compressed.py compressed
train compressed.py:random compressed_random

# Step 0 of a stage is its parent after the transform, before any training.
checkpoints=$runs/low
for snapshot in high/{0,200,2500} high_extended/{0,200} \
  compressed/{0,100} compressed_random/{0,100}; do
  checkpoints+=,$runs/${snapshot/\//\/snapshots\/}
done
# A stage that was deleted and trained again has its images drawn again.
run evaluate digits --checkpoints="$checkpoints" --per_task=25 --resamples=0 \
  --num_inference_steps=14 --batch_size=50 --dtype=float32 --redraw=stale \
  --output=$runs/evaluation

draw $runs/compressed $runs/samples
echo "Accuracy: $runs/evaluation/report.md"
