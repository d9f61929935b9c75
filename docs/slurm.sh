#!/bin/bash
# sbatch docs/slurm.sh PRESET.toml SHARDS OUT      (adapt the lines below to your cluster; not run on one here)
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --job-name=shortclip
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# This script gets SIGTERM 120 s before the time is up. The ranks save a checkpoint and end; the job is queued again.
#SBATCH --signal=B:TERM@120
set -u
preset=$1 shards=$2 out=$3
ending=0
trap 'ending=1; kill -TERM "$step"' TERM

# srun passes the signal on to torchrun, and torchrun to its ranks.
srun --kill-on-bad-exit=1 \
  .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 110 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
  train.py --preset "$preset" --data "$shards" --out "$out" &
step=$!
wait "$step"
code=$?
if [ "$ending" = 1 ]; then
  wait "$step"   # the trap ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
