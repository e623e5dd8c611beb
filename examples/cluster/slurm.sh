#!/bin/bash
# sbatch examples/cluster/slurm.sh: one training on two machines of eight GPUs. A run folder that all machines see is
# continued, also when Slurm starts the job again.
#SBATCH --job-name=sd3tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # so that restarted processes find each other

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
  -m sd3tune train train.yaml --resume
