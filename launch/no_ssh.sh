#!/usr/bin/env bash
# This host's part of a run on several hosts, without ssh: the same command on every host, with its own NODE.
#
#     NODE=0 MASTER=node-a HOSTFILE=hosts launch/no_ssh.sh configs/run.yaml     # on node-a, the first line of hosts
#     NODE=1 MASTER=node-a HOSTFILE=hosts launch/no_ssh.sh configs/run.yaml     # on node-b, the second line
#
# hosts: one line a host, "node-a slots=8"; the names need not be known to the network, MASTER must. PORT must be free
# there. Where something else starts one container a host (Kubernetes: launch/kubernetes.yaml), this is what it runs.
#
# Run: two hosts (namespaces), CPU ranks.
set -euo pipefail
exec deepspeed --no_ssh --hostfile "${HOSTFILE:?the hosts of the job, a line each}" \
    --node_rank "${NODE:?the line of this host in HOSTFILE, from 0}" \
    --master_addr "${MASTER:?the address of the first host}" --master_port "${PORT:-29500}" \
    --no_local_rank --module lora_scale train "$@"
