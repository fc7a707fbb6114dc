"""Products of a few thousand rows on two streams by turns: where the tiles of one no longer fill the GPU, those of the
next begin."""

from collections.abc import Callable, Sequence
from functools import cache

import torch

Piece = tuple[Callable[[], object], Callable[[], object]]  # what waits for its input, and what computes


@cache
def _other(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def in_turns(pieces: Sequence[Piece], device: torch.device) -> None:
    """Wait and compute, piece by piece. What comes after finds all of them done."""
    if device.type != "cuda" or len(pieces) == 1:
        for wait, compute in pieces:
            wait()
            compute()
        return
    here, there = torch.cuda.current_stream(device), _other(device)
    there.wait_stream(here)
    for index, (wait, compute) in enumerate(pieces):
        if index % 2:
            with torch.cuda.stream(there):
                wait()
                compute()
            wait()  # here too, where waiting for other ranks is timed
        else:
            wait()
            compute()
    here.wait_stream(there)
