"""What MPI is for here: to find rank 0 when nobody said where it is, and to end every rank at once.

The only door to mpi4py, whose import calls MPI_Init: only under an MPI launcher, and never for tensors, which travel
by NCCL or gloo.
"""

import contextlib
import importlib
import sys
from typing import Any

import numpy as np

from lora_scale.parallel import network
from lora_scale.spec.errors import ConfigError

_PLACE = 64  # bytes in which rank 0's "address:port" travels; as bytes, not as a pickle


def meet(rank: int, size: int) -> tuple[str, str]:
    """(MASTER_ADDR, MASTER_PORT): rank 0's own, told to all ranks by MPI. ConfigError without a working mpi4py."""
    mpi = _mpi()
    comm = mpi.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (rank, size):
        raise ConfigError(
            f"mpirun says rank {rank} of {size}, but mpi4py's library says {comm.Get_rank()} of {comm.Get_size()}: it "
            "belongs to another MPI; set MPI4PY_MPIABI or reinstall mpi4py, or set MASTER_ADDR and MASTER_PORT"
        )
    told = np.zeros(_PLACE, np.uint8)
    if rank == 0:
        said = f"{network.own_address()}:{network.free_port()}".encode()
        told[: len(said)] = np.frombuffer(said, np.uint8)
    comm.Bcast(told, root=0)
    address, _, port = told.tobytes().rstrip(b"\0").decode().rpartition(":")
    return address, port


def end_all(code: int) -> None:
    """End every rank of the job with `code`, where this process is in MPI; elsewhere nothing."""
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        with contextlib.suppress(Exception):  # it is the last thing this process does
            module.COMM_WORLD.Abort(code)


def _mpi() -> Any:
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR and MASTER_PORT are not set, and mpi4py cannot tell them ({why}); set both, to the first "
            "rank's host and a free port there, or pip install mpi4py"
        ) from error
