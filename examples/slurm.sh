#!/bin/bash
# Quantize on several machines, one process a card, or one a machine where there are no cards:
#     sbatch examples/slurm.sh path/to/llama --out shared/llama-resq --calibration wiki.train.raw
# Source and --out lie where all machines see them, and `resq` and `torchrun` are on the PATH. A job that loses a
# machine, or runs out of time, is queued again and goes on after its last finished layers.
#SBATCH --job-name=resq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail

# Time is nearly over: back into the queue. SLURM stops the processes, which keep what is finished.
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    processes=$SLURM_GPUS_ON_NODE device=cuda
else
    processes=1 device=cpu
fi
# Threads decide the last bits of float sums: the same number in every run of a job.
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / processes))
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 10000))" \
    -m resq quantize "$@" --device "$device" --resume &
# A trap runs only between commands, and a signal ends `wait`.
while true; do
    code=0
    wait $! || code=$?
    kill -0 $! 2> /dev/null || exit "$code"
done
