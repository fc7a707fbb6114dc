"""Starting local ranks: which GPUs they get, and what an exit code says. Whole launches are test_train's."""

import base64
import json
import signal
import sys
from pathlib import Path

import pytest

from lora_scale.parallel import local
from lora_scale.spec.errors import UsageError


def devices(command: list[str]) -> list[int | str]:
    """What DeepSpeed's launcher is told to give the ranks, one each."""
    hosts = next(part for part in command if part.startswith("--world_info=")).partition("=")[2]
    return json.loads(base64.urlsafe_b64decode(hosts))["localhost"]


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 4, [0, 1]),
        ("4,5,6,7", 4, ["4", "5"]),
        ("GPU-8932f937,GPU-5e9e2a4c", 2, ["GPU-8932f937", "GPU-5e9e2a4c"]),
        ("", 0, [0, 1]),  # hidden GPUs: ranks on the CPU
    ],
)
def test_ranks_get_the_gpus_that_are_visible(
    visible: str | None, gpus: int, expected: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = local._command(2, gpus, ["train", "run.yaml", "lora.r=4"])
    assert devices(command) == expected
    assert command[0] == sys.executable and command[-4:] == ["lora_scale", "train", "run.yaml", "lora.r=4"]


def test_threads_and_device_of_ranks_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.os, "cpu_count", lambda: 8)
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    env = local._environment(2, gpus=0)
    assert (env["OMP_NUM_THREADS"], env["DS_ACCELERATOR"]) == ("4", "cpu")
    assert "DS_ACCELERATOR" not in local._environment(2, gpus=2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local._environment(2, gpus=0)["OMP_NUM_THREADS"] == "3"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--ranks is 3, but 2 GPUs are visible; use at most 2"):
        local.run(3, ["train"], tmp_path)


def test_the_command_to_type_is_shown() -> None:
    shown = local.shown(2, ["train", "my run.yaml", "lora.target_modules=[q,v]"])
    assert shown == "deepspeed --num_gpus 2 --module lora_scale train 'my run.yaml' 'lora.target_modules=[q,v]'"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (256 - signal.SIGSEGV, "was killed by SIGSEGV"),
        (-signal.SIGTERM, "was killed by SIGTERM"),
        (256 - signal.SIGKILL, "was killed by SIGKILL, often the kernel's when memory is short (see dmesg)"),
        (1, "ended with code 1"),
        (120, "ended with code 120"),
    ],
)
def test_an_end_is_named(code: int, text: str) -> None:
    assert local._end_of(code) == text
