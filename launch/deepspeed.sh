#!/usr/bin/env bash
# All GPUs of this host, or of the hosts in a hostfile, through DeepSpeed's launcher:
#
#     launch/deepspeed.sh configs/run.yaml lora.r=16
#     HOSTFILE=hosts launch/deepspeed.sh configs/run.yaml     # hosts: one line a host, "node-a slots=8"
#     RANKS=2 launch/deepspeed.sh configs/run.yaml            # so many GPUs a host; on a machine without GPUs, CPU ranks
#
# Several hosts: pdsh here, ssh without a password to each, and repository, environment and data under the same paths.
# Variables that the other hosts need (PATH, HF_HOME, NCCL_...): KEY=VALUE lines in ~/.deepspeed_env, no comment and
# no blank line among them.
#
# Run: one host, CPU ranks. Not run yet: a hostfile.
set -euo pipefail
exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${RANKS:+--num_gpus "$RANKS"} \
    --no_local_rank --module lora_scale train "$@"
