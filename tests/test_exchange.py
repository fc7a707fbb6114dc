"""Exchanges of tokens between tensor-parallel ranks: right however late a rank is."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test below is this machine's")
def test_by_collectives(tmp_path: Path) -> None:
    for found in run_ranks(2, "exchange_cases:exchanges", 60, folder=tmp_path):
        assert found == {"way": "Collective", "note": "", "wrong": []}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_sided(tmp_path: Path) -> None:
    for found in run_ranks(torch.cuda.device_count(), "exchange_cases:exchanges", 2000, folder=tmp_path):
        assert found == {"way": "OneSided", "note": "", "wrong": []}
