#!/usr/bin/env bash
# Trains on a TPU pod of Google Cloud, from the request for it to the last step:
#
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-64 --share=HOST:/PATH
#     [--slices=1] [--spot=true] [--software=v2-alpha-tpuv5-lite] [--restarts=100]
#     [--pause=60] [--dry_run] -- --config=configs/stage_4k.py --workdir=/shared/4k
#
# Requests the pod as a queued resource and waits for it, copies this clone to all its
# hosts, installs, mounts --share (an NFS share, such as Filestore, with the data and
# place for the checkpoints) as /shared, and trains. Given again, it goes on where it
# was, with the same pod. JAX finds the hosts of a pod itself. --dry_run only prints.
# The pod stays, and costs, until you delete it: the last line says how.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
name='' zone='' type='' share='' slices=1 spot='' software=v2-alpha-tpuv5-lite \
  restarts=100 pause=60
options name zone type share slices spot software restarts pause -- "$@"
need name zone type share
cd "$root"

tpus=(gcloud compute tpus)
nodes=("$name")
request=(--node-id="$name")
if ((slices > 1)); then
  request=(--node-prefix="$name" --node-count="$slices")
  nodes=()
  for ((index = 0; index < slices; index++)); do nodes+=("$name-$index"); done
fi

state() {
  "${tpus[@]}" queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || true
}

# A command on all hosts of all slices at once.
everywhere() {
  local what=$1 node pids=() pid code=0
  for node in "${nodes[@]}"; do
    step "$what: $node" "${tpus[@]}" tpu-vm ssh "$node" --zone="$zone" --worker=all --command="$2" &
    pids+=($!)
    [[ -z $dry_run ]] || wait
  done
  [[ -z $dry_run ]] || return 0
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return $code
}

if [[ -n $dry_run || -z $(state) ]]; then
  step "Request the pod" "${tpus[@]}" queued-resources create "$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$software" "${request[@]}" \
    ${spot:+--spot}
fi
if [[ -z $dry_run ]]; then
  while [[ $(state) != ACTIVE ]]; do
    case $(state) in
      FAILED | SUSPEND*) die "The request ended in $(state). Delete it and ask again: ${tpus[*]} queued-resources delete $name --zone=$zone --force" ;;
    esac
    echo "── The pod is $(state)"
    sleep "$pause"
  done
fi

archive=$(mktemp -d)/pixsigma_jax.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
step "Pack this clone as it was committed" git archive --output="$archive" HEAD
for node in "${nodes[@]}"; do
  step "Copy it to the hosts" "${tpus[@]}" tpu-vm scp "$archive" "$node:pixsigma_jax.tar.gz" --zone="$zone" --worker=all
done
everywhere "Unpack, install and mount" "set -e
mkdir -p pixsigma_jax && tar --extract --file=pixsigma_jax.tar.gz --directory=pixsigma_jax
command -v python3.11 >/dev/null || sudo apt-get install -qq -y python3.11-venv
PYTHON=python3.11 bash -c 'source pixsigma_jax/launch/venv.sh && make_venv tpu'
sudo mkdir -p /shared && { mountpoint -q /shared || sudo mount -t nfs $(quoted "$share") /shared; }"
try_again "$restarts" "$pause" everywhere "Train" \
  "cd pixsigma_jax && $(quoted .venv/bin/python -m pixsigma_jax.train "${train[@]}")"
echo "── The pod is still there: ${tpus[*]} queued-resources delete $name --zone=$zone --force"
