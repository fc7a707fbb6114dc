"""Faults put into a run on two hosts at random moments: is the cause named, is nothing left, does it go on by itself?

    python tests/faults.py --times 10 --out docs/benchmarks/DATE-faults.json      as root; 2 minutes each

Hosts are namespaces of this machine (tests/hosts.py), ranks are CPU processes over gloo, jobs are started by
`lora-scale launch`.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hosts import CLEAN, ROOT, Cluster, Host, check, cluster, wait_for  # noqa: E402
from tiny import tiny_folder  # noqa: E402
from training import write_rows  # noqa: E402

from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.runlog import FINISHED, read_metrics  # noqa: E402

STEPS = 30
CONFIG = f"""\
model: {{path: model}}
data: {{train: rows.jsonl, seq_len: 48}}
run_dir: run
precision: fp32
recompute: none
lora: {{r: 4, lora_alpha: 8}}
train: {{max_steps: {STEPS}, global_batch_size: 12, lr: 3e-3, schedule: constant}}
save: {{every: 4}}
"""
# In every Python of a host: raise in the main thread once /run/raise is there. Nothing of ours knows of it.
RAISES = """\
import os, threading, time
def watch():
    import ctypes
    while not os.path.exists("/run/raise"):
        time.sleep(0.05)
    if os.environ.get("RANK") == "1":
        main = ctypes.c_ulong(threading.main_thread().ident)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(KeyError))
if os.environ.get("RANK") == "1":
    threading.Thread(target=watch, daemon=True).start()
"""


def prepare(folder: Path) -> None:
    """A tiny model, rows and a config."""
    tiny_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(RAISES)


class Job:
    """`lora-scale launch` on the first host, its screen read as it comes."""

    def __init__(
        self,
        hosts: Cluster,
        folder: Path,
        *words: str,
        run: str = "run",
        launcher: str = "ssh",
        overrides: Sequence[str] = (),
    ):
        self.folder, self.hosts, self.run_dir = folder, hosts, folder / run
        command = ["python", "-m", "lora_scale", "launch", "--hostfile", "hosts", "--launcher", launcher, *words]
        env = {**CLEAN, "PYTHONPATH": f"{ROOT}:{folder / 'site'}"}
        self.process = hosts[0].start(
            [*command, "run.yaml", f"run_dir={run}", *overrides],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def screen(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def step(self) -> int:
        """The last step in its metrics."""
        with contextlib.suppress(Exception):
            return int(read_metrics(self.run_dir)[-1]["step"])
        return 0

    def wait_step(self, number: int, seconds: float = 180.0) -> None:
        def there() -> bool:
            assert self.process.poll() is None, f"ended before step {number}:\n{self.screen}"
            return self.step() >= number

        wait_for(there, f"step {number}", seconds)

    def end(self, seconds: float = 240.0) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {seconds:.0f} s:\n{self.screen}") from None
        self._reader.join(5)
        return code

    def error_after(self, moment: float, seconds: float = 150.0) -> tuple[float, str]:
        """Seconds from `moment` to the first error on the screen, and its text."""
        found: list[tuple[float, str]] = []

        def there() -> bool:
            found[:] = [(at - moment, line) for at, line in list(self.lines) if line.startswith("lora-scale: error")]
            return bool(found) or self.process.poll() is not None

        wait_for(there, "an error", seconds)
        time.sleep(0.2)
        there()
        assert found, f"no error:\n{self.screen}"
        return found[0]

    def errors(self) -> list[str]:
        """What has gone wrong so far, as the screen says it."""
        return [line for _, line in list(self.lines) if line.startswith("lora-scale: error")]

    def supervisor(self) -> int:
        """The process of the verb, by its number outside."""
        mark = f"run_dir={self.run_dir.name}".encode()
        found = [pid for pid in self.hosts[0].processes("--hostfile") if mark in _command(pid)]
        return min(found)

    def losses(self) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in read_metrics(self.run_dir)]


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@dataclass
class Result:
    """One fault, once."""

    fault: str
    at_step: int
    seconds_to_error: float | None  # after the fault; None: there is nobody left to say it
    message: str
    orphans: int
    resumed: str  # "by itself", "by the same command", or "no need"
    resumed_from: int | None
    exit_code: int
    equal: bool  # losses of every step to those of the undisturbed run
    seconds: float


Fault = Callable[[Cluster, Job, Path], None]


def kill_rank(hosts: Cluster, job: Job, folder: Path) -> None:
    os.kill(hosts[1].ranks()[1], signal.SIGKILL)


def stop_rank(hosts: Cluster, job: Job, folder: Path) -> None:
    os.kill(hosts[1].ranks()[1], signal.SIGSTOP)


def kill_sshd(hosts: Cluster, job: Job, folder: Path) -> None:
    for pid in hosts[1].processes("sshd: root"):
        os.kill(pid, signal.SIGKILL)


def kill_launcher(hosts: Cluster, job: Job, folder: Path) -> None:
    os.kill(job.supervisor(), signal.SIGKILL)


def raise_exception(hosts: Cluster, job: Job, folder: Path) -> None:
    hosts[1].run("touch /run/raise", check=True)


def link_down(hosts: Cluster, job: Job, folder: Path) -> None:
    hosts[1].cut()


def power_off(hosts: Cluster, job: Job, folder: Path) -> None:
    hosts[1].power_off()


def disk_full(hosts: Cluster, job: Job, folder: Path) -> None:
    job.wait_step(job.step() // 8 * 8 + 9)  # a checkpoint is written and older ones are gone
    hosts[0].run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", job.run_dir / "checkpoints"], check=True)


def mend(fault: str, hosts: Cluster, job: Job) -> None:
    """What a person or the machine room does after the error."""
    if fault == "link down":
        hosts[1].mend()
    if fault == "power off":
        hosts[1].boot()
    if fault == "disk full":
        hosts[0].run(["umount", job.run_dir / "checkpoints"], check=True)
    if fault == "exception":
        hosts[1].run("rm -f /run/raise", check=True)


DURING: dict[str, tuple[Fault, str]] = {  # in a run: how, and what the error must say
    "SIGKILL of a rank": (kill_rank, r"rank 1 on node-b, step \d+: .*(SIGKILL|ended without a word)"),
    "SIGKILL of the launcher": (kill_launcher, ""),
    "SIGKILL of sshd": (kill_sshd, r"node-b"),
    "exception": (raise_exception, r"rank 1 on node-b, step \d+: .*KeyError"),
    "link down": (link_down, r"node-b \(rank 1\), step \d+: does not answer"),
    "power off": (power_off, r"node-b \(rank 1\), step \d+: does not answer"),
    "disk full": (disk_full, r"No space left|No such file.*checkpoints"),  # the latter: put in amid a write after all
    "SIGSTOP of a rank": (stop_rank, r"rank 1 on node-b, step \d+: is stopped"),
}


def wrong_key(host: Host) -> None:
    other = host.cluster.folder / "ssh" / "id.pub"
    (host.folder / "known_hosts").write_text(f"* {other.read_text()}")


BEFORE: dict[str, tuple[Callable[[Cluster, Path], object], str]] = {  # before a run
    "wrong host key": (lambda hosts, _: wrong_key(hosts[0]), r"node-[ab]: Host key verification failed.*ssh-keygen -R"),
    "environment missing on one host": (
        lambda hosts, _: hosts[1].run(f"mount -t tmpfs tmpfs {Path(sys.executable).parent}", check=True),
        r"node-b: .*(not found|No such file).*environment",
    ),
    "hostfile with an unknown name": (
        lambda _, folder: (folder / "hosts").write_text("node-a slots=1\nnode-x slots=1\n"),
        r"node-x: .*resolve hostname.*correct the name",
    ),
    "hostfile with a typo": (
        lambda _, folder: (folder / "hosts").write_text("node-a slots=1\nnode-b slot=1\n"),
        r"hosts, line 2: 'slot=1' is not understood; did you mean slots=",
    ),
}


def orphans(hosts: Cluster) -> int:
    """Processes of jobs that are still there, on any host."""
    return sum(len(host.processes("lora_scale")) for host in hosts.hosts if host.process.poll() is None)


def during(fault: str, hosts: Cluster, folder: Path, at: int, calm: list[tuple[int, float]], patience: int) -> Result:
    """Start, put the fault in at step `at`, see what happens until the run is finished."""
    inject, wanted = DURING[fault]
    hosts.hostfile(folder / "hosts")
    run = f"run-{time.monotonic_ns()}"
    began = time.monotonic()
    job = Job(hosts, folder, "--patience", str(patience), "--max-restarts", "1", run=run)
    job.wait_step(at)
    moment, step = time.monotonic(), job.step()
    inject(hosts, job, folder)
    seconds: float | None = None
    message = "the launcher itself was killed"
    if wanted:
        seconds, message = job.error_after(moment, 3.0 * patience)
        assert re.search(wanted, message), f"{fault}: {message}\n{job.screen}"
    mend(fault, hosts, job)
    code = job.end()
    resumed = "by itself"
    if not wanted:
        wait_for(lambda: not orphans(hosts), "the end of every rank", 2.0 * patience)
        message += f"; every rank ended by itself after {time.monotonic() - moment:.0f} s"
    left = orphans(hosts)
    if code:
        resumed = "by the same command"
        again = Job(hosts, folder, "--patience", str(patience), run=run)
        code, job = again.end(), again
    found = [int(number) for number in re.findall(r"^resumed .*: (\d+) of", job.screen, re.MULTILINE)]
    equal = code == 0 and job.losses() == calm and (job.run_dir / FINISHED).is_file()
    took = round(time.monotonic() - began, 1)
    rounded = None if seconds is None else round(seconds, 1)
    return Result(fault, step, rounded, message, left, resumed, found[-1] if found else None, code, equal, took)


def before(fault: str, hosts: Cluster, folder: Path) -> Result:
    """A fault that is there from the start: the job must not start."""
    arrange, wanted = BEFORE[fault]
    hosts.hostfile(folder / "hosts")
    arrange(hosts, folder)
    began = time.monotonic()
    job = Job(hosts, folder, run="never")
    code = job.end()
    seconds = round(time.monotonic() - began, 1)
    hosts.hostfile(folder / "hosts")
    errors = job.errors()
    assert errors and re.search(wanted, errors[0]), f"{fault}:\n{job.screen}"
    return Result(fault, 0, seconds, errors[0], orphans(hosts), "no need", None, code, True, seconds)


def two_jobs(hosts: Cluster, folder: Path, calm: list[tuple[int, float]], patience: int) -> Result:
    """Ctrl-C on one of two jobs of one user on the same hosts: it saves and stops, the other one finishes."""
    fault = "Ctrl-C on one of two jobs"
    hosts.hostfile(folder / "hosts")
    began = time.monotonic()
    one = Job(hosts, folder, "--patience", str(patience), run=f"one-{time.monotonic_ns()}")
    other = Job(hosts, folder, "--patience", str(patience), run=f"other-{time.monotonic_ns()}")
    one.wait_step(3, 300)
    moment, step = time.monotonic(), one.step()
    os.kill(one.supervisor(), signal.SIGINT)
    code = one.end()
    seconds = round(time.monotonic() - moment, 1)
    message = one.lines[-1][1] if one.lines else ""
    assert code == 75 and "checkpoint saved" in one.screen, one.screen
    alive = other.end()
    equal = alive == 0 and other.losses() == calm
    took = round(time.monotonic() - began, 1)
    return Result(fault, step, seconds, message, orphans(hosts), "no need", None, code, equal, took)


def slow_link(hosts: Cluster, folder: Path, calm: list[tuple[int, float]]) -> Result:
    """A link with 20 ms more each way: the job goes on to its end, and the link is named."""
    hosts.hostfile(folder / "hosts")
    began = time.monotonic()
    job = Job(hosts, folder, run=f"slow-{time.monotonic_ns()}")
    job.wait_step(1)
    moment, step = time.monotonic(), job.step()
    hosts[1].slow_down(0.02)
    code = job.end(500)
    named = [(at, line) for at, line in job.lines if re.search(r"slow +link between node-b and node-a: \d+ ms", line)]
    assert named, job.screen
    seconds, equal = round(named[0][0] - moment, 1), code == 0 and job.losses() == calm
    took = round(time.monotonic() - began, 1)
    return Result("slow link", step, seconds, named[0][1], orphans(hosts), "no need", None, code, equal, took)


def undisturbed(hosts: Cluster, folder: Path, patience: int) -> list[tuple[int, float]]:
    hosts.hostfile(folder / "hosts")
    job = Job(hosts, folder, "--patience", str(patience), run="calm")
    assert job.end() == 0, job.screen
    return job.losses()


def all_faults(place: Path, times: int, patience: int, seed: int, only: str, done: Callable[[Result], None]) -> None:
    """Every fault so often, each on fresh hosts."""
    draw = random.Random(seed)
    prepare(place)
    with cluster(2, place / "calm-hosts") as hosts:
        calm = undisturbed(hosts, place, patience)
    for number in range(times):
        for fault in [*BEFORE, *DURING, "slow link", "Ctrl-C on one of two jobs"]:
            if not re.search(only, fault):
                continue
            with cluster(2, place / f"hosts-{number}-{re.sub(r'[^a-z]', '', fault.lower())}") as hosts:
                try:
                    done(once(fault, hosts, place, draw, calm, patience))
                except AssertionError as error:  # a row of the record too
                    done(
                        Result(fault, 0, None, f"not as expected: {error}"[:600], orphans(hosts), "", None, 1, False, 0)
                    )


def once(
    fault: str, hosts: Cluster, place: Path, draw: random.Random, calm: list[tuple[int, float]], patience: int
) -> Result:
    """One fault of any kind."""
    if fault in BEFORE:
        return before(fault, hosts, place)
    if fault in DURING:
        return during(fault, hosts, place, draw.randint(2, STEPS - 8), calm, patience)
    return slow_link(hosts, place, calm) if fault == "slow link" else two_jobs(hosts, place, calm, patience)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--patience", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression for the faults' names")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    commit = provenance.commit_of_record("faults")
    check()
    results: list[dict[str, Any]] = []

    def done(result: Result) -> None:
        results.append(asdict(result) | {"message": result.message.replace(sys.prefix, "VENV")})
        print(json.dumps(results[-1]), flush=True)
        record = provenance.head(
            f"faults in a run of {STEPS} steps on two namespace hosts, one CPU rank each, `lora-scale launch` "
            f"(ssh), --patience {arguments.patience}, save.every=4; seconds are on a machine shared with other work",
            "tests/faults.py",
            commit,
        ) | {
            "faults": results,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as place:
        all_faults(Path(place), arguments.times, arguments.patience, arguments.seed, arguments.only, done)
    bad = [found for found in results if found["orphans"] or not found["equal"]]
    print(f"{len(results)} faults, {len(bad)} not as they should be")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
