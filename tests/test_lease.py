"""Who owns a run directory: on one host the kernel says it, between hosts a heartbeat."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from lora_scale.spec.errors import UsageError
from lora_scale.spec.progress import Validation, deadline, validation_so_far
from lora_scale.storage import lease
from lora_scale.storage.lease import LEASE, Lease

ROOT = Path(__file__).parent.parent
HELD = "import sys, time; from pathlib import Path; from lora_scale.storage.lease import Lease\n"
HELD += "held = Lease(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)\n"


def other_host(monkeypatch: pytest.MonkeyPatch, run_dir: Path, beats: bool) -> subprocess.Popen[bytes]:
    """A process that holds the lease as another host would: without the kernel's lock, and under another name."""
    code = "import sys, time, socket, fcntl\nfrom pathlib import Path\nfcntl.flock = lambda *_: None\n"
    code += "socket.gethostname = lambda: 'node-b'\nfrom lora_scale.storage import lease\n"
    code += f"lease.BEAT = {0.1 if beats else 60}\n"
    code += "held = lease.Lease(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # waits, and closes its pipe
        pass


def test_two_runs_on_one_host_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOCK_PATIENCE", 0.3)
    with closing(Lease(tmp_path)), pytest.raises(UsageError, match=rf"is in use by process {os.getpid()} on \S+; wait"):
        Lease(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], env=env, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match=f"is in use by process {other.pid} on "):
        Lease(tmp_path)
    end(other)
    monkeypatch.setattr(lease, "LOCK_PATIENCE", 10.0)  # it may still be dying
    with closing(Lease(tmp_path)) as mine:
        assert mine.warning is None, "killed on this host, it is known to be dead: no wait, no warning"


def test_a_live_run_on_another_host_is_refused_and_a_dead_one_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.4)
    other = other_host(monkeypatch, tmp_path, beats=True)
    past = time.time() - 60
    os.utime(tmp_path / LEASE, (past, past))  # an old sign of life; the next one refuses us
    with pytest.raises(UsageError, match=f"is in use by process {other.pid} on node-b; wait for its end"):
        Lease(tmp_path)
    end(other)
    past = time.time() - lease.STALE - 5
    os.utime(tmp_path / LEASE, (past, past))
    with closing(Lease(tmp_path)) as mine:
        assert mine.warning is not None
        assert mine.warning.startswith(
            f"taken over from process {other.pid} on node-b, of which nothing was heard for 12"
        )
    assert (tmp_path / LEASE).read_text() == "", "given back at once"


def test_a_run_that_was_taken_for_dead_ends_without_a_word_into_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_host(monkeypatch, tmp_path, beats=True)
    (tmp_path / LEASE).write_text("process 1 on node-c 7")
    assert other.wait(timeout=60) == 1
    end(other)
    assert (tmp_path / LEASE).read_text() == "process 1 on node-c 7"


def test_the_earlier_of_two_limits_counts_with_room_for_a_step_and_a_save() -> None:
    assert deadline(1000.0, None, {}).at is None
    assert deadline(1000.0, 1.0, {"SLURM_JOB_END_TIME": "3000"}).at == 3000.0
    assert deadline(1000.0, 0.5, {"SLURM_JOB_END_TIME": "3000"}).at == 2800.0
    assert deadline(1000.0, None, {"SLURM_JOB_END_TIME": "900"}).at is None, "left over from an earlier job"
    end = deadline(1000.0, 1.0, {})
    assert not end.is_near(4600 - 30 - 22.1, 10.0, 1.0) and end.is_near(4600 - 30 - 22.0, 10.0, 1.0)
    assert not deadline(0.0, None, {}).is_near(1e12, 1e6, 1e6)


def test_validation_is_read_off_the_rows() -> None:
    rows = [{"step": 0, "val_loss": 4.0}, {"step": 1}, {"step": 2, "val_loss": 3.0}, {"step": 4, "val_loss": 3.0}]
    rows.append({"step": 6, "val_loss": None})
    found = validation_so_far(json.loads(json.dumps(rows)))
    assert found == Validation(3.0, 2, 2), "an equal one is not lower, and null was not finite"
    assert found.after(8, 2.5).is_best(8) and not found.is_best(6)
