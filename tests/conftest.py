"""GPU tests are skipped where there is no GPU, and the run ends by saying what was not run here and why."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

NOT_CHOSEN: Counter[str] = Counter()
# Files of 15 s of processor time or more, longest first (2026-11-22): two workers then end at about the same time.
LONGEST = (
    *("hosts", "train", "experiments", "grid", "tensor_parallel", "resume", "equality", "bench", "generate", "load"),
    *("wrong_inputs", "baselines", "shapes", "requeue", "kills", "analyze", "fp8", "report", "cli", "cost"),
)
PLACES = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(item.path.name, len(PLACES)))  # stable: else as they were collected
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        NOT_CHOSEN["long grids: make test-all" if item.get_closest_marker("long") else "left out by -m or -k"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's workers: each chooses among all tests
        session.config.workeroutput["not_chosen"] = dict(NOT_CHOSEN)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    NOT_CHOSEN.update(getattr(node, "workeroutput", {}).get("not_chosen", {}) if not NOT_CHOSEN else {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = NOT_CHOSEN.copy()
    for report in terminalreporter.stats.get("skipped", []):
        reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("not run here")
    for reason, count in sorted(reasons.items()):
        terminalreporter.line(f"{count:5} tests: {reason}")
    if not reasons:
        terminalreporter.line("nothing: every test was run")
