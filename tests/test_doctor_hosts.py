"""`lora-scale doctor --hostfile` on namespace hosts: each planted fault is found, with its host and a cure, and sound
hosts have none."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from faults import prepare
from hosts import CLEAN, IS_ROOT, WAY, Cluster, check, cluster
from tiny import tiny_folder

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(not IS_ROOT, reason=WAY)]
ASK = ["python", "-m", "lora_scale", "doctor", "--hostfile", "hosts", "--config", "run.yaml"]
LATE = "import time\nnow = time.time\ntime.time = lambda: now() - 3600\n"


def ask(hosts: Cluster, folder: Path, **env: str) -> tuple[int, str]:
    paths = f"{CLEAN['PYTHONPATH']}:{folder / 'site'}"
    done = hosts[0].run(ASK, cwd=folder, env={**CLEAN, "PYTHONPATH": paths, **env}, timeout=600)
    return done.returncode, done.stdout


def found(output: str) -> set[str]:
    """`name on host` of every finding; each has a cure after its detail."""
    lines = [line for line in output.splitlines() if line.startswith("finding")]
    assert all(line.count(": ") >= 1 and "; " in line for line in lines), output
    return {f"{line[9:22].strip()} on {line[23:].partition(':')[0]}" for line in lines}


def over(hosts: Cluster, number: int, path: Path, text: str) -> None:
    """Another content of one file, on one host."""
    other = hosts[number].folder / f"other-{path.name}"
    other.write_text(text)
    hosts[number].run(["mount", "--bind", other, path], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    check()
    place = tmp_path / "job"
    place.mkdir()
    prepare(place)
    (place / "site" / "sitecustomize.py").write_text("")
    return place


def test_hosts_that_cannot_be_asked(folder: Path, tmp_path: Path) -> None:
    with cluster(5, tmp_path / "hosts") as hosts:
        text = "".join(f"{host.name} slots=1\n" for host in hosts.hosts[:4])
        (folder / "hosts").write_text(f"{text}node-e slots=1 dir=/nowhere\nnode-x slots=1\n")
        key, other = hosts[0].folder / "known_hosts", (hosts.folder / "ssh" / "id.pub").read_text()
        right = key.read_text().removeprefix("* ")
        key.write_text(f"node-b {other}node-a,node-c,node-d,node-e {right}")
        hosts[2].run(f"mount -t tmpfs tmpfs {Path(sys.executable).parent}", check=True)
        hosts[3].cut()
        code, output = ask(hosts, folder)
    assert code == 4
    wanted = {
        "node-b": "Host key verification failed.*ssh-keygen -R node-b",
        "node-c": "No such file.*install the environment",
        "node-d": "(timed out|No route|closed).*switched on",
        "node-e": "nowhere.*this folder is not there.*dir=",
        "node-x": "resolve hostname.*correct the name",
    }
    assert found(output) == {f"reachable on {name}" for name in wanted}, output
    for name, words in wanted.items():
        assert re.search(f"{name}: .*{words}", output), output


def test_hosts_that_differ(folder: Path, tmp_path: Path) -> None:
    (folder / "run").mkdir()
    model, other = folder / "model", tiny_folder(tmp_path / "other", "qwen2")
    record = next(path for path in metadata.files("peft") or () if path.name == "METADATA").locate()
    with cluster(4, tmp_path / "hosts") as hosts:
        lines = [f"{host.name} slots=1" for host in hosts.hosts]
        (folder / "hosts").write_text("\n".join([*lines, "root@node-c slots=1"]) + "\n")
        over(hosts, 1, folder / "run.yaml", (folder / "run.yaml").read_text().replace("lr: 3e-3", "lr: 1e-3"))
        over(hosts, 1, folder / "rows.jsonl", (folder / "rows.jsonl").read_text() + "\n")
        over(hosts, 1, Path(record), re.sub(r"^Version: .*", "Version: 0.1", Path(record).read_text(), flags=re.M))
        hosts[1].run(["mount", "--bind", other, model], check=True)
        hosts[2].run(["mount", "-t", "tmpfs", "tmpfs", model], check=True)
        hosts[2].run("mount -o remount,size=16m /dev/shm", check=True)
        hosts[2].run("prlimit --nofile=256:256 --pid 1", check=True)
        hosts[2].run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder / "run"], check=True)
        over(hosts, 3, folder / "site" / "sitecustomize.py", LATE)
        (hosts[3].folder / "hosts").write_text(
            (hosts[3].folder / "hosts").read_text().replace(hosts[3].ip, "127.0.1.1")
        )
        (hosts[3].home / ".cache/torch_extensions/build/lock").mkdir(parents=True)
        hosts[3].run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder / "run"], check=True)
        code, output = ask(hosts, folder)
    assert code == 4
    one, two, three = ("node-b", "node-c", "node-d")
    assert found(output) - {f"{what} on root@node-c" for what in ("base", "shared memory", "open files", "disk")} == {
        *(f"{what} on {one}" for what in ("config", "data", "versions", "base")),
        *(f"{what} on {two}" for what in ("base", "shared memory", "open files", "disk")),
        *(f"{what} on {three}" for what in ("clock", "names", "build locks", "disk")),
        "machines on root@node-c",
    }, output
    for words in (
        "clock is 36",
        "peft 0.1, but",
        "0.00 GiB free",
        "Read-only file system",
        "same machine as node-c",
    ):
        assert re.search(words, output), output


def test_sound_hosts_and_a_network_that_is_none(folder: Path, tmp_path: Path) -> None:
    """Also: each host its own folder of runs, which is worth a note."""
    (folder / "run").mkdir()
    with cluster(2, tmp_path / "hosts", private=[folder / "run"]) as hosts:
        hosts.hostfile(folder / "hosts")
        code, output = ask(hosts, folder)
        assert (code, found(output)) == (0, set()), output
        assert re.search(r"ok +network +all hosts: all-reduce [\d.]+ GB/s, all-gather .* every value right", output)
        assert re.search(r"note +run folder +all hosts: not shared: checkpoints .* on node-a only", output)
        code, output = ask(hosts, folder, GLOO_SOCKET_IFNAME="eth9")
        assert (code, found(output)) == (4, {"network on node-a", "network on node-b"}), output
