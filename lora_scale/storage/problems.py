"""Rows of a file that cannot be used, in words: the first few by line, the others counted. Knows no forms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_scale.spec.errors import DataError

MAX_LISTED = 5  # rows named in one error or note


@dataclass(slots=True)
class Problems:
    """Rows of one file that cannot be used: the first few in words, the others counted."""

    path: Path
    unit: str = "line"
    listed: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, line: int, what: str) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            self.listed.append(f"{self.unit} {line}: {what}")

    def raise_if_any(self) -> None:
        if self.count == 1:
            raise DataError(f"{self.path}, {self.listed[0]}")
        if self.count:
            more = f"; and {self.count - MAX_LISTED} more" if self.count > MAX_LISTED else ""
            raise DataError(f"{self.path}: {self.count} rows cannot be used; {'; '.join(self.listed)}{more}")


class BadRowError(Exception):
    """What is wrong with one row, and the way out; the reader adds file and line."""


def name_lines(lines: Sequence[int] | np.ndarray, unit: str = "line") -> str:
    """ "lines 3, 8, 11 and 4 more"; for notes and error messages."""
    word = unit if len(lines) == 1 else f"{unit}s"
    more = f" and {len(lines) - MAX_LISTED:,} more" if len(lines) > MAX_LISTED else ""
    return f"{word} {', '.join(str(int(line)) for line in lines[:MAX_LISTED])}{more}"
