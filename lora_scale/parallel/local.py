"""Starting local ranks through DeepSpeed's own launcher when no launcher started us, and saying the equivalent command."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch

from lora_scale.parallel.world import free_port
from lora_scale.spec.errors import UsageError


def default_ranks() -> int:
    """One rank a visible GPU; one process where there is none."""
    return max(1, torch.cuda.device_count())


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The `deepspeed` command that runs `lora-scale ARGUMENTS` on `ranks` local ranks."""
    return [
        "deepspeed",
        "--log_level",
        "critical",
        "--num_gpus",
        str(ranks),
        "--no_local_rank",
        "--module",
        "lora_scale",
        *arguments,
    ]


def run(ranks: int, arguments: Sequence[str]) -> int:
    """Run it and return its exit code. The launcher is called as a module: it need not be on PATH."""
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UsageError(f"--ranks is {ranks}, but {gpus} GPUs are visible; use at most {gpus}")
    env = dict(os.environ)
    if not gpus:  # the launcher counts "accelerators" by cores on a CPU machine, and threads of all ranks would fight
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        env.setdefault("LOCAL_SIZE", str(ranks))
    shown = command(ranks, arguments)
    full = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port()), *shown[1:]]
    return subprocess.run(full, env=env, check=False).returncode


def shown(ranks: int, arguments: Sequence[str]) -> str:
    """The command as a person would type it."""
    return shlex.join(part for part in command(ranks, arguments) if part not in ("--log_level", "critical"))
