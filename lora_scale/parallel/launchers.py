"""Which rank of how many a launcher's environment variables say this process is. Knows variables only: no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lora_scale.spec.errors import ConfigError

TOKEN = "LORA_SCALE_LAUNCH"  # names one launch; set by parallel.local and `lora-scale launch` for what they start
EXPECTED = "LORA_SCALE_WORLD_SIZE"  # how many ranks there must be, whatever the launcher says
TORCH, OPENMPI, MPICH, SLURM = "deepspeed or torchrun", "openmpi", "mpich", "slurm"
BY_MPI = (OPENMPI, MPICH)

# launcher: the variables that give rank, world size, and rank on this node. The innermost launcher comes first: a
# Slurm step may have started torchrun, and mpirun uses srun to start its daemons.
LAUNCHERS = {
    TORCH: ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    OPENMPI: ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    MPICH: ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    SLURM: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
_NO_STEP = 4294967290  # Slurm numbers the batch script, the job's shell and its container from here on


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all."""

    launcher: str
    rank: int
    size: int
    local_rank: int


def find(env: Mapping[str, str] = os.environ) -> Place | None:
    """The place a launcher gave this process, or None when none started it. ConfigError when variables disagree."""
    places = [place for launcher in LAUNCHERS if (place := _place(launcher, env))]
    found = places[0] if places else None
    by_mpi = [place for place in places[1:] if place.launcher in BY_MPI]
    if found and by_mpi and "TORCHELASTIC_RUN_ID" not in env and _differ(found, by_mpi[0]):
        one, other = (f"{_said(place, env)} of {place.launcher}" for place in (found, by_mpi[0]))
        raise ConfigError(f"{one} disagrees with {other}; unset what an earlier launcher has left")
    expected = _number(env, EXPECTED) if EXPECTED in env else None
    if expected is not None and expected != (found.size if found else 1):
        said = f"{found.launcher} started a world of {found.size}" if found else "no launcher started this process"
        raise ConfigError(
            f"{EXPECTED} is {expected}, but {said}; an mpirun of another MPI, or a launcher that did not "
            "reach every host, does that"
        )
    return found


def _place(launcher: str, env: Mapping[str, str]) -> Place | None:
    names = LAUNCHERS[launcher]
    if launcher == SLURM and not _in_step(env):
        return None
    there = [name for name in names if name in env]
    if launcher == MPICH and "MPI_LOCALRANKID" not in there and _in_step(env):
        return None  # srun --mpi=pmi2 sets the other two
    if not there:
        return None
    if len(there) < len(names):
        missing = sorted(set(names) - set(there))
        way = "start with deepspeed or torchrun, or unset them"
        if launcher != TORCH:
            way = f"start with {'srun' if launcher == SLURM else 'mpirun'}, or unset them"
        raise ConfigError(f"{', '.join(sorted(there))} set but not {', '.join(missing)}; {way}")
    rank, size, local_rank = (_number(env, name) for name in names)
    for name, value in ((names[0], rank), (names[2], local_rank)):
        if not 0 <= value < size:
            raise ConfigError(f"{name}={value} with {names[1]}={size}: a rank lies between 0 and the world size")
    if launcher == SLURM and size == 1:
        return None  # an interactive shell (srun --pty), in which a person starts what they like
    return Place(launcher, rank, size, local_rank)


def _in_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has rank variables too, but no step, or a reserved one."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _NO_STEP


def _differ(one: Place, other: Place) -> bool:
    return (one.rank, one.size) != (other.rank, other.size)


def _said(place: Place, env: Mapping[str, str]) -> str:
    rank, size, _ = LAUNCHERS[place.launcher]
    return f"{rank}={env[rank]} {size}={env[size]}"


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r} in the environment; expected a number set by the launcher") from None
