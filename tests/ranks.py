"""Run a function of a test module on N ranks of this machine, each a fresh process, and judge what they return.

A rank writes its result before it leaves the process group, so that a hang or an abort in the tear-down of a library
cannot turn a right result into a failure, nor hide a wrong one. A rank that is late is killed and its log is shown.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def run_ranks(size: int, function: str, *args: Any, folder: Path, timeout: float = 240.0) -> list[Any]:
    """Results of `module:function(*args)` on ranks 0..size-1. Arguments travel as JSON, results by torch.save.

    Raises AssertionError with the first failing rank's traceback. `folder` must be fresh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, logs = [], []
    for rank in range(size):
        logs.append((folder / f"rank-{rank}.txt").open("w"))
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, str(TESTS / "ranks.py"), function, str(folder), json.dumps(args)]
        processes.append(subprocess.Popen(command, env=env, stdout=logs[-1], stderr=subprocess.STDOUT))
    outcomes = [folder / f"result-{rank}.pt" for rank in range(size)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not all(path.exists() for path in outcomes):
        if any(p.poll() not in (None, 0) and not path.exists() for p, path in zip(processes, outcomes, strict=True)):
            time.sleep(1.0)  # let the others write what they know
            break
        time.sleep(0.05)
    for process in processes:
        try:
            process.wait(timeout=10.0 if all(path.exists() for path in outcomes) else 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for log in logs:
        log.close()
    results = []
    for rank, path in enumerate(outcomes):
        text = (folder / f"rank-{rank}.txt").read_text()
        assert path.exists(), f"rank {rank} of {size} gave no result within {timeout:.0f} s:\n{text[-4000:]}"
        found = torch.load(path, weights_only=False)
        assert found["error"] is None, f"rank {rank} of {size}:\n{found['error']}\n{text[-2000:]}"
        results.append(found["result"])
    return results


def _main() -> None:
    from lora_scale.parallel import world

    name, folder, args = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    module, _, function = name.partition(":")
    result, error = None, None
    try:
        here = world.start(world.from_environment(), timeout_minutes=2.0)
        result = getattr(importlib.import_module(module), function)(here, *args)
    except BaseException:
        error = traceback.format_exc()
    partial = folder / f"result-{rank}.tmp"
    torch.save({"result": result, "error": error}, partial)
    partial.rename(folder / f"result-{rank}.pt")
    if error is not None:
        os._exit(1)
    world.stop()


if __name__ == "__main__":
    _main()
