"""Runs cut into jobs, and runs without a network, through the real command line; what happened, as JSON.

Each job is a fork of this process, as in wrong_inputs.py: nothing is imported again.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import wrong_inputs  # noqa: E402
from wrong_inputs import Case, answer  # noqa: E402

from lora_scale.storage import checkpoints  # noqa: E402
from lora_scale.storage.runlog import read_metrics  # noqa: E402

STEPS = 5
MORE = [
    f"train.max_steps={STEPS}",
    "train.micro_batch_size=6",
    "data.validation=0.2",
    "eval.every=2",
    "save.best=val_loss",
    "lora.dropout=0.1",
]
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


def job(
    folder: Path, run: str, *more: str, verb: str = "train", env: dict[str, str] | None = None, arrange: Any = None
) -> Any:
    """One job; its exit code and screen."""
    (folder / "screen.txt").unlink(missing_ok=True)
    case = Case("", run, ("run.yaml", *MORE, f"run_dir={run}", *more), arrange or (lambda: None), env or {}, verb=verb)
    return answer(case, folder)


def outcome(folder: Path, run: str) -> dict[str, Any]:
    """All that must not depend on how a run was cut."""
    place = folder / run / "checkpoints"
    tensors = {
        file.name: file.read_bytes().hex() for file in sorted((place / checkpoints.name(STEPS)).glob("*.safetensors"))
    }
    rows = [[row.get(key) for key in SAME] for row in read_metrics(folder / run)]
    return {"rows": rows, "tensors": tensors, "best": os.readlink(place / "best"), "kept": sorted(os.listdir(place))}


def slices(folder: Path) -> dict[str, Any]:
    whole = job(folder, "whole")
    jobs = [
        job(folder, "cut", env={"SLURM_JOB_END_TIME": str(int(time.time()) + 20)}),  # the reserve alone is more
        job(folder, "cut", "max_hours=0.000001"),
        job(folder, "cut", arrange=at_step(folder / "cut", 3, signal.SIGUSR1)),
        job(folder, "cut"),
    ]
    last_words = [found.screen.splitlines()[-1] for found in jobs]
    return {
        "whole": [whole.code, outcome(folder, "whole")],
        "cut": [[found.code for found in jobs], last_words, outcome(folder, "cut")],
    }


def at_step(run: Path, step: int, number: int) -> Callable[[], None]:
    """In the job: a signal once that step is in its records."""

    def watch() -> None:
        while f'"step":{step}' not in (run / "metrics.jsonl").read_text():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    return lambda: threading.Thread(target=watch, daemon=True).start()


def early(folder: Path) -> list[Any]:
    """Validation on other tokens than are trained gets worse at once; and the finished run, queued again."""
    more = ("early_stop.patience=2", "eval.every=1", "train.max_steps=40", "train.lr=0.5", "train.max_grad_norm=0")
    return [[found.code, found.screen.splitlines()[-1]] for found in (job(folder, "early", *more) for _ in range(2))]


def no_route() -> None:
    """This process into a network of its own with nothing but 127.0.0.1; needs root."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket() as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sH14x", b"lo", 0x1))  # SIOCSIFFLAGS, IFF_UP


def offline(folder: Path) -> dict[str, Any]:
    """A model by its name on the hub, from the cache; and what is said when it is not there."""
    hub = folder / "hub" / "models--org--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder / "model", hub / "snapshots" / ("0" * 40))
    env = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}

    def arrange() -> None:
        from huggingface_hub import constants

        constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(folder / "hub"), False
        no_route()
        with socket.socket() as probe:
            assert probe.connect_ex(("192.0.2.1", 443)), "there is a route"

    found = {}
    for verb in ("prepare", "train"):
        done = job(folder, "away", "model=org/model", "train.max_steps=2", verb=verb, env=env, arrange=arrange)
        found[verb] = [done.code, done.screen]
    absent = job(folder, "away", "model=org/other", env=env, arrange=arrange)
    return found | {"absent": [absent.code, absent.message]}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "prepared")
        wrong_inputs.prepare(folder)
        found: dict[str, Any] = {"slices": slices(folder), "early": early(folder)}
        if os.geteuid() == 0:
            found["offline"] = offline(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
