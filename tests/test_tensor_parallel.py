"""Tensor parallelism, alone and under ZeRO, against one process of Hugging Face + PEFT: losses, gradients and norms.

A covering part of the grid in `parallel_grid.py`; all of it is a command with a record, and `-m long` here.
"""

from pathlib import Path

import pytest
from parallel_grid import EPOCH, LONG, MODELS, cases_of, covering, run, unequal

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_one_process(world: int, tmp_path: Path) -> None:
    assert not unequal(run(world, covering(world), tmp_path, EPOCH))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_grid(model: str, world: int, tmp_path: Path) -> None:
    assert not unequal(run(world, cases_of(world, [model]), tmp_path, LONG))
