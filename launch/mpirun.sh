#!/usr/bin/env bash
# One process a GPU through Open MPI's mpirun; tensors travel by NCCL, MPI only starts the processes:
#
#     RANKS=8 launch/mpirun.sh configs/run.yaml lora.r=16
#     RANKS=16 HOSTFILE=hosts launch/mpirun.sh configs/run.yaml     # hosts: one line a host, "node-a slots=8"
#
# MASTER_ADDR is the first host of the hostfile, where mpirun starts rank 0. `--bind-to none`: Open MPI would pin each
# process to one core. As root set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1.
#
# Run: one host, CPU ranks, by hand (Open MPI 5.0.11). Not run yet: a hostfile.
set -euo pipefail
first=127.0.0.1
if [ -n "${HOSTFILE:-}" ]; then first=$(awk '!/^#/ && NF {print $1; exit}' "$HOSTFILE"); fi
export MASTER_ADDR="${MASTER_ADDR:-$first}" MASTER_PORT="${MASTER_PORT:-29500}"
exec mpirun -np "${RANKS:?set it to the number of processes}" ${HOSTFILE:+--hostfile "$HOSTFILE"} --bind-to none \
    -x PATH -x MASTER_ADDR -x MASTER_PORT \
    python -m lora_scale train "$@"
