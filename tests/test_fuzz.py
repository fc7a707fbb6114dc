"""A slice of the generated malformed inputs; the whole of it is tests/fuzz.py."""

from pathlib import Path

import fuzz
import pytest


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_malformed_inputs_are_answered(count: int, tmp_path: Path) -> None:
    found = fuzz.run(count, tmp_path, first_seed=count)
    assert [fault for tally in found.values() for fault in tally.faults] == []
    total = sum(sum(tally.counts.values()) for tally in found.values())
    assert total >= 0.8 * count and found["rows"].counts["accepted"] and found["rows"].counts["refused"]
