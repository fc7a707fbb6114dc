"""The first minute of a two-rank run as a person sees it: on a terminal, and in the file that Slurm keeps.

    python tests/screen.py > docs/screen.md      3 minutes; as root, with the model and data of `make train`

The terminal is a pseudo-terminal of 100 columns; Slurm is a real one, on a host that is a namespace of this machine.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from hosts import CLEAN, cluster, wait_for  # noqa: E402
from outside import ROOT, Command  # noqa: E402
from slurm import start_slurm  # noqa: E402

SECONDS = 60.0
FIRST = "base     "  # how the ranks' first line begins
EVERY = 10.0  # seconds between the states of the live line that the page shows
CONFIG = """\
model: models/smollm2-135m-instruct
data: {train: data/synopsis/train.jsonl, seq_len: 128, max_rows: 2000}
run_dir: runs/first
lora: {r: 8, lora_alpha: 16}
train: {max_steps: 500, global_batch_size: 4, micro_batch_size: 2, lr: 2e-3, warmup_steps: 4}
"""
PAGE = f"""\
<!-- `python tests/screen.py > docs/screen.md` wrote this: run it again instead of changing it. -->

# What a run says

The first {SECONDS:.0f} seconds of a run of two ranks, twice: SmolLM2-135M on 2 CPU cores that others used too. On
the left are the seconds since the ranks' first line, before which they import. What libraries say is in
`runs/first/log/`, a file a rank.

```yaml
{CONFIG}```

## On a terminal

`lora-scale train run.yaml --ranks 2`, 100 columns. A line that begins with `~` is the live line, which is drawn over
step by step; here it is shown every {EVERY:.0f} seconds. At most 25 lines stay on the screen before the first step, and
after it none but notes.

```text
{{terminal}}```

## In Slurm's file

`sbatch --ntasks-per-node 2 launch/slurm.sbatch run.yaml`, `slurm-1.txt`: the same lines, no control characters, and one
line of progress at the first step, then every 30 seconds. `train -v` writes one for every step, `-q` none.

```text
{{slurm}}```
"""


@dataclass(frozen=True)
class Line:
    """Something on the screen, when it came there, and whether it stays."""

    seconds: float
    text: str
    stays: bool = True

    def __str__(self) -> str:
        return f"{self.seconds:5.1f} {' ' if self.stays else '~'} {self.text}".rstrip()


class Record:
    """What came on a screen, with the seconds since the ranks' first line."""

    def __init__(self) -> None:
        self.chunks: list[tuple[float, str]] = []
        self._had, self._since = 0, 0.0

    def add(self, screen: str) -> bool:
        """Given all that is on it; True once SECONDS are over."""
        now = time.monotonic()
        if not self._since and FIRST in screen:
            self._since = now
        seconds = now - self._since if self._since else 0.0
        if len(screen) > self._had and seconds < SECONDS:
            self.chunks.append((seconds, screen[self._had :]))
            self._had = len(screen)
        return seconds >= SECONDS


def prepare(folder: Path) -> None:
    for name in ("models", "data"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "run.yaml").write_text(CONFIG)


def seen(chunks: Sequence[tuple[float, str]]) -> Iterator[Line]:
    """The lines that a terminal shows after such output at such times, and the live line every EVERY seconds."""
    line, shown = "", 0.0
    for seconds, text in chunks:
        for part in text.splitlines(keepends=True):
            whole = part.endswith("\n")
            line = (line + part.rstrip("\n")).rpartition("\r")[2] if part.rstrip("\n") else line
            if whole:
                yield Line(seconds, line.rpartition("\r")[2].rstrip())
                line = ""
        if line.strip() and seconds - shown >= EVERY:
            shown = seconds
            yield Line(seconds, line.rpartition("\r")[2].rstrip(), stays=False)


def on_terminal(folder: Path) -> list[Line]:
    command = Command([sys.executable, "-m", "lora_scale", "train", "run.yaml", "--ranks", "2"], folder, terminal=True)
    record = Record()

    def watch(screen: str, process: object) -> bool:
        if over := record.add(screen.replace("\r\n", "\n")):
            command.process.terminate()
        return over

    assert command.end(watch, limit=600.0).code == 75
    return list(seen(record.chunks))


def in_slurm(folder: Path) -> list[Line]:
    with cluster(1, folder / "hosts") as hosts:
        env = {**CLEAN, **start_slurm(hosts)}
        script = [ROOT / "launch" / "slurm.sbatch", "run.yaml", "run_dir=runs/second"]
        sbatch = ["sbatch", "--ntasks-per-node", "2", *script]
        hosts[0].run([*map(str, sbatch)], cwd=folder, env=env, check=True)
        file, record = folder / "slurm-1.txt", Record()
        wait_for(file.exists, "the job", 60.0)
        while not record.add(file.read_text()):
            time.sleep(0.1)
    return list(seen(record.chunks))


def page(terminal: Sequence[Line], slurm: Sequence[Line]) -> str:
    texts = {name: "".join(f"{line}\n" for line in lines) for name, lines in (("terminal", terminal), ("slurm", slurm))}
    for place, name in ((str(ROOT), "."), (os.uname().nodename, "host")):
        texts = {key: text.replace(place, name) for key, text in texts.items()}
    return PAGE.replace("{terminal}", texts["terminal"]).replace("{slurm}", texts["slurm"])


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        terminal = on_terminal(Path(place))
        slurm = in_slurm(Path(place))
    print(page(terminal, slurm), end="")


if __name__ == "__main__":
    main()
