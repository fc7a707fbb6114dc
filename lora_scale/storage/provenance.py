"""Where a result comes from: the command, the commit of this program, the versions of what it stands on. No heavy
import."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lora_scale

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
    "mpi4py",
    "liger-kernel",
    "triton",
    "flash-attn-3",
    "xformers",
)


def versions() -> dict[str, str]:
    """Of this program, Python, and the packages that are installed."""
    found = {"lora-scale": lora_scale.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree that this code runs from, with `+changes` when files differ from it.

    None for an installed package; LORA_SCALE_COMMIT tells it for a copy of the tree without its .git.
    """
    if given := os.environ.get("LORA_SCALE_COMMIT"):
        return given
    root = Path(lora_scale.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def head(what: str, program: str, commit: str | None, hardware: str = "") -> dict[str, Any]:
    """What a record of a script begins with; on this machine's CPU cores, where no hardware is given."""
    return {
        "what": what,
        "command": " ".join([f"python {program}", *sys.argv[1:]]),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": versions(),
        "hardware": hardware or f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }


def commit_of_record(program: str, refuse: bool = True) -> str | None:
    """The commit as a measurement begins; SystemExit where its record could not say which program it is of."""
    found = commit()
    if refuse and (not found or found.endswith("+changes")):
        raise SystemExit(f"{program}: the tree has uncommitted changes, or no commit is known; commit first")
    return found


def command() -> list[str]:
    """The command line as Python got it."""
    return ["lora-scale", *sys.argv[1:]]


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
