#!/usr/bin/env bash
# All GPUs of this host, or of the hosts in a hostfile, through DeepSpeed's launcher (pdsh and ssh):
#
#     launch/deepspeed.sh configs/run.yaml lora.r=16
#     HOSTFILE=hosts launch/deepspeed.sh configs/run.yaml     # hosts: one line a host, "node-a slots=8"
#     RANKS=2 launch/deepspeed.sh configs/run.yaml            # so many GPUs a host; on a machine without GPUs, CPU ranks
#
# Several hosts: pdsh here, ssh without a password to each, and repository, environment and data under the same paths.
# PATH and what NCCL and gloo need reach them by DeepSpeed's file of variables, written here and removed at the end.
# pdsh waits for ever when one host fails: `lora-scale launch` does not.
#
# Run: one host with two GPUs; one host, and two hosts (namespaces), with CPU ranks.
set -euo pipefail
variables=$(mktemp)
trap 'rm -f "$variables"' EXIT
env | grep -E '^(PATH|LD_LIBRARY_PATH|DS_ACCELERATOR|OMP_NUM_THREADS|HF_HOME|(NCCL|GLOO)_[A-Z_]+)=[][[:alnum:]_@%+=:,./^-]*$' \
    >"$variables" || true
export DS_ENV_FILE=$variables
deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${RANKS:+--num_gpus "$RANKS"} \
    --no_local_rank --module lora_scale train "$@"
