#!/usr/bin/env bash
# One process a GPU through torchrun; on several hosts the same command on each, at about the same time:
#
#     launch/torchrun.sh configs/run.yaml lora.r=16
#     NODES=2 MASTER=node-a:29400 launch/torchrun.sh configs/run.yaml
#     RANKS=2 launch/torchrun.sh configs/run.yaml             # so many processes a host; needed where there are no GPUs
#
# MASTER names one of the hosts and a port that is free there. Needs no ssh and no hostfile.
#
# Run: one host with two GPUs; one host, and two hosts (namespaces), with CPU ranks.
set -euo pipefail
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${RANKS:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "${MASTER:-localhost:0}" --rdzv_id "${JOB:-lora-scale}" \
    -m lora_scale train "$@"
