"""A small process that only saves, prunes and resumes, and a parent that kills it around every system call.

`python atomic_worker.py FOLDER KILLS SEED` prints one line of JSON, or fails at the first lie. Imports no torch, so
that a life takes milliseconds. What a power cut leaves is another test: here every written page survives.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_scale.storage import checkpoints, durable
from lora_scale.storage.weights import Reader, read_safetensors, write_safetensors

CALLS = ("open", "write", "mkdir", "fsync", "rename", "unlink", "rmdir")
KEEP = 2
SAVES_A_LIFE = 2


def payload(step: int) -> bytes:
    return random.Random(step).randbytes(200)


def save(folder: Path, step: int) -> None:
    """What a training checkpoint writes; one file is written as PEFT does, not through `durable`."""
    with durable.whole_directory(folder / checkpoints.name(step)) as partial:
        specs = [("a", "U8", (120,)), ("b", "U8", (80,))]
        write_safetensors(partial / "adapter_model.safetensors", specs, [payload(step)[:120], payload(step)[120:]])
        (partial / "adapter_config.json").write_text(json.dumps({"r": step}))
        durable.write_text_atomically(partial / "state.json", json.dumps({"step": step}))


def newest(folder: Path) -> int:
    """The newest checkpoint's step, or 0. Every folder with a checkpoint's name must hold what was saved."""
    found = checkpoints.list_checkpoints(folder)
    assert not checkpoints.list_damaged(folder), checkpoints.list_damaged(folder)
    with Reader() as reader:
        for step, path in found:
            content = bytearray()
            for entry in read_safetensors(path / "adapter_model.safetensors")[0].values():
                content += bytearray(entry.nbytes)
                reader.read_into(entry.whole(), memoryview(content)[-entry.nbytes :])
            assert content == payload(step), f"{path} holds other bytes than were saved"
            assert json.loads((path / "adapter_config.json").read_text()) == {"r": step}
    return found[-1][0] if found else 0


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


def live(folder: Path, report: Callable[[str, int], None]) -> None:
    """One life of the worker. A step is reported as soon as its save returns."""
    durable.remove_leftovers(folder)
    assert not leftovers(folder)
    start = newest(folder)
    report("resumed", start)
    for step in range(start + 1, start + 1 + SAVES_A_LIFE):
        save(folder, step)
        report("saved", step)
        checkpoints.prune(folder, KEEP)
        assert len(checkpoints.list_checkpoints(folder)) <= KEEP


def watch(on_call: Callable[[str, str, tuple[Any, ...]], None]) -> None:
    """Calls `on_call` with "before", then "after", at every system call that changes the disk."""
    for name in CALLS:
        real = (lambda fd: None) if name == "fsync" else getattr(os, name)

        def watched(*args: Any, name: str = name, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
            on_call("before", name, args)
            result = real(*args, **kwargs)
            on_call("after", name, args)
            return result

        setattr(os, name, watched)


def die_at(n: int, moment: str) -> None:
    """SIGKILL to ourselves at the nth call: before it, after it, or, for a write, when half of it is written."""
    count, write = 0, os.write

    def on_call(when: str, name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        count += when == "before"
        if count == n and when == ("after" if moment == "after" else "before"):
            if moment == "half" and name == "write":
                write(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    watch(on_call)


def calls_of_a_life(folder: Path) -> list[str]:
    """The calls of an undisturbed life that finds KEEP checkpoints and no leftovers."""
    names: list[str] = []
    reader, writer = os.pipe()
    if not os.fork():
        live(folder, lambda *_: None)
        write = os.write
        watch(lambda when, name, _: names.append(name) if when == "before" else None)
        live(folder, lambda *_: None)
        write(writer, json.dumps(names).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        names = json.loads(pipe.read())
    os.wait()
    return names


def one_life(folder: Path, n: int, moment: str) -> tuple[list[tuple[str, int]], bool]:
    """Forks a worker that dies at its nth call; what it reported, and whether it was killed (or finished before)."""
    reader, writer = os.pipe()
    if not os.fork():
        write = os.write
        die_at(n, moment)
        code = 1
        try:
            live(folder, lambda event, step: write(writer, f"{event} {step}\n".encode()) and None)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        reports = [(event, int(step)) for event, step in map(str.split, pipe)]
    _, status = os.wait()
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, "the worker failed by itself"
    return reports, killed


def main(folder: Path, n_kills: int, seed: int) -> None:
    start = time.perf_counter()
    names = calls_of_a_life(folder)
    points = [(n, moment) for n in range(1, len(names) + 1) for moment in ("before", "after")]
    points += [(n, "half") for n, name in enumerate(names, 1) if name == "write"]
    rng = random.Random(seed)
    kills, reported, with_leftovers, queue = 0, newest(folder), 0, []
    while kills < n_kills:
        queue = queue or rng.sample(points, len(points))
        n, moment = queue.pop()
        before = newest(folder)
        events, killed = one_life(folder, n, moment)
        resumed = [step for event, step in events if event == "resumed"]
        assert resumed in ([], [before]), f"resumed at {resumed}, but {before} was whole"
        last = events[-1][1] if events else before
        assert newest(folder) in (last, last + 1), f"{newest(folder)} is newest, the worker got to {last}"
        reported = max([reported, *(step for event, step in events if event == "saved")])
        assert newest(folder) >= reported, f"{newest(folder)} is newest, {reported} was reported"
        kills += killed
        with_leftovers += bool(leftovers(folder))
    result = {"kills": kills, "points": len(points), "steps": newest(folder), "with_leftovers": with_leftovers}
    print(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
