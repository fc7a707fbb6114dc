"""What `lora-scale launch` is told, sends and concludes, without hosts: hostfiles, environments, verdicts, the rank's
side of a hang."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lora_scale import cli
from lora_scale.commands import crosscheck
from lora_scale.parallel import hostcheck, pace, pulse, starters, verdict
from lora_scale.parallel.verdict import Ended, Facts, RankSeen, Swept
from lora_scale.spec import hosts as host_list
from lora_scale.spec.errors import ConfigError, UsageError
from lora_scale.spec.hosts import Host

TWO = (Host("node-a", 1), Host("node-b", 1))


def hostfile(folder: Path, text: str) -> tuple[Host, ...]:
    (folder / "hosts").write_text(text)
    return host_list.read(folder / "hosts")


def test_a_hostfile(tmp_path: Path) -> None:
    found = hostfile(
        tmp_path, "# mine\nnode-a slots=8\n\nme@10.0.0.2 slots=4 python=/opt/env/bin/python dir=/work # b\n"
    )
    assert found == (Host("node-a", 8), Host("me@10.0.0.2", 4, "/opt/env/bin/python", "/work"))
    assert [host_list.of_rank(found, rank) for rank in (0, 7, 8, 11, 12)] == ["node-a"] * 2 + ["me@10.0.0.2"] * 2 + [
        None
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node-a", "line 1: node-a has no slots=N"),
        ("node-a slot=8", "'slot=8' is not understood; did you mean slots=...?"),
        ("node-a 8", "'8' is not understood; expected slots=, python=, dir="),
        ("node-a slots=0", "slots=0 of node-a; expected a number from 1 to 1024"),
        ("node-a slots=8 slots=4", "slots is given twice for node-a"),
        ("node-a slots=8\nnode-a slots=8", "line 2: node-a stands twice"),
        ("-oProxyCommand=reboot slots=1", "is no name of a host"),  # it would be an option of ssh
        ("node-a;reboot slots=1", "is no name of a host"),
        ("node-a slots=1 python=python", "python=python must be a whole path"),
        ("node-a slots=1 python=/a/$(reboot)", r"python=/a/\$\(reboot\) must be a whole path"),
    ],
)
def test_a_wrong_hostfile(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hostfile(tmp_path, text)


BY_HAND = ("--launcher", "no_ssh", "--master-addr", "node-a", "--master-port", "29500")
FOUR = (Host("a", 8), Host("b", 8), Host("c", 8), Host("d", 4))


@pytest.mark.parametrize(
    ("away", "least", "left"),
    [
        ({"b"}, 1, "ac"),  # 20 ranks do not divide 48 blocks, 16 do
        ({"c", "d"}, 1, "ab"),
        ({"a", "b", "c"}, 1, "d"),
        ({"b"}, 3, ""),  # three are there, but the batch wants two or one
        ({"a", "b"}, 2, "cd"),
        ({"a", "b", "c", "d"}, 1, ""),
    ],
)
def test_who_goes_on_without_those_that_are_away(away: set[str], least: int, left: str) -> None:
    found = host_list.without(FOUR, away, least, lambda ranks: ranks > 0 and 48 % ranks == 0)
    assert "".join(host.name for host in found) == left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-nodes", "3", "--max-restarts", "1"), "--min-nodes is 3; the hostfile names 2 hosts"),
        (("--min-nodes", "1"), "say also --max-restarts N"),
        (("--min-nodes", "1", "--max-restarts", "1", *BY_HAND), "a launcher that goes by ssh"),
        (("--min-nodes", "1", "--max-restarts", "1", "--no-preflight"), "with --preflight"),
    ],
)
def test_fewer_hosts_only_where_that_can_be(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    hostfile(tmp_path, "node-a slots=1\nnode-b slots=1\n")
    (tmp_path / "run.yaml").write_text(
        f"{{model: model, data: {{train: rows.jsonl}}, run_dir: {tmp_path / 'run'}, train: {{max_steps: 1}}}}"
    )
    command = ["launch", "--hostfile", str(tmp_path / "hosts"), *words, str(tmp_path / "run.yaml")]
    done = CliRunner().invoke(cli.verbs, command)
    assert isinstance(done.exception, UsageError) and message in str(done.exception)
    assert not (tmp_path / "run").exists()


def start(folder: Path, words: tuple[str, ...], env: dict[str, str]) -> starters.Start:
    return starters.Start(TWO, ("train", *words), env, "10.0.0.1", 20001, Path("/work"), folder)


NASTY = "run_dir='$(touch owned)`;\"\\ x"


def test_no_shell_sees_a_value(tmp_path: Path) -> None:
    """The remote shell's text is the same whatever config and environment hold; they travel as JSON to what it
    starts."""
    (one, _), (other, _) = (starters.ssh(start(tmp_path, words, {"A": words[0]})) for words in (("a",), (NASTY,)))
    assert one.argv == other.argv and NASTY not in " ".join(other.argv)
    show = [
        sys.executable,
        "-c",
        "import json,os,sys;print(json.dumps([sys.argv[1:],os.environ['A'],os.getcwd()]))",
        NASTY,
    ]
    job = json.loads(other.stdin) | {"cwd": str(tmp_path), "argv": show}
    done = subprocess.run(["sh", "-c", other.argv[-1]], input=json.dumps(job) + "\n", capture_output=True, text=True)
    assert json.loads(done.stdout) == [[NASTY], NASTY, str(tmp_path)]


def test_pdsh_refuses_what_its_shell_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starters.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert "train" in starters.pdsh(start(tmp_path, ("run.yaml", "lora.r=4"), {"PATH": "/bin"}))[0].argv
    assert (tmp_path / "environment").read_text() == "PATH=/bin\n"
    with pytest.raises(ConfigError, match=r"pdsh hands .* to a shell"):
        starters.pdsh(start(tmp_path, ("run.yaml", "lora.target_modules=[q, v]"), {}))
    for env in ({"A": "$(reboot)"}, {"WANDB_API_KEY": "x"}):
        with pytest.raises(ConfigError, match="cannot go through pdsh"):
            starters.pdsh(start(tmp_path, ("run.yaml",), env))


def test_secrets_stay_here_unless_asked_for() -> None:
    env = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "HF_HUB_TOKEN": "x",
        "NCCL_DEBUG": "INFO",
        "WANDB_API_KEY": "x",
        "LANG": "C",
    }
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "AWS_SECRET_ACCESS_KEY": "x"}
    wanted = {"PATH", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"}
    assert starters.passed(env, ()).keys() == wanted
    assert starters.passed(env, ("HF_TOKEN",)).keys() == wanted | {"HF_TOKEN"}
    with pytest.raises(ConfigError, match="--export NONE: there is no such variable"):
        starters.passed(env, ("NONE",))


def seen(rank: int, **facts: Any) -> RankSeen:
    return RankSeen(TWO[rank].name, 0.0, **{"step": 7, "phase": "step", **facts})


GLOO = "lora-scale: error: rank 0 failed: RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer"
HERE = {"node-a": Swept(True), "node-b": Swept(True)}
WAITS = "all_reduce (distributed_c10d.py:9) for 30 s"


@pytest.mark.parametrize(
    ("facts", "code", "line"),
    [
        ({"ranks": {0: seen(0, code=0), 1: seen(1, code=0)}}, 0, ""),
        ({"ranks": {0: seen(0, code=0)}}, 1, "rank 1 on node-b: never started, and nothing says why"),
        ({"ranks": {}, "ended": [Ended(None, 0, "")]}, 1, "rank 0 on node-a: never started"),  # exit 0 is no success
        ({"ranks": {0: seen(0, code=75, text="lora-scale: saved"), 1: seen(1, code=75)}}, 75, "saved"),
        ({"ranks": {0: seen(0, code=2, text="lora-scale: error: bad")}, "trouble": True}, 2, "bad"),
        (
            {"ranks": {0: seen(0, code=1, text=GLOO), 1: seen(1)}, "ended": [Ended("node-b", 247, "")]},
            1,
            "rank 1 on node-b, step 7: was killed by SIGKILL, often the kernel's",
        ),
        (
            {"ranks": {0: seen(0, code=1, text=GLOO), 1: seen(1, code=1, text="rank 1 failed: KeyError: 'x'")}},
            1,
            "rank 1 on node-b, step 7: rank 1 failed: KeyError",
        ),
        (
            {"ranks": {0: seen(0), 1: seen(1)}, "swept": {"node-a": Swept(True, {0: "S"}), "node-b": Swept(False)}},
            1,
            r"node-b \(rank 1\), step 7: does not answer any more",
        ),
        (
            {
                "ranks": {0: seen(0), 1: seen(1)},
                "swept": {"node-a": Swept(True, {0: "S"}), "node-b": Swept(True, {1: "T"})},
            },
            1,
            "rank 1 on node-b, step 7: is stopped",
        ),
        (
            {"ranks": {0: seen(0, hung=WAITS), 1: seen(1, hung="sleep (job.py:3) for 30 s")}},
            1,
            r"rank 1 on node-b, step 7: the step hangs in sleep \(job.py:3\) for 30 s",
        ),
        (
            {"ranks": {0: seen(0, hung=WAITS), 1: seen(1)}},
            1,
            "rank 1 on node-b, step 7: the step hangs, and it does not",
        ),
        ({"ranks": {}, "ended": [Ended("node-b", 127, "no such python")]}, 1, "node-b: no such python"),
        ({"ranks": {0: seen(0)}, "stops": 2}, 130, "killed with Ctrl-C"),
    ],
)
def test_verdicts(facts: dict[str, Any], code: int, line: str) -> None:
    given = {"swept": HERE, "ended": [], "lost": {}, "stops": 0, "trouble": False, **facts}
    found = verdict.judge(Facts(hosts=TWO, mine={"node-a", "node-b"}, **given))
    assert found.code == code and re.match(line, found.line), found.line
    assert found.again == (code == 1)


@pytest.mark.parametrize(
    ("line", "rank"),
    [
        ('@lora-scale {"rank": 3, "event": "alive"}', 3),
        ('node-b: @lora-scale {"rank": 3, "event": "alive"}', 3),  # by way of pdsh
        ('[1,3]<stdout>:@lora-scale {"rank": 3, "event": "alive"}', 3),
        ('@lora-scale {"rank": 3, "eve', None),
        ("loss 3.1", None),
    ],
)
def test_signs_of_life_are_found_in_a_launchers_output(line: str, rank: int | None) -> None:
    told = pulse.read(line)
    assert (told and told["rank"]) == rank


HANGS = """
import sys, time
from pathlib import Path
from lora_scale.parallel.pulse import Pulse
from lora_scale.storage.console import Console
with Pulse(1, Console(1), Path(sys.argv[1]) / "rank-001.txt", 1.0) as pulse:
    with pulse.step(1):
        time.sleep(1.5)  # the first step of a process is not watched
    with pulse.step(2):
        time.sleep(0.1)
    with pulse.step(3):
        time.sleep(600)
"""


@pytest.mark.parametrize("supervised", [False, True])
def test_a_step_that_hangs_ends_with_stacks(tmp_path: Path, supervised: bool) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **({pulse.EVERY: "0.5"} if supervised else {}),
    }
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1 and time.monotonic() - began < 200
    assert "sleep" not in (tmp_path / "stacks-rank-001.txt").read_text().splitlines()[0]
    assert 'File "<string>", line 12' in (tmp_path / "stacks-rank-001.txt").read_text()
    if supervised:
        told = [event for line in done.stdout.splitlines() if (event := pulse.read(line))]
        assert {"start", "alive", "hung"} == {event["event"] for event in told}
        assert (told[-1]["step"], told[-1]["where"]) == (3, "<module> (<string>:12)")
    else:
        assert "lora-scale: error: step 3 hangs: rank 1 on " in done.stdout


ONE, OTHER = ["node-a", "node-a"], ["node-a", "node-a", "node-b", "node-b"]


@pytest.mark.parametrize(
    ("hosts", "work_ms", "reply_ms", "named"),
    [
        (ONE, (1.0, 1.2), (0.1, 0.1), set()),
        (ONE, (1.0, 2.0), (0.1, 0.1), {"rank 1"}),
        (OTHER, (1.0, 1.1, 1.0, 3.0), (0.1, 0.1, 0.3, 0.3), {"rank 3"}),
        (OTHER, (1.0, 1.1, 1.0, 1.2), (0.1, 0.1, 4.0, 4.0), set()),  # far, but no more than networks are
        (OTHER, (1.0, 1.1, 1.0, 1.2), (0.1, 0.1, 20.0, 25.0), {"link of node-b"}),
        (OTHER, (1.0, 1.1, 1.0, 1.2), (0.1, 0.1, 0.2, 25.0), set()),  # one rank's, not the host's: its process was busy
    ],
)
def test_who_is_slow(
    hosts: list[str], work_ms: tuple[float, ...], reply_ms: tuple[float, ...], named: set[str]
) -> None:
    seconds = (tuple(value / 1e3 for value in values) for values in (work_ms, reply_ms))
    assert set(pace.slow(hosts, *seconds)) == named


def test_the_host_of_every_fault_is_named(tmp_path: Path) -> None:
    """Facts of this machine, changed fault by fault, as two hosts would tell them."""
    sound = hostcheck.look({"config": None, "overrides": [], "first": "localhost", "run_dir": str(tmp_path)})
    sound |= {
        "resolves": "10.0.0.1",
        "own_name": "10.0.0.1",
        "shared_memory": 1 << 33,
        "locks": [],
        "open_files": 65536,
    }
    sound |= {"asked": (sound["time"] - 1, sound["time"]), "config": {"sha256": "1"}, "base": {"fingerprint": "1"}}
    sound |= {"data": {"sha256": "1"}, "disk": {"folder": "runs", "free": 1 << 40}}
    gpu = {"name": "H", "total": 100, "free": 99}
    faults: dict[str, dict[str, Any]] = {
        "reachable": {"error": "ssh: connect to host node-b port 22: Connection refused", "code": 255},
        "machines": {},
        "versions": {"versions": {**sound["versions"], "torch": "2.0"}},
        "commit": {"commit": "0" * 40},
        "config": {"config": {"sha256": "2"}},
        "base": {"base": {"error": "models/x is no folder here"}},
        "data": {"data": {"sha256": "2"}},
        "clock": {"time": sound["time"] + 60},
        "GPUs": {"gpus": [{**gpu, "free": 10}]},
        "disk": {"disk": {"folder": "runs", "free": 1 << 20}},
        "shared memory": {"shared_memory": 1 << 20},
        "open files": {"open_files": 256},
        "build locks": {"locks": ["/x/lock"]},
        "names": {"resolves": "127.0.1.1"},
    }
    for name, change in faults.items():
        other = {**sound, "machine": "another", **change} if name != "machines" else dict(sound)
        found = [f for f in crosscheck.of_facts(TWO, [sound, other]) if f.status == "finding"]
        assert [(f.name, f.host) for f in found] == [(name, "node-b")], name
        assert found[0].cure
    assert not [f for f in crosscheck.of_facts(TWO, [sound, {**sound, "machine": "b"}]) if f.status == "finding"]
