#!/usr/bin/env bash
# One process a GPU through Open MPI's mpirun; tensors travel by NCCL, MPI starts the processes, tells them where rank 0
# is (mpi4py), and ends them all when one fails:
#
#     RANKS=8 launch/mpirun.sh configs/run.yaml lora.r=16
#     RANKS=16 HOSTFILE=hosts launch/mpirun.sh configs/run.yaml     # hosts: one line a host, "node-a slots=8"
#
# `--bind-to none`: Open MPI would pin each process to one core. As root set OMPI_ALLOW_RUN_AS_ROOT=1 and
# OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1. `-m mpi4py`: without it an exception leaves mpirun waiting in MPI_Finalize.
#
# Run: one host with two GPUs (Open MPI 5.0.11); two hosts (namespaces, Open MPI 4.1.4) with CPU ranks.
set -euo pipefail
names=()
for name in PATH LD_LIBRARY_PATH PYTHONPATH DS_ACCELERATOR OMP_NUM_THREADS HF_HOME MASTER_ADDR MASTER_PORT \
    $(compgen -e | grep -E '^(NCCL|GLOO)_' || true); do
    if [ -n "${!name:-}" ]; then names+=(-x "$name"); fi
done
exec mpirun -np "${RANKS:?set it to the number of processes}" ${HOSTFILE:+--hostfile "$HOSTFILE"} --bind-to none \
    "${names[@]}" \
    python -m mpi4py -m lora_scale train "$@"
