"""Run a function of a test module on N ranks of this machine, each a process of its own, and judge what they return.

The processes are forked from one that has imported the heavy packages, which takes longer than most cases.
A rank writes its result before it leaves the process group, so that a hang or an abort in the tear-down of a library
cannot turn a right result into a failure, nor hide a wrong one. A rank that is late is killed and its log is shown.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lora_scale.parallel.network import free_port

TESTS = Path(__file__).parent
HEAVY = ["torch.distributed", "deepspeed", "transformers.models.llama.modeling_llama", "peft", "training"]
HEAVY += ["lora_scale.commands.train", "torch._dynamo"]
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a rank


@dataclass(frozen=True)
class Done:
    """How a script ended: its exit code and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def run_ranks(
    size: int, function: str, *args: Any, folder: Path, timeout: float = 600.0, per_node: int | None = None
) -> list[Any]:
    """Results of `module:function(world, *args)` on ranks 0..size-1. Arguments travel pickled, results by torch.save.

    `per_node` ranks have local ranks of their own, as on one node of several. Raises AssertionError with the first
    failing rank's traceback. `folder` must be fresh.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = warm()
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank % (per_node or size))}
        processes.append(context.Process(target=_main, args=(shared | place, function, folder, args), daemon=True))
        processes[-1].start()
    outcomes = [folder / f"result-{rank}.pt" for rank in range(size)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not all(path.exists() for path in outcomes):
        if any(p.exitcode not in (None, 0) and not path.exists() for p, path in zip(processes, outcomes, strict=True)):
            time.sleep(1.0)  # let the others write what they know
            break
        time.sleep(0.02)
    for process in processes:
        process.join(10.0 if all(path.exists() for path in outcomes) else 0.1)
        if process.exitcode is None:
            process.kill()
            process.join()
    results = []
    for rank, path in enumerate(outcomes):
        text = (folder / f"rank-{rank}.txt").read_text()
        assert path.exists(), f"rank {rank} of {size} gave no result within {timeout:.0f} s:\n{text[-4000:]}"
        found = torch.load(path, weights_only=False)
        assert found["error"] is None, f"rank {rank} of {size}:\n{found['error']}\n{text[-2000:]}"
        results.append(found["result"])
    return results


def warm() -> BaseContext:
    """Processes of this context begin with the heavy packages imported, but on a GPU."""
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # read when deepspeed is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; a fork of a fork cannot set it
    if on_gpu:
        return multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def run_script(name: str, *arguments: str, folder: Path, timeout: float = 600.0) -> Done:
    """`python tests/NAME.py ARGUMENTS` from the repository's root, without the time that its imports take. The script
    has a `main`; what it forks is forked from a process that has imported everything."""
    screens = folder / f"{name}-out.txt", folder / f"{name}-err.txt"
    return _finish(warm().Process(target=_script, args=(name, arguments, *screens)), name, screens, timeout)


def _finish(process: BaseProcess, name: str, screens: tuple[Path, Path], timeout: float) -> Done:
    process.start()
    process.join(timeout)
    late = process.exitcode is None
    if late:
        process.kill()
        process.join()
    out, err = (screen.read_text() if screen.exists() else "" for screen in screens)
    assert not late, f"{name} still ran after {timeout:.0f} s:\n{out}\n{err}"
    return Done(process.exitcode or 0, out, err)


def run_verb(*arguments: str, folder: Path, timeout: float = 600.0) -> Done:
    """`lora-scale ARGUMENTS` by one process in `folder`, without the time that its imports take."""
    screens = folder / f"{arguments[0]}-out.txt", folder / f"{arguments[0]}-err.txt"
    return _finish(warm().Process(target=_verb, args=(arguments, folder, *screens)), arguments[0], screens, timeout)


def _verb(arguments: tuple[str, ...], folder: Path, out: Path, err: Path) -> None:
    from lora_scale import cli

    _begin(folder, out, err)
    cli.main(list(arguments))


def _script(name: str, arguments: tuple[str, ...], out: Path, err: Path) -> None:
    _begin(TESTS.parent, out, err)
    sys.argv = [f"tests/{name}.py", *arguments]
    importlib.import_module(name).main()


def _begin(folder: Path, out: Path, err: Path) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    for variable in PLACE:
        os.environ.pop(variable, None)
    os.chdir(folder)


def _main(environment: dict[str, str], name: str, folder: Path, args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    with (folder / f"rank-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    from lora_scale.parallel import world

    module, _, function = name.partition(":")
    result, error = None, None
    try:
        here = world.start(world.from_environment(), timeout_minutes=5.0)
        result = getattr(importlib.import_module(module), function)(here, *args)
    except BaseException:
        error = traceback.format_exc()
    partial = folder / f"result-{rank}.tmp"
    torch.save({"result": result, "error": error}, partial)
    partial.rename(folder / f"result-{rank}.pt")
    if error is not None:
        os._exit(1)
    _wait_for_all(folder, int(environment["WORLD_SIZE"]))
    world.stop()


def _wait_for_all(folder: Path, size: int) -> None:
    """Stay until every rank has its result: rank 0 holds the store by which the others still make their groups."""
    while not all((folder / f"result-{rank}.pt").exists() for rank in range(size)):
        time.sleep(0.02)  # a rank that fails, or is late, has us killed
