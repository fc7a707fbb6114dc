"""Who is who: launchers' variables, and ranks that fail together."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks

from lora_scale.parallel import network
from lora_scale.parallel.world import World, from_environment, on_every_rank, on_rank_zero
from lora_scale.spec.errors import CheckpointError, ConfigError, TrainingError

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
SLURM = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World("deepspeed or torchrun", 3, 8, 1)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            World("openmpi", 1, 2, 0),
        ),
        (SLURM | {"SLURM_STEP_ID": "0"}, World("slurm", 9, 16, 1)),
        (SLURM, None),  # a batch script has them too: no srun, no step
        (SLURM | {"SLURM_STEP_ID": "4294967291"}, None),  # Slurm's number for the batch script
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
        (SLURM | {"SLURM_STEP_ID": "0"} | TORCH, World("deepspeed or torchrun", 3, 8, 1)),  # torchrun inside srun
        (SLURM | {"SLURM_STEP_ID": "2"} | MPI, World("openmpi", 1, 2, 0)),  # mpirun starts its daemons by srun
        (SLURM | {"SLURM_STEP_ID": "0", "PMI_RANK": "9", "PMI_SIZE": "16"}, World("slurm", 9, 16, 1)),  # --mpi=pmi2
        (MPI | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, World("deepspeed or torchrun", 1, 2, 0)),
        (MPI | TORCH | {"TORCHELASTIC_RUN_ID": "x"}, World("deepspeed or torchrun", 3, 8, 1)),
        (TORCH | {"LORA_SCALE_WORLD_SIZE": "8"}, World("deepspeed or torchrun", 3, 8, 1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, World("mpich", 0, 2, 0)),
        ({}, None),
    ],
)
def test_launchers(env: dict[str, str], expected: World | None) -> None:
    assert from_environment(env) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "8", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK=8 with WORLD_SIZE=8"),
        ({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK='x' in the environment; expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, "RANK, WORLD_SIZE set but not LOCAL_RANK; start with deepspeed or torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK set but not OMPI_.* start with mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_RANK, PMI_SIZE set but not MPI_LOCALRANKID"),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "8"}, "LOCAL_RANK=8 with WORLD_SIZE=8"),
        (MPI | TORCH, "RANK=3 WORLD_SIZE=8 of deepspeed or torchrun disagrees with OMPI_COMM_WORLD_RANK=1 .* openmpi"),
        (TORCH | {"LORA_SCALE_WORLD_SIZE": "16"}, "LORA_SCALE_WORLD_SIZE is 16, but .* started a world of 8"),
        ({"LORA_SCALE_WORLD_SIZE": "2"}, "LORA_SCALE_WORLD_SIZE is 2, but no launcher started this process"),
        ({"LORA_SCALE_WORLD_SIZE": "two"}, "LORA_SCALE_WORLD_SIZE='two' in the environment; expected a number"),
    ],
)
def test_variables_that_make_no_sense(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_environment(env)


def agree(here: World) -> dict[str, Any]:
    """What every rank gets when one raises; a rank that waits for another in a collective would run into the time
    limit."""

    def only(rank: int, error: Exception) -> int:
        if here.rank == rank:
            raise error
        return here.rank

    found: dict[str, Any] = {"value": on_rank_zero(lambda: 42), "own": on_every_rank(lambda: here.rank)}
    begin = time.monotonic()
    for name, call in {
        "first": lambda: on_rank_zero(lambda: only(0, CheckpointError("file: 0 bytes"))),
        "second": lambda: on_every_rank(lambda: only(1, CheckpointError("file: 1 byte"))),
        "foreign": lambda: on_rank_zero(lambda: only(0, OSError("disk full"))),
    }.items():
        try:
            call()
        except (CheckpointError, TrainingError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.monotonic() - begin
    return found


@pytest.mark.ranks
def test_all_ranks_fail_together(tmp_path: Path) -> None:
    everyone = run_ranks(3, "test_world:agree", folder=tmp_path)
    for rank, found in enumerate(everyone):
        assert found["value"] == 42
        assert found["own"] == rank
        assert found["first"] == "CheckpointError: file: 0 bytes"
        assert found["second"].endswith("file: 1 byte")
        assert found["foreign"].endswith("disk full")
        assert found["seconds"] < 100


def late_group(here: World) -> int:
    """Rank 0 is done at once; rank 1 makes a group of its own later, by way of the store that rank 0 holds."""
    if here.rank == 0:
        return 0
    time.sleep(1.0)
    return dist.get_world_size(dist.new_group([here.rank], use_local_synchronization=True))


@pytest.mark.ranks
def test_a_rank_that_is_done_waits_for_the_others(tmp_path: Path) -> None:
    assert run_ranks(2, "test_world:late_group", folder=tmp_path) == [0, 1]


def test_a_free_port_is_none_that_the_kernel_gives_away() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {network.free_port() for _ in range(20)}
    assert len(ports) > 10 and all(1024 <= port < low for port in ports)


def test_an_engine_of_deepspeed_does_not_import_a_compiler() -> None:
    """Its Muon optimizer would: four seconds of every rank."""
    says = "import sys; from lora_scale.parallel import world; world._deepspeed(); "
    says += "import deepspeed.runtime.zero.muon.muon_optimizer as muon; "
    says += "print(hasattr(muon, 'MuonWithAuxAdam'), 'torch._inductor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True False"
