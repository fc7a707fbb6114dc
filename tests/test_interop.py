"""The table of tests/interop.py, one family of it in CI: Conv1D, fused projections, tied tables."""

import subprocess
import sys
from pathlib import Path

import pytest

INTEROP = Path(__file__).parent / "interop.py"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [["gpt2"], pytest.param([], marks=pytest.mark.long)], ids=["gpt2", "all"])
def test_adapters_go_to_and_fro(names: list[str]) -> None:
    done = subprocess.run([sys.executable, str(INTEROP), *names], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and line[2:].split(" ")[0] != "base"]
    assert len(rows) >= max(1, len(names)) and (names or len(rows) >= 9)
