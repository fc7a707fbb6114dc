"""Rows of metrics.jsonl into TensorBoard and Weights & Biases. One that fails is warned of once and left alone."""

import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_scale.spec.config import RunConfig

Figures = dict[str, float]


class Trackers:
    """Those that `track` names. `say` puts a line on the screen; a resumed run goes on from the step `first`."""

    def __init__(self, cfg: RunConfig, first: int, say: Callable[[str], None]):
        self._say = say
        self._open: dict[str, tuple[Callable[[Figures, int], object], Callable[[], object]]] = {}
        kinds = (("TensorBoard", cfg.track.tensorboard, _tensorboard), ("W&B", cfg.track.wandb, _wandb))
        for name, wanted, start in kinds:
            if wanted:
                self._try(name, partial(self._begin, name, start, cfg, first))

    def _begin(self, name: str, start: Callable[..., Any], cfg: RunConfig, first: int) -> None:
        self._open[name] = start(cfg, first, self._say)

    def write(self, row: Mapping[str, Any]) -> None:
        """A row as it stands in the file."""
        for name, (write, _) in list(self._open.items()):
            self._try(name, partial(write, dict(_flat(row)), row["step"]))

    def close(self) -> None:
        for name, (_, end) in list(self._open.items()):
            self._try(name, end)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a library raises, or its own exit
            self._open.pop(name, None)
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            self._say(f"note     {name} is left out from here on ({what})")


def _tensorboard(cfg: RunConfig, first: int, _say: Callable[[str], None]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(cfg.run_dir / "tensorboard"))
    if first:  # what an interrupted run wrote after its last checkpoint no longer counts
        writer.add_event(Event(step=first + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(figures: Figures, step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
        writer.flush()

    return write, writer.close


def _wandb(cfg: RunConfig, _first: int, say: Callable[[str], None]) -> Any:
    import wandb

    saved = cfg.run_dir / "wandb-id.txt"  # a resumed run goes on in the same curve
    saved.exists() or saved.write_text(secrets.token_hex(4))
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_route() else "offline")
    name, config, resume = cfg.track.name or cfg.run_dir.name, cfg.model_dump(mode="json"), mode == "online" or None
    where: Any = {
        "project": cfg.track.wandb,
        "name": name,
        "dir": str(cfg.run_dir),
        "settings": wandb.Settings(console="off"),
    }
    run = wandb.init(id=saved.read_text(), mode=mode, resume="allow" if resume else None, config=config, **where)
    if mode == "offline":
        say(f"note     W&B is offline; later, where there is a route: wandb sync {Path(run.dir).parent}")
    return lambda figures, step: run.log(figures, step=step), run.finish


def _has_route() -> bool:
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    try:
        socket.create_connection((server.hostname or "", server.port or 443), timeout=3.0).close()
    except OSError:
        return False
    return True


def _flat(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{name}/")
        elif isinstance(value, int | float) and f"{where}{name}" != "step":
            yield f"{where}{name}", float(value)
