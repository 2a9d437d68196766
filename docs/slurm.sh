#!/bin/bash
# Two nodes of eight GPUs under Slurm, from the repository, on a file system that all nodes share:
#     sbatch docs/slurm.sh configs/570m.py
# Partition, account and modules are the cluster's own: add them here or on the command line of sbatch.
#SBATCH --job-name=nanomaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300

# Slurm sends USR1 to this shell alone, 300 s before the time is up. (Not TERM, which scancel sends: a job that
# its user cancels must not come back.) The step then gets SIGTERM, on which train.py writes a checkpoint. srun
# itself is not to be signalled: it would kill the step.
is_time_up=
trap 'is_time_up=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds that torchrun leaves the ranks for it, 30 by default

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# From Slurm 22.05 until 23.11, srun does not take over the job's --cpus-per-task.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d \
    --rdzv_endpoint="$first_node:$((20000 + SLURM_JOB_ID % 10000))" train.py "$@" &
wait $!  # in the background, since a trap waits for what runs in the foreground
status=$?
if [ "$is_time_up" ]; then
    wait $!  # the signal ended the first wait
    scontrol requeue "$SLURM_JOB_ID"  # starts this script again, which resumes from the checkpoint
else
    exit $status  # finished, or failed: starting again would fail again
fi
