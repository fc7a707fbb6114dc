"""doctor: each thing that hurts a run is found and named with its cure, and no probe can hang it."""

import json
import os
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_scale.cli import main
from lora_scale.commands import doctor
from lora_scale.parallel import probe
from lora_scale.spec.errors import FindingError
from lora_scale.storage import diskspeed

GIB = 1 << 30
H200 = {"name": "NVIDIA H200", "total": 140 * GIB, "free": 139 * GIB}
SEEN: dict[str, Any] = {
    "imports": dict.fromkeys(doctor.SUPPORTED, 1.0),
    "failed": {},
    "cuda": None,
    "devices": [],
    "launcher": None,
    "launcher_error": None,
}


@pytest.mark.parametrize(
    ("version", "status", "detail"),
    [
        ("2.11.0+cu130", "ok", "2.11.0+cu130"),
        ("2.13.1", "ok", "2.13.1"),
        ("2.9.0", "finding", "2.9.0 is older than 2.11, the oldest supported"),
        ("2.14.0a0+git", "note", "2.14.0a0+git is newer than what was tried, which is below 2.14"),
        (None, "finding", "not installed"),
    ],
)
def test_versions(version: str | None, status: str, detail: str) -> None:
    check = doctor.judge_version("torch", version, "2.11", "2.14")
    assert (check.status, check.detail, bool(check.cure)) == (status, detail, status == "finding")


def test_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    required = [line for lines in project["optional-dependencies"].values() for line in lines]
    for name, (oldest, _) in {**doctor.SUPPORTED, "python": doctor.PYTHONS}.items():
        (line,) = [line for line in [*required, "python" + project["requires-python"]] if line.startswith(f"{name}>=")]
        assert line.split(">=")[1].split(",")[0] == oldest


@pytest.mark.parametrize(
    ("cuda", "devices", "driver", "status", "words"),
    [
        (None, [], None, "ok", "no GPU; torch is built for CPUs"),
        ("13.0", [], None, "ok", "no GPU; torch is built for CUDA 13.0"),
        (None, [], "580.159.04", "finding", "driver 580.159.04 is there, but torch (built for CPUs) sees no GPU"),
        ("13.0", [], "520.61.05", "finding", "driver 520.61.05 is there, but torch (built for CUDA 13.0) sees no GPU"),
        ("13.0", [H200], "580.159.04", "ok", "NVIDIA H200, 139.0 of 140.0 GiB free, driver 580.159.04"),
        ("13.0", [{**H200, "free": 60 * GIB}], None, "finding", "NVIDIA H200, 60.0 of 140.0 GiB free, driver unknown"),
    ],
)
def test_devices(
    cuda: str | None, devices: list[Mapping[str, Any]], driver: str | None, status: str, words: str
) -> None:
    host, check = doctor.judge_devices(cuda, devices, driver)
    assert (check.status, check.detail[: len(words)], bool(check.cure)) == (status, words, status == "finding")
    assert host.status == "ok" and f"{len(os.sched_getaffinity(0))} cores" in host.detail


def test_launcher() -> None:
    left_over = doctor.judge_launcher(None, "WORLD_SIZE set but not RANK", {})
    assert (left_over.status, left_over.detail) == ("finding", "WORLD_SIZE set but not RANK")
    place = {"launcher": "slurm", "rank": 3, "size": 16, "local_rank": 0}
    started = doctor.judge_launcher(place, None, {"NCCL_DEBUG": "INFO", "HOME": "/h"})
    assert (started.status, started.detail) == ("ok", "slurm: rank 3 of 16, NCCL_DEBUG=INFO")
    assert doctor.judge_launcher(None, None, {}).detail.startswith("not started by one; there are: ")


@pytest.mark.parametrize(
    ("nbytes", "has_gpus", "status"),
    [(64 << 20, True, "finding"), (None, True, "finding"), (64 << 20, False, "ok"), (8 * GIB, True, "ok")],
)
def test_shared_memory(nbytes: int | None, has_gpus: bool, status: str) -> None:
    assert doctor.judge_shared_memory(nbytes, has_gpus).status == status


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {doctor.resource.RLIMIT_NOFILE: (256, 4096), doctor.resource.RLIMIT_MEMLOCK: (8 << 20, 8 << 20)}
    monkeypatch.setattr(doctor.resource, "getrlimit", limits.__getitem__)
    files, locked = doctor.limits_of_this_process()
    assert (files.status, files.detail, files.cure) == ("finding", "limit 256, at most 4,096", "ulimit -n 65536")
    assert locked.status == "ok" and "InfiniBand only" in locked.detail


@pytest.mark.parametrize("place", ["fused_adam/lock", "py311_cpu/deepspeed_shm_comm/lock"])
def test_a_lock_left_by_a_killed_build(tmp_path: Path, place: str) -> None:
    lock = tmp_path / "torch_extensions" / place
    lock.parent.mkdir(parents=True)
    (lock.parent / "build.ninja").touch()
    for env in ({"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch_extensions")}, {"XDG_CACHE_HOME": str(tmp_path)}):
        assert doctor.judge_locks(doctor.extension_locks(env)).status == "ok"
    lock.touch()
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    for env in ({"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch_extensions")}, {"XDG_CACHE_HOME": str(tmp_path)}):
        check = doctor.judge_locks(doctor.extension_locks(env))
        assert check.status == "finding" and "(120 minutes old)" in check.detail and f"rm {lock}" in check.cure


@pytest.mark.parametrize(
    ("addresses", "env", "status", "words"),
    [
        (["127.0.1.1"], {}, "note", "node is 127.0.1.1: enough for one host"),
        (["127.0.0.1", "::1"], {}, "note", "node is 127.0.0.1, ::1: enough for one host"),
        ([], {}, "note", "node has no address: enough for one host"),
        (["10.0.0.7"], {}, "ok", "node is 10.0.0.7"),
        (["127.0.1.1", "10.0.0.7"], {}, "ok", "node is 127.0.1.1, 10.0.0.7"),
        (["127.0.1.1"], {"GLOO_SOCKET_IFNAME": "lo"}, "ok", "node; gloo uses lo"),
        (["10.0.0.7"], {"GLOO_SOCKET_IFNAME": "ib9"}, "finding", "GLOO_SOCKET_IFNAME=ib9, but the interfaces are "),
    ],
)
def test_hostname(addresses: list[str], env: dict[str, str], status: str, words: str) -> None:
    check = doctor.judge_hostname("node", addresses, env)
    assert (check.status, check.detail[: len(words)]) == (status, words)


def test_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    space, speed = doctor.disk(tmp_path / "not" / "there" / "yet")
    assert (space.status, speed.status) == ("ok", "ok") and str(tmp_path) in speed.detail
    assert list(tmp_path.iterdir()) == []


def test_disk_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(diskspeed, "measure", lambda folder, nbytes: diskspeed.DiskSpeed(5e6, 5e8, False))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=GIB, total=GIB))
    space, speed = doctor.disk(tmp_path)
    assert (space.status, space.detail) == ("finding", f"1.0 GiB free at {tmp_path}")
    assert speed.status == "finding" and "write 5 MB/s, read 500 MB/s (from memory, perhaps)" in speed.detail


def test_a_folder_that_cannot_be_written() -> None:
    *_, check = doctor.disk(Path("/proc/lora-scale"))  # not a matter of permissions: root cannot write here either
    assert check.status == "finding" and check.detail.startswith("/proc cannot be written: ")


def test_a_short_write_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(OSError, match="disk full, or a quota"):
        diskspeed.measure(tmp_path, 1)


@pytest.mark.ranks
def test_an_all_reduce_over_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")  # a launcher's variables, which the probe must not follow
    monkeypatch.setenv("WORLD_SIZE", "99")
    check = doctor.reduced("gloo", 2)
    assert (check.status, check.cure) == ("ok", "") and check.detail.startswith(
        "gloo, 2 ranks, every sum right, 16 MiB in "
    )


def test_a_wrong_sum_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor[-3:].add_(1))
    try:
        with pytest.raises(SystemExit, match="3 of 1,024 sums are wrong"):
            probe._reduce(tmp_path / "answer", str(tmp_path / "store"), "gloo", 1, 4096, 30.0, 0)
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "answer").exists()


def test_a_probe_that_hangs_is_ended(tmp_path: Path) -> None:
    """A rank that waits for another that never comes: both the limit and the killing are seen."""
    words = [str(tmp_path / "answer"), str(tmp_path / "store"), "gloo", "2", "4096", "600", "0"]
    started = time.monotonic()
    with pytest.raises(FindingError, match="no answer after 2 s"):
        probe._run([["reduce", *words]], os.environ, 2.0)
    assert time.monotonic() - started < 100
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(tmp_path).encode() in command]


def test_a_probe_that_fails_says_why() -> None:
    """The others would wait for the one that failed: they are ended with it."""
    with pytest.raises(FindingError, match=r"process 0 of 2 failed: IsADirectoryError: .*"):
        probe._run([["look", "/"], ["reduce", "/", "/", "gloo", "2", "4096", "600", "0"]], os.environ, 60.0)


def test_looking_names_what_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open\\nmore')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = probe.look(["json", "broken_package", "absent_package"], 60.0)
    assert list(seen["imports"]) == ["json"] and seen["devices"] == []
    assert [check.detail for check in doctor.judge_imports(seen)] == [
        "broken_package: OSError: libcudart.so: cannot open",
        "absent_package: ModuleNotFoundError: No module named 'absent_package'",
    ]


def _reduced(backend: str, ranks: int, nbytes: int, timeout_seconds: float) -> probe.Reduced:
    return probe.Reduced(backend, ranks, nbytes, 0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """doctor without its slow probes; what they see can be changed."""
    seen = dict(SEEN)
    monkeypatch.setattr(probe, "look", lambda packages, timeout_seconds: seen)
    monkeypatch.setattr(probe, "all_reduce", _reduced)
    monkeypatch.setattr(diskspeed, "measure", lambda folder, nbytes: diskspeed.DiskSpeed(1e9, 2e9, True))
    monkeypatch.setattr(doctor, "extension_locks", lambda env: {})
    return seen


def diagnosis(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


@pytest.mark.usefixtures("quick")
def test_a_sound_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = diagnosis(capsys, "--folder", str(tmp_path))
    assert (code, err) == (0, "") and "finding" not in out
    assert [line[9:22].strip() for line in out.splitlines()] == [
        *["python", *doctor.SUPPORTED, *doctor.OPTIONAL, "imports", "host", "devices", "launcher", "all-reduce"],
        *["disk space", "disk", "shared memory", "open files", "locked memory", "build locks", "hostname"],
    ]


def test_findings_make_it_4(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick["launcher_error"] = "WORLD_SIZE set but not RANK"
    monkeypatch.setattr(
        probe, "all_reduce", lambda *words: (_ for _ in ()).throw(FindingError("no answer after 120 s"))
    )
    code, out, err = diagnosis(capsys, "--folder", str(tmp_path))
    assert (code, err) == (4, "lora-scale: error: 2 findings: launcher, all-reduce\n")
    assert "finding  launcher      WORLD_SIZE set but not RANK; a leftover of another job in this shell\n" in out
    assert "finding  all-reduce    gloo, 2 ranks: no answer after 120 s; see hostname below" in out


def test_json(quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick["failed"] = {"peft": "ImportError: no"}
    code, out, err = diagnosis(capsys, "--json", "--folder", str(tmp_path))
    report = json.loads(out)
    assert (code, report["findings"]) == (4, 1) and err == "lora-scale: error: 1 finding: imports\n"
    (finding,) = [check for check in report["checks"] if check["status"] == "finding"]
    assert finding == {
        "name": "imports",
        "status": "finding",
        "detail": "peft: ImportError: no",
        "cure": "try `python -c 'import peft'`, reinstall it",
    }


def test_without_torch_it_still_answers(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick |= {"imports": {}, "failed": {}}
    versions = {"safetensors": "0.8.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    code, out, err = diagnosis(capsys, "--folder", str(tmp_path))
    assert code == 4 and err == "lora-scale: error: 4 findings: torch, deepspeed, transformers, peft\n"
    assert "finding  torch         not installed; pip install 'torch>=2.11,<2.14'\n" in out and "all-reduce" not in out


def test_only_the_first_rank_of_a_host_answers(
    quick: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick["launcher"] = {"launcher": "openmpi", "rank": 1, "size": 2, "local_rank": 1}
    assert diagnosis(capsys, "--folder", str(tmp_path)) == (0, "", "")
    quick["launcher"] = {"launcher": "openmpi", "rank": 2, "size": 4, "local_rank": 0}
    assert "openmpi: rank 2 of 4" in diagnosis(capsys, "--folder", str(tmp_path))[1]
