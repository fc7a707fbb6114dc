"""TensorBoard's and W&B's files, read back by their own libraries; a tracker that fails stops nothing."""

import ast
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_scale.spec.config import RunConfig
from lora_scale.storage import trackers
from lora_scale.storage.trackers import Trackers


def config(folder: Path, **track: Any) -> RunConfig:
    tree = {"model": {"path": "m"}, "data": {"train": "rows"}, "run_dir": str(folder), "train": {"epochs": 1}}
    return RunConfig.model_validate(tree | {"track": track})


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 / step, "phase_seconds": {"forward": 0.5}, "note": "x", "val_loss": None}


def test_tensorboard_goes_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    said: list[str] = []
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = Trackers(config(tmp_path, tensorboard=True), first, said.append)
        for step in steps:
            tracker.write(row(step))
        tracker.close()
    found = event_file_loader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss", "phase_seconds/forward"] and said == []
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (1, 4.0), (2, 2.0), (3, pytest.approx(4 / 3)), (4, 1.0)
    ]  # fmt: skip


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, which W&B's files are after their head: blocks of 32 KiB, the first 7 bytes shorter."""
    at, whole = 0, b""
    while at + 7 <= len(data):
        room = 32768 - (at + 7) % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def read_history(proto: Any, data: bytes) -> list[dict[str, str]]:
    """The rows of a W&B file, by its own record type."""
    found = []
    for part in log_records(data[7:]):
        record = proto.Record()
        record.ParseFromString(part)
        if record.HasField("history"):
            found.append({"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item})
    return found


def test_wandb_is_offline_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    tracker = Trackers(config(tmp_path, wandb="project", name="first"), 0, said.append)
    tracker.write(row(1))
    tracker.write(row(2))
    tracker.close()
    (line,) = said
    assert line.startswith("note     W&B is offline; later, where there is a route: wandb sync ")
    (file,) = Path(line.rpartition(" ")[2]).glob("*.wandb")
    deadline = time.monotonic() + 30  # W&B's own process writes the file, in its time
    while len(history := read_history(wandb_internal_pb2, file.read_bytes())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(one["_step"], one["loss"], one["phase_seconds/forward"]) for one in history] == [
        ("1", "4", "0.5"), ("2", "2", "0.5")
    ]  # fmt: skip
    assert (tmp_path / "wandb-id.txt").read_text() in file.name, "a resumed run goes on in the same curve"


def test_one_that_fails_is_told_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        def write(*_: object) -> None:
            raise OSError("disk full\nand more")

        return write, lambda: None

    monkeypatch.setattr(trackers, "_wandb", broken)
    said: list[str] = []
    tracker = Trackers(config(tmp_path, wandb="project"), 0, said.append)
    for step in (1, 2, 3):
        tracker.write(row(step))
    tracker.close()
    assert said == ["note     W&B is left out from here on (OSError: disk full)"]


def test_the_writer_is_small() -> None:
    """At most 60 lines of code: without it, a run is the same."""
    source = Path(trackers.__file__).read_text()
    code = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            code |= set() if is_text else {node.lineno}
    assert len(code) <= 60
