#!/bin/bash
# A training run on Slurm without Ray, one rank per GPU: sbatch examples/slurm.sh --config digits --store zarr
#
# Arguments after the script's name are passed to udddm-train. The run directory must be on a file system that all nodes
# share, or be a URL (--run-dir s3://bucket/run). Two minutes before the time limit, and when the job is preempted with a
# grace period, every rank receives SIGTERM. The ranks agree on a step, write a checkpoint and exit with 143; the job is
# then requeued and resumes. After a lost node, Slurm's --requeue does the same. The number of ranks must divide
# order.lanes (8 or 64 by default, docs/store.md).
#SBATCH --job-name=udddm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=udddm-%j.log

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# With --gpus-per-task alone each rank sees one GPU, as number 0. --gpu-bind=none lets it choose by LOCAL_RANK.
srun --kill-on-bad-exit=1 --gpu-bind=none bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    exec udddm-train "$@"' udddm "$@"
code=$?
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
