"""The table of tests/interop.py, one family of it in CI: Conv1D, fused projections, tied tables."""

from pathlib import Path

import pytest
from ranks import run_script


@pytest.mark.parametrize("names", [["gpt2"], pytest.param([], marks=pytest.mark.long)], ids=["gpt2", "all"])
def test_adapters_go_to_and_fro(names: list[str], tmp_path: Path) -> None:
    done = run_script("interop", *names, folder=tmp_path)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and line[2:].split(" ")[0] != "base"]
    assert len(rows) >= max(1, len(names)) and (names or len(rows) >= 9)
