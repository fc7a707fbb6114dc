"""A killed run goes on where it was, as if nothing had happened. 50 kills are a record: python tests/killing.py."""

from pathlib import Path

import killing
import pytest
from ranks import run_script


@pytest.mark.ranks
def test_six_kills(tmp_path: Path) -> None:
    done = run_script("killing", "--forks", "--kills", "6", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 0 faults" in done.stdout
    assert "resumed 0 times" not in done.stdout, "no kill came after a save: nothing was resumed"


def test_faults_are_found(tmp_path: Path) -> None:
    """The judge is not blind: a missing row and a missing checkpoint are faults."""
    runs = []
    for name, steps in (("calm", range(1, killing.STEPS + 1)), ("killed", [1, *range(3, killing.STEPS + 1)])):
        run = killing.Victim(tmp_path, name, 1)
        (run.run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps))
        runs.append(run)
    tally = killing.Tally()
    killing._judge(runs[1], runs[0], tally)
    assert len(tally.faults) == 2 and "rows of the steps [1, 3, 4" in tally.faults[0]
    runs[1].log.write_text("saved run/checkpoints/step-000004 in 0.10 s\nsaved run/checkpoints/step-000006 in 0.10 s\n")
    assert (runs[1].reported(), runs[1].on_disk()) == (6, 0)
