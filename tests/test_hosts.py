"""Several hosts, each a namespace with its own address and sshd: every way to start a run trains the same, what hurts
is told beforehand, and a fault ends the job with a name and is survived."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from faults import BEFORE, DURING, STEPS, Job, before, kill_launcher, mend, orphans, prepare, two_jobs
from hosts import CLEAN, IS_ROOT, ROOT, WAY, Cluster, Local, check, cluster, wait_for
from ranks import run_verb
from slurm import start_slurm

from lora_scale.storage.runlog import FINISHED, read_metrics

pytestmark = pytest.mark.ranks
SHORT = 5  # steps of the runs that only compare launchers
LONGER = "train.max_steps=90"  # for the run that suffers every fault
BY_ITSELF = [name for name in DURING if name not in ("SIGKILL of the launcher", "disk full")]  # it goes on by itself
needs_root = pytest.mark.skipif(not IS_ROOT, reason=WAY)  # as root they fail, and do not skip, without namespaces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """Losses of one process."""
    done = run_verb("train", "run.yaml", "run_dir=alone", LONGER, "train.micro_batch_size=12", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(folder / "alone")


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


def judge(folder: Path, run: str, codes: list[int], output: str, alone: list[float], ranks: int) -> None:
    """Sums over ranks are taken in another order than by one process: some 1e-7 a step."""
    assert codes == [0] * len(codes), output
    assert losses(folder / run) == pytest.approx(alone[:SHORT], rel=1e-5)
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
    output = "\n".join(process.communicate(timeout=600)[0] for process in started)
    return [process.returncode for process in started], output


@needs_root
def test_pdsh(tmp_path: Path, folder: Path, alone: list[float]) -> None:
    """Three hosts."""
    check()
    with cluster(3, tmp_path / "hosts") as three:
        env = {**CLEAN, "HOSTFILE": str(three.hostfile(folder / "hosts"))}
        done = three[0].run([ROOT / "launch/deepspeed.sh", *words("pdsh")], cwd=folder, env=env, timeout=600)
        judge(folder, "pdsh", [done.returncode], done.stdout, alone, 3)


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> list[Local]:
    """Two hosts; without root, this machine twice."""
    return list(request.getfixturevalue("hosts").hosts) if IS_ROOT else [Local(), Local()]


def test_no_ssh(machines: list[Local], folder: Path, alone: list[float]) -> None:
    (folder / "hosts").write_text("first slots=1\nsecond slots=1\n")
    env = {**CLEAN, "HOSTFILE": "hosts", "MASTER": machines[0].ip, "PORT": "29517"}
    command = [str(ROOT / "launch/no_ssh.sh"), *words("no_ssh")]
    codes, output = each(machines, folder, [command] * 2, [{**env, "NODE": str(node)} for node in range(2)])
    judge(folder, "no_ssh", codes, output, alone, 2)


def test_torchrun(machines: list[Local], folder: Path, alone: list[float]) -> None:
    env = {**CLEAN, "NODES": "2", "RANKS": "1", "MASTER": f"{machines[0].ip}:29518"}
    command = [str(ROOT / "launch/torchrun.sh"), *words("torchrun")]
    codes, output = each(machines, folder, [command] * 2, [env] * 2)
    judge(folder, "torchrun", codes, output, alone, 2)


@needs_root
def test_mpirun(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    """Nobody says where rank 0 is: mpi4py tells the ranks."""
    env = {**CLEAN, "HOSTFILE": str(hosts.hostfile(folder / "hosts")), "RANKS": "2"}
    done = hosts[0].run([ROOT / "launch/mpirun.sh", *words("mpirun")], cwd=folder, env=env, timeout=600)
    judge(folder, "mpirun", [done.returncode], done.stdout, alone, 2)


@needs_root
def test_slurm_two_by_two(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    """sbatch on a real Slurm of two nodes, two ranks on each."""
    env = {**CLEAN, **start_slurm(hosts)}
    sbatch = ["sbatch", "--wait", "--nodes", "2", "--ntasks-per-node", "2", f"--output={folder}/slurm.txt"]
    script = [ROOT / "launch/slurm.sbatch", *words("slurm")]
    done = hosts[0].run([*sbatch, *script], cwd=folder, env=env, timeout=600)
    output = (folder / "slurm.txt").read_text() if (folder / "slurm.txt").exists() else ""
    judge(folder, "slurm", [done.returncode], done.stdout + output, alone, 4)


@needs_root
@pytest.mark.long
def test_slurm_queues_a_signalled_job_again(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    """What its time limit or a preemption sends, sent by hand; Slurm itself starts the same job a second time."""
    env = {**CLEAN, **start_slurm(hosts)}
    sbatch = ["sbatch", "--parsable", "--nodes", "2", "--ntasks-per-node", "1", f"--output={folder}/requeued.txt"]
    script = [ROOT / "launch/slurm.sbatch", "run.yaml", "run_dir=requeued", LONGER]
    number = hosts[0].run([*sbatch, *script], cwd=folder, env=env, check=True).stdout.split()[-1]
    screen = folder / "requeued.txt"
    metrics = folder / "requeued" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(read_metrics(metrics.parent)) > 3, "some steps", 120)
    hosts[0].run(["scancel", "--signal=USR1", number], env=env, check=True)
    wait_for(lambda: "checkpoint saved" in screen.read_text(), "a checkpoint", 60)
    wait_for(lambda: (folder / "requeued" / FINISHED).is_file(), "Slurm's second start", 400)
    assert re.search(r"^resumed .*: \d+ of 90", screen.read_text(), re.MULTILINE)
    job = hosts[0].run(["scontrol", "show", "job", number], env=env).stdout
    assert "Restarts=1" in job, job
    assert losses(folder / "requeued") == pytest.approx(alone, rel=1e-5)


@needs_root
def test_a_killed_rank_is_named_and_the_run_goes_on(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    hosts.hostfile(folder / "hosts")
    job = Job(hosts, folder, "--max-restarts", "1", run="killed", overrides=(LONGER, "train.micro_batch_size=6"))
    suffer("SIGKILL of a rank", job, hosts, folder)
    assert job.end() == 0, job.screen
    assert orphans(hosts) == 0 and "restart  1 of 1" in job.screen
    assert losses(folder / "killed") == pytest.approx(alone, rel=1e-5)


@needs_root
@pytest.mark.long
def test_every_fault_in_turn(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    """One run that is spared nothing: each fault is named, and it ends as if there had been none.

    Ten times each, at random moments: tests/faults.py, whose outcome is a record."""
    hosts.hostfile(folder / "hosts")
    restarts = ("--patience", "15", "--max-restarts", str(len(BY_ITSELF)))
    begin = partial(
        Job, hosts, folder, *restarts, run="turn", overrides=(LONGER, "train.micro_batch_size=6", "save.every=8")
    )
    job = begin()
    for fault in BY_ITSELF:
        suffer(fault, job, hosts, folder)
    suffer("disk full", job, hosts, folder)
    assert job.end() and f"restart  {len(BY_ITSELF)} of" in job.screen, job.screen
    (job := begin()).wait_step(job.step() + 2)
    kill_launcher(hosts, job, folder)
    wait_for(lambda: not orphans(hosts), "the end of every rank", 60)
    hosts[1].slow_down(0.02)
    job = begin("--min-nodes", "1")
    wait_for(lambda: re.search(r"slow +link between node-b and node-a: \d+ ms", job.screen), "a slow link's name", 90)
    hosts[1].power_off()
    assert job.end() == 0 and "going on without node-b: 1 rank, the same global batch" in job.screen, job.screen
    assert orphans(hosts) == 0
    assert losses(folder / "turn") == pytest.approx(alone, rel=1e-5)


def suffer(fault: str, job: Job, hosts: Cluster, folder: Path) -> None:
    """Put a fault in two steps from here; its host and cause are told in time, then it is mended."""
    inject, wanted = DURING[fault]
    job.wait_step(job.step() + 2)
    told, moment = len(job.errors()), time.monotonic()
    inject(hosts, job, folder)
    wait_for(lambda: len(job.errors()) > told, f"an error after {fault}", 60)
    assert re.search(wanted, job.errors()[told]), f"{fault}:\n{job.screen}"
    print(f"{fault}: told after {time.monotonic() - moment:.1f} s")
    mend(fault, hosts, job)


@needs_root
def test_one_of_two_jobs_is_interrupted(hosts: Cluster, folder: Path, alone: list[float]) -> None:
    found = two_jobs(hosts, folder, [], 20)
    assert (found.exit_code, found.orphans) == (75, 0)
    assert losses(next(folder.glob("other-*"))) == pytest.approx(alone[:STEPS], rel=1e-5)


@needs_root
@pytest.mark.parametrize("fault", BEFORE)
def test_a_job_that_cannot_run_is_not_started(hosts: Cluster, folder: Path, fault: str) -> None:
    assert before(fault, hosts, folder).orphans == 0
