#!/bin/bash
# Type this on each of two machines, with NODE_RANK=0 on the first one, and MASTER_ADDR=ADDRESS of it on both. Data and
# configuration must be on both; machine 0 writes the run folder.

torchrun --nnodes 2 --node-rank "$NODE_RANK" --nproc-per-node 8 --max-restarts 0 \
  --master-addr "$MASTER_ADDR" --master-port 29500 \
  -m sd3tune train train.yaml --resume
