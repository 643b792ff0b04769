#!/usr/bin/env bash
# Trains on a GKE cluster with TPUs, by XPK:
#
#   bash launch/gke_xpk.sh --cluster=NAME --project=PROJECT --zone=ZONE
#     --type=v5litepod-64 --storage=NAME [--slices=1] [--name=pixsigma] [--restarts=100]
#     [--image=python:3.12] [--dry_run] -- --config=configs/stage_4k.py --workdir=/shared/4k
#
# XPK packs this clone into the image. The cluster must know a storage (xpk storage
# attach, with --mount-point=/shared) with the data and place for the checkpoints. A
# workload of which one pod ends is started again as a whole. JAX finds the pods itself.
# --dry_run only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cluster='' project='' zone='' type='' storage='' slices=1 name=pixsigma restarts=100 \
  image=python:3.12
options cluster project zone type storage slices name restarts image -- "$@"
need cluster project zone type storage
cd "$root"

step "Submit" xpk workload create --cluster="$cluster" --project="$project" \
  --zone="$zone" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
  --max-restarts="$restarts" --storage="$storage" --base-docker-image="$image" \
  --script-dir="$root" \
  --command="pip install --quiet '.[tpu]' && $(quoted python -m pixsigma_jax.train "${train[@]}")"
