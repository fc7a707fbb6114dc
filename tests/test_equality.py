"""Every parallel path against one process of Hugging Face + PEFT: losses, gradients and norms, in fp32."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import tiny_folder
from training import Trace, assert_equal, config, reference, write_rows

pytestmark = pytest.mark.ranks

# name: what differs from the plain run. The global batch is the same, so one reference serves them all.
CASES: dict[str, dict[str, Any]] = {
    "stage 3": {},
    "stage 3, recompute": {"recompute": "all"},
    "stage 3, recompute one layer": {"recompute": 1},
    "stage 3, two blocks a pass": {"train__micro_batch_size": 2},
    "stage 0": {"parallel__zero_stage": 0},
    "stage 1, recompute": {"parallel__zero_stage": 1, "recompute": "all"},
    "stage 2": {"parallel__zero_stage": 2},
}
FULL: dict[str, dict[str, Any]] = {
    "full, stage 3, recompute": {"recompute": "all"},
    "full, stage 2": {"parallel__zero_stage": 2},
    "full, stage 0": {"parallel__zero_stage": 0},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def trees(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl")
    cases = {name: config(model, rows, folder / "run", **changes) for name, changes in CASES.items()}
    full = {n: config(model, rows, folder / "run", method="full", train__lr=1e-3, **c) for n, c in FULL.items()}
    return cases | full


@pytest.fixture(scope="module")
def references(trees: dict[str, dict[str, Any]]) -> dict[str, Trace]:
    return {"lora": reference(trees["stage 3"]), "full": reference(trees["full, stage 3, recompute"])}


COVERING = (
    "stage 3",
    "stage 3, recompute",
    "full, stage 3, recompute",
)  # at 1 and 3 ranks, where the whole grid is long


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, (*CASES, *FULL)),
        (1, COVERING),
        (3, COVERING),
        pytest.param(1, (*CASES, *FULL), marks=pytest.mark.long),
        pytest.param(3, (*CASES, *FULL), marks=pytest.mark.long),
    ],
    ids=["2", "1", "3", "1-all", "3-all"],
)
def test_losses_and_gradients_equal_one_process(
    ranks: int,
    names: tuple[str, ...],
    trees: dict[str, dict[str, Any]],
    references: dict[str, Trace],
    tmp_path: Path,
) -> None:
    usable = {n: trees[n] for n in names if 6 % (ranks * trees[n]["train"].get("micro_batch_size", 1)) == 0}
    traces = run_ranks(ranks, "training:run_cases", usable, folder=tmp_path, timeout=360)[0]
    failures = []
    for name, trace in traces.items():
        try:
            assert_equal(trace, references["full" if name.startswith("full") else "lora"])
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    assert not failures, "\n".join(failures)
