"""A killed run goes on where it was, as if nothing had happened. 50 kills are a record: python tests/killing.py."""

from pathlib import Path

import killing
import pytest


@pytest.mark.ranks
@pytest.mark.timeout(400)
def test_two_kills(tmp_path: Path) -> None:
    killing.prepare(tmp_path)
    tally = killing.kill_often(tmp_path, kills=2, seed=30)
    assert tally.faults == [] and tally.kills == 2 and tally.runs >= 1
    assert tally.resumed_from, "no kill came after a save: nothing was resumed"


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
