"""Several hosts, each a namespace with its own address and sshd: every way to start a run trains the same, what hurts
is told beforehand, and a fault ends the job with a name and is survived."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import BEFORE, DURING, STEPS, Job, before, kill_rank, orphans, prepare
from hosts import CLEAN, IS_ROOT, ROOT, WAY, Cluster, Local, check, cluster
from ranks import run_verb
from slurm import start_slurm

from lora_scale.storage.runlog import FINISHED, read_metrics

pytestmark = pytest.mark.ranks
SHORT = 5  # steps of the runs that only compare launchers
needs_root = pytest.mark.skipif(not IS_ROOT, reason=WAY)  # as root they fail, and do not skip, without namespaces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[int, list[float]]:
    """Losses of a run of one process, by its number of steps: the learning rate depends on that."""
    found = {}
    for steps in (SHORT, STEPS):
        words = ("run.yaml", f"run_dir=alone-{steps}", f"train.max_steps={steps}")
        done = run_verb("train", *words, folder=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        found[steps] = losses(folder / f"alone-{steps}")
    return found


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Cluster]:
    check()
    with cluster(2, tmp_path / "hosts") as made:
        yield made


def losses(run: Path) -> list[float]:
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def words(run: str) -> list[str]:
    return ["run.yaml", f"run_dir={run}", f"train.max_steps={SHORT}"]


def judge(folder: Path, run: str, codes: list[int], output: str, alone: dict[int, list[float]], ranks: int) -> None:
    """Sums over ranks are taken in another order than by one process: some 1e-7 a step."""
    assert codes == [0] * len(codes), output
    assert losses(folder / run) == pytest.approx(alone[SHORT], rel=1e-5)
    pace = next(row["pace"] for row in read_metrics(folder / run) if "pace" in row)
    assert len(pace["work_ms"]) == len(pace["reply_ms"]) == ranks and min(pace["work_ms"] + pace["reply_ms"]) > 0
    assert json.loads((folder / run / FINISHED).read_text()) == {"steps": SHORT, "ranks": ranks}


def each(
    machines: list[Local], folder: Path, commands: list[list[str]], envs: list[dict[str, str]]
) -> tuple[list[int], str]:
    """One command on each host, at the same time: their exit codes and all they wrote."""
    started = [
        machine.start(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for machine, command, env in zip(machines, commands, envs, strict=True)
    ]
    output = "\n".join(process.communicate(timeout=240)[0] for process in started)
    return [process.returncode for process in started], output


@needs_root
def test_pdsh(hosts: Cluster, folder: Path, alone: dict[int, list[float]]) -> None:
    env = {**CLEAN, "HOSTFILE": str(hosts.hostfile(folder / "hosts"))}
    done = hosts[0].run([ROOT / "launch/deepspeed.sh", *words("pdsh")], cwd=folder, env=env, timeout=240)
    judge(folder, "pdsh", [done.returncode], done.stdout, alone, 2)


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> list[Local]:
    """Two hosts; without root, this machine twice."""
    return list(request.getfixturevalue("hosts").hosts) if IS_ROOT else [Local(), Local()]


def test_no_ssh(machines: list[Local], folder: Path, alone: dict[int, list[float]]) -> None:
    (folder / "hosts").write_text("first slots=1\nsecond slots=1\n")
    env = {**CLEAN, "HOSTFILE": "hosts", "MASTER": machines[0].ip, "PORT": "29517"}
    command = [str(ROOT / "launch/no_ssh.sh"), *words("no_ssh")]
    codes, output = each(machines, folder, [command] * 2, [{**env, "NODE": str(node)} for node in range(2)])
    judge(folder, "no_ssh", codes, output, alone, 2)


def test_torchrun(machines: list[Local], folder: Path, alone: dict[int, list[float]]) -> None:
    env = {**CLEAN, "NODES": "2", "RANKS": "1", "MASTER": f"{machines[0].ip}:29518"}
    command = [str(ROOT / "launch/torchrun.sh"), *words("torchrun")]
    codes, output = each(machines, folder, [command] * 2, [env] * 2)
    judge(folder, "torchrun", codes, output, alone, 2)


@needs_root
def test_mpirun(hosts: Cluster, folder: Path, alone: dict[int, list[float]]) -> None:
    """Nobody says where rank 0 is: mpi4py tells the ranks."""
    env = {**CLEAN, "HOSTFILE": str(hosts.hostfile(folder / "hosts")), "RANKS": "2"}
    done = hosts[0].run([ROOT / "launch/mpirun.sh", *words("mpirun")], cwd=folder, env=env, timeout=240)
    judge(folder, "mpirun", [done.returncode], done.stdout, alone, 2)


@needs_root
def test_slurm_two_by_two(hosts: Cluster, folder: Path, alone: dict[int, list[float]]) -> None:
    """sbatch on a real Slurm of two nodes, two ranks on each."""
    env = {**CLEAN, **start_slurm(hosts)}
    sbatch = ["sbatch", "--wait", "--nodes", "2", "--ntasks-per-node", "2", f"--output={folder}/slurm.txt"]
    script = [ROOT / "launch/slurm.sbatch", *words("slurm")]
    done = hosts[0].run([*sbatch, *script], cwd=folder, env=env, timeout=280)
    output = (folder / "slurm.txt").read_text() if (folder / "slurm.txt").exists() else ""
    judge(folder, "slurm", [done.returncode], done.stdout + output, alone, 4)


@needs_root
def test_a_killed_rank_is_named_and_the_run_goes_on(
    tmp_path: Path, folder: Path, alone: dict[int, list[float]]
) -> None:
    check()
    with cluster(3, tmp_path / "hosts") as three:
        three.hostfile(folder / "hosts")
        job = Job(three, folder, "--max-restarts", "1", run="three")
        job.wait_step(6)
        moment = time.monotonic()
        kill_rank(three, job, folder)
        seconds, message = job.error_after(moment)
        assert re.search(DURING["SIGKILL of a rank"][1], message), job.screen
        assert seconds < 60
        assert job.end() == 0, job.screen
        assert orphans(three) == 0
        assert "restart  1 of 1" in job.screen and re.search(r"^resumed .*: \d+ of 30", job.screen, re.MULTILINE)
        assert losses(folder / "three") == pytest.approx(alone[STEPS], rel=1e-5)


@needs_root
@pytest.mark.parametrize("fault", BEFORE)
def test_a_job_that_cannot_run_is_not_started(hosts: Cluster, folder: Path, fault: str) -> None:
    assert before(fault, hosts, folder).orphans == 0
