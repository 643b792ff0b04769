#!/usr/bin/env bash
# Submits a training to SLURM, one process for each GPU, which goes on after a time
# limit, a preemption or an error:
#
#   bash launch/slurm.sh --nodes=2 --gpus_per_node=8 [--partition=NAME] [--account=NAME]
#     [--time=24:00:00] [--cpus_per_gpu=8] [--restarts=100] [--name=pixsigma]
#     [--logs=logs] [--dry_run] -- --config=configs/stage_4k.py --workdir=/shared/4k
#
# Run it on a login node, in a clone with a .venv (make_venv of launch/venv.sh, extra
# gpu) on a disk that all nodes see; so must be --workdir and the data. JAX finds the
# processes of a SLURM job itself. --dry_run only prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
nodes=1 gpus_per_node=8 partition='' account='' time=24:00:00 cpus_per_gpu=8 \
  restarts=100 name=pixsigma logs=logs
options nodes gpus_per_node partition account time cpus_per_gpu restarts name logs \
  -- "$@"
need nodes gpus_per_node
cd "$root"

# Within the job. The hosts, so that those that do not come are named; --kill-on-bad-exit,
# so that no process outlives another. Exit code 143 is that of the SIGTERM below, after
# which the state is saved.
job="export PIXSIGMA_HOSTS=\$(scontrol show hostnames | paste -sd,)
srun --kill-on-bad-exit=1 $(quoted "$root/.venv/bin/python" -m pixsigma_jax.train "${train[@]}")
code=\$?
if [ \$code -ne 0 ] && [ \"\${SLURM_RESTART_COUNT:-0}\" -lt $restarts ]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code"

step "Make a directory for the logs" mkdir -p "$logs"
step "Submit; SIGTERM comes five minutes before the time limit" sbatch \
  --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
  --gpus-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_gpu" --time="$time" \
  ${partition:+--partition="$partition"} ${account:+--account="$account"} \
  --exclusive --requeue --signal=TERM@300 --open-mode=append \
  --output="$logs/%x-%j.log" --chdir="$root" --wrap="$job"
