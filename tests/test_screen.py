"""The kept transcripts of docs/screen.md: as few lines as promised. Test_train holds live screens to the same."""

import re
from pathlib import Path

import pytest
import screen

PAGE = Path(__file__).parent.parent / "docs" / "screen.md"
BEFORE, PROGRESS = 25, 30.0  # lines before the first step; seconds between lines of progress in a file


def transcripts() -> list[list[screen.Line]]:
    """The terminal's and Slurm's."""
    found = []
    for block in re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        rows = [re.fullmatch(r" *([\d.]+) ([ ~])(?: (.*))?", line) for line in block.splitlines()]
        found.append([screen.Line(float(row[1]), row[3] or "", row[2] == " ") for row in rows if row])
        assert all(rows), block
    return found


@pytest.mark.parametrize("kind", [0, 1], ids=["terminal", "Slurm"])
def test_few_lines_before_the_first_step_and_hardly_any_after_it(kind: int) -> None:
    lines = transcripts()[kind]
    first = next(i for i, line in enumerate(lines) if line.text.startswith("step "))
    assert 4 <= len([line for line in lines[:first] if line.stays]) <= BEFORE
    rest = [line for line in lines[first:] if line.stays and not line.text.startswith("step ")]
    assert all(line.text.startswith(("saved ", "note ", "warning ")) for line in rest), rest
    assert lines[-1].seconds <= screen.SECONDS


def test_progress_is_one_line_that_changes_or_a_line_now_and_then() -> None:
    terminal, slurm = transcripts()
    live = [line for line in terminal if line.text.startswith("step ")]
    assert live and not any(line.stays for line in live) and max(len(line.text) for line in live) <= 99
    moments = [line.seconds for line in slurm if line.text.startswith("step ")]
    assert moments and all(line.stays for line in slurm)
    assert len(moments) <= 2 + screen.SECONDS / PROGRESS


def test_nothing_of_the_machine_is_in_them() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|var)\b", text)
    assert screen.CONFIG in text, "run: python tests/screen.py > docs/screen.md"


def test_a_terminal_is_read_as_a_person_sees_it() -> None:
    chunks = [(1.0, "one\nload"), (2.0, "\rloading 5\rloading 9"), (3.0, "\r         \rtwo\n"), (12.0, "\rstep 1"),
              (13.0, "\rstep 2"), (25.0, "\rstep 3")]  # fmt: skip
    assert [str(line) for line in screen.seen(chunks)] == [
        "  1.0   one", "  3.0   two", " 12.0 ~ step 1", " 25.0 ~ step 3",
    ]  # fmt: skip
