#!/bin/bash
# sbatch docs/slurm.sh --dataroot dataset/apple2orange --workdir runs/apple
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

# Three minutes before the time limit this shell gets SIGTERM and passes it to the ranks, which save
# and end; then the job is queued again, and types the same line, which goes on.
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for ranks that are started again
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$host:29500" --max-restarts=3 \
  train.py --resume auto "$@" &
run=$!
wait "$run"
code=$?
if [ -n "$stopped" ]; then # the trap ended that wait
  wait "$run"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
